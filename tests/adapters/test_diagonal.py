"""What carries the averages of eigenvalues' parameters through a cut, against finite differences and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressm.adapters import LRUAdapter, S4DAdapter, S5Adapter
from compressm.adapters.changes import layer_values
from compressm.adapters.diagonal import (
    DiagonalAdapter,
    participation,
    phases,
    pullback_of_C,
    row_norm_kept,
    scaled,
)
from compressm.layers import LRU, S4D, S5
from compressm.theory.balancing import Reduction, balance, truncate
from compressm.theory.systems import DiagonalSystem
from helpers import random_system, real_matrices


def case(name: str) -> tuple[DiagonalAdapter, nn.Module, Reduction]:
    torch.manual_seed(3)
    layer: nn.Module = {
        "lru": lambda: LRU(3, 8, r_min=0.5, r_max=0.95),
        "s5": lambda: S5(3, 8),
        "s5 bidirectional": lambda: S5(3, 8, bidirectional=True),
        "s4d": lambda: S4D(3, 8),
    }[name]().double()
    adapter = {"lru": LRUAdapter, "s5": S5Adapter, "s5 bidirectional": S5Adapter, "s4d": S4DAdapter}[name]()
    return adapter, layer, truncate(balance(adapter.read(layer_values(layer))), 4)


def one_system(reduction: Reduction, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    axes = len(reduction.system.batch_shape)
    parts = (reduction.system.lam, reduction.left, reduction.right)
    lam, left, right = (x.reshape(-1, *x.shape[axes:])[index].numpy() for x in parts)
    return lam, left, right


@pytest.mark.parametrize("seed", range(3))
def test_participation_is_how_far_each_old_eigenvalue_moves_each_new_one(seed: int) -> None:
    system = random_system(seed, n=6, radius=(0.4, 0.95))
    reduction = truncate(balance(system), 4)
    lam, left, right = one_system(reduction, 0)

    def moved(index: int, by: complex) -> np.ndarray:
        """The new eigenvalues, where one old one is another."""
        perturbed = system.lam.clone()
        perturbed[index] += by
        A = real_matrices(DiagonalSystem(perturbed, system.B, system.C))[0]
        found = np.linalg.eigvals(left @ A @ right)
        return np.array([found[np.argmin(abs(found - one))] for one in lam])

    size = np.zeros((2, len(lam), system.n))
    for i in range(system.n):
        real, imaginary = ((moved(i, h) - moved(i, -h)) / 2e-6 for h in (1e-6, 1e-6j))
        # d lam' = p d lam + q conj(d lam)
        size[:, :, i] = abs(real - 1j * imaginary) / 2, abs(real + 1j * imaginary) / 2
    total = size.sum(0).sum(1, keepdims=True)
    share, signed = participation(reduction)
    used = lam.imag > 1e-6  # a real eigenvalue that has no partner has no conjugate to be told from
    assert used.sum() >= 3
    np.testing.assert_allclose(share.numpy()[used], ((size[0] + size[1]) / total)[used], atol=1e-5)
    np.testing.assert_allclose(signed.numpy()[used], ((size[0] - size[1]) / total)[used], atol=1e-5)
    np.testing.assert_allclose(share.sum(-1), 1)


def sizes(kind: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every state, the size of a gradient on each of its parameters, from the layer's equations."""
    v = {name: value.double() for name, value in values.items()}
    C = torch.complex(v["C_re"], v["C_im"])
    if kind == "lru":
        nu, theta, gamma = (v[name].exp() for name in ("nu_log", "theta_log", "gamma_log"))
        lam, b = torch.exp(torch.complex(-nu, theta)), gamma * torch.complex(v["B_re"], v["B_im"]).norm(dim=1)
        mode = b * C.norm(dim=0)
        # log|lam| = -nu and the phase is theta; a derivative by the logarithm of a number is that number's times it.
        return {
            "nu_log": nu * mode / (1 - lam.abs()),
            "theta_log": theta * mode / (1 - lam.abs()),
            "gamma_log": mode,
        }
    step = v["log_step"].exp() if kind != "s4d" else v["log_step"].exp()[:, None]
    poles = torch.complex(-v["log_decay"].exp(), v["frequency"])
    z = poles * step
    hold = (torch.exp(z) - 1) / poles
    if kind == "s4d":
        mode = (hold * C).abs()
    else:
        mode = (hold[:, None] * torch.complex(v["B_re"], v["B_im"])).norm(dim=1) * C.norm(dim=0)
    moves = mode / (1 - torch.exp(z).abs())
    found = {"log_decay": z.real.abs() * moves, "frequency": step * moves, "log_step": z.abs() * moves}
    return found if kind != "s4d" else {name: found[name] for name in ("log_decay", "frequency")}


@pytest.mark.parametrize("kind", ["lru", "s5", "s5 bidirectional", "s4d"])
def test_averages_are_carried_by_shares_in_units_of_the_gradients_sizes(kind: str) -> None:
    adapter, layer, reduction = case(kind)
    before = layer_values(layer)
    change = adapter.plan(before, reduction)
    family = kind.split()[0]
    old, new = sizes(family, before), sizes(family, {**before, **change.values()})
    share, signed = (x.numpy() for x in participation(reduction))
    carried = {part.names[0]: part for part in change.parameters if len(part.names) == 1}
    assert carried.keys() == old.keys()
    for name, part in carried.items():
        each = signed if name in ("theta_log", "frequency") else share
        for place in np.ndindex(*part.pullback.shape):
            *batch, j, i = place
            # The written layer and the old one differ from their systems by a common factor of all modes at most.
            ratio = float(new[name][(*batch, j)] / old[name][(*batch, i)])
            assert float(part.pullback[place]) == pytest.approx(each[place] * ratio, rel=1e-6, abs=1e-12)
            weight = share[place] ** 2 / (share[(*batch, j)] ** 2).sum()
            assert float(part.pullback_squared[place]) == pytest.approx(weight * ratio**2, rel=1e-6, abs=1e-12)
        assert part.axis == (1 if kind == "s4d" else 0)
    assert change.attributes == {}


@pytest.mark.parametrize("kind", ["lru", "s5", "s5 bidirectional"])
def test_all_new_rows_of_b_have_the_mean_norm_that_keeps_the_sum(kind: str) -> None:
    adapter, layer, reduction = case(kind)
    before = layer_values(layer)
    after = adapter.plan(before, reduction).values()
    old, new = (torch.complex(v["B_re"], v["B_im"]).norm(dim=1) for v in (before, after))
    torch.testing.assert_close(new, (old.sum() / len(new)).expand_as(new))


def test_a_row_of_zeros_stays_and_the_system_is_the_same() -> None:
    system = random_system(0, n=6)
    reduction = truncate(balance(system), 4).padded(5)
    silent = DiagonalSystem(
        reduction.system.lam, reduction.system.B * torch.tensor([1.0, 0, 1, 1, 1])[:, None], reduction.system.C
    )
    reduction = Reduction(silent, reduction.left, reduction.right, reduction.certificates)
    old_B = torch.randn(7, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([0.5, 1.0, -2.0, 3.0, 4.0], dtype=torch.float64)
    found = row_norm_kept(reduction, old_B, scale)
    norms = (found.system.B / scale[:, None]).norm(dim=1)
    each = float(old_B.norm(dim=1).sum()) / 5
    torch.testing.assert_close(norms, torch.tensor([each, 0, each, each, each], dtype=torch.float64))
    torch.testing.assert_close(found.system.kernel(9), reduction.system.kernel(9))


def test_phases_leave_the_real_axis_by_a_millionth_of_the_decay_rate() -> None:
    angles = torch.tensor([0.0, 0.3, -0.3, math.pi, -math.pi, 3.0, 1e-9, math.pi - 1e-9], dtype=torch.float64)
    radius = torch.tensor([0.5, 0.9, 0.9, 0.8, 0.7, 0.2, 0.6, 0.4], dtype=torch.float64)
    least = -1e-6 * radius.log()
    expected = angles.clone()
    expected[[0, 6]] = least[[0, 6]]
    expected[[3, 4, 7]] = math.pi - least[[3, 4, 7]]
    torch.testing.assert_close(phases(torch.polar(radius, angles)), expected, rtol=0, atol=1e-12)
    assert math.isfinite(float(phases(torch.zeros(1, dtype=torch.complex128))))


def test_diagonals_are_applied_in_stacked_coordinates() -> None:
    generator = torch.Generator().manual_seed(0)
    d, x = (torch.randn(*shape, dtype=torch.complex128, generator=generator) for shape in ((2, 4), (2, 4, 3)))
    stacked = torch.cat([x.real, x.imag], -2)
    expected = d[..., None] * x
    torch.testing.assert_close(scaled(d, stacked), torch.cat([expected.real, expected.imag], -2))
    torch.testing.assert_close(
        scaled(d.real, stacked), torch.cat([d.real[..., None] * x.real, d.real[..., None] * x.imag], -2)
    )


def test_gradients_on_c_change_as_c_is_made_of_the_new_one() -> None:
    # Re(C x) with x' = left x: the C that reads x through the kept subspace is the new one times left.
    reduction = truncate(balance(random_system(1, n=6, q=2)), 4)
    r, n = 4, 6
    new = torch.randn(2, r, 2, dtype=torch.float64, requires_grad=True)  # (Re, Im) last
    row = torch.cat([new[..., 0], -new[..., 1]], 1) @ reduction.left
    old = torch.stack([row[:, :n], -row[:, n:]], -1)
    weight = torch.randn(2, n, 2, dtype=torch.float64)
    (expected,) = torch.autograd.grad((old * weight).sum(), new)
    stacked = torch.cat([weight[..., 0], weight[..., 1]], 1)
    found = (pullback_of_C(reduction) @ stacked.mT).mT
    torch.testing.assert_close(found, torch.cat([expected[..., 0], expected[..., 1]], 1))


@pytest.mark.parametrize("kind", ["lru", "s5", "s4d"])
def test_resizing_keeps_everything_but_the_number_of_states(kind: str) -> None:
    adapter, layer, _ = case(kind)
    before = layer_values(layer)
    change = adapter.resized(layer, 11)
    assert change.attributes == {}
    for part in change.parameters:
        (name,), (value,) = part.names, part.values
        expected = list(before[name].shape)
        assert expected[part.axis] == 8
        expected[part.axis] = 11
        assert list(value.shape) == expected
        assert value.dtype == before[name].dtype
        assert part.pullback.shape == part.pullback_squared.shape == (11, 8)
    with_states = {name for name, value in before.items() if 8 in value.shape}
    assert set(change.values()) == with_states
