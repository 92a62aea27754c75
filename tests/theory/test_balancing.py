from __future__ import annotations

import math
import os
from typing import Literal

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pymor.models.iosys import LTIModel

from compressm.adapters import LRUAdapter
from compressm.adapters.changes import layer_values, write
from compressm.errors import InvalidRankRuleError, InvalidSystemError
from compressm.theory.balancing import Method, balance, truncate
from compressm.theory.gramians import gramians, real_gramians
from compressm.theory.systems import DiagonalSystem
from helpers import EPS, degenerate_systems, lru, random_system, real_matrices

EXAMPLES = int(os.environ.get("EXAMPLES", "100"))  # of the error bound, for each method


def lyapunov_hsv(A: np.ndarray, B: np.ndarray, C: np.ndarray) -> np.ndarray:
    P = scipy.linalg.solve_discrete_lyapunov(A, B @ B.conj().T)
    Q = scipy.linalg.solve_discrete_lyapunov(A.conj().T, C.conj().T @ C)
    L_P, L_Q = (np.linalg.cholesky((X + X.conj().T) / 2) for X in (P, Q))
    return np.linalg.svd(L_Q.conj().T @ L_P, compute_uv=False)


@pytest.mark.parametrize("seed", range(100))
def test_hankel_singular_values_equal_pymors(seed: int) -> None:
    system = random_system(seed, n=2 + seed % 7, p=1 + seed % 3, q=1 + seed % 2)
    A, B, C = real_matrices(system)
    expected = LTIModel.from_matrices(A, B, C, sampling_time=1).hsv()
    found = balance(system).hsv.numpy()
    # Gramians formed explicitly are known to a relative EPS, and so amplitudes, which are their square roots, to
    # 1e-8 of the largest: below 1e-6 of it neither side has eight digits any more.
    resolved = expected > 1e-6 * expected[0]
    np.testing.assert_allclose(found[: len(expected)][resolved], expected[resolved], rtol=1e-8)


@pytest.mark.parametrize("seed", range(100, 200))
def test_complex_hankel_singular_values_equal_scipys(seed: int) -> None:
    system = random_system(seed, n=2 + seed % 7, p=1 + seed % 3, q=1 + seed % 2, real_output=False)
    expected = lyapunov_hsv(np.diag(system.lam.numpy()), system.B.numpy(), system.C.numpy())
    resolved = expected > 1e-6 * expected[0]  # as above
    found = balance(system, "complex").hsv.numpy()
    np.testing.assert_allclose(found[resolved], expected[resolved], rtol=1e-8)


@pytest.mark.parametrize("seed", range(20))
def test_gramians_satisfy_their_lyapunov_equations(seed: int) -> None:
    system = random_system(seed, n=24, radius=(0.5, 1 - 1e-6))
    A, B, C = (torch.from_numpy(x) for x in real_matrices(system))
    P, Q = real_gramians(system)
    assert (A @ P @ A.T + B @ B.T - P).norm() <= 1e-10 * P.norm()
    assert (A.T @ Q @ A + C.T @ C - Q).norm() <= 1e-10 * Q.norm()
    P, Q = gramians(system)
    Lam = torch.diag(system.lam)
    assert (Lam @ P @ Lam.mH + system.B @ system.B.mH - P).norm() <= 1e-10 * P.norm()
    assert (Lam.mH @ Q @ Lam + system.C.mH @ system.C - Q).norm() <= 1e-10 * Q.norm()


def peak_error(system: DiagonalSystem, reduced: DiagonalSystem) -> float:
    """The largest error on a grid of its own: equidistant, and dense around every pole of both systems."""
    phases = torch.cat([system.lam.angle(), reduced.lam.angle()])
    width = 1 - torch.cat([system.lam.abs(), reduced.lam.abs()])
    near = (phases[:, None] + width[:, None] * torch.linspace(-3, 3, 13, dtype=torch.float64)).reshape(-1)
    omega = torch.cat([torch.linspace(-torch.pi, torch.pi, 101, dtype=torch.float64), near])
    error = system.transfer_function(omega) - reduced.transfer_function(omega)
    return float(torch.linalg.matrix_norm(error, ord=2).max())


@settings(max_examples=EXAMPLES)
@given(system=degenerate_systems("real"), share=st.floats(0, 1), exceed=st.booleans())
def test_error_bound_holds_real_part_aware(system: DiagonalSystem, share: float, exceed: bool) -> None:
    check_bound(system, "real", share, exceed)


@settings(max_examples=EXAMPLES)
@given(system=degenerate_systems("complex"), share=st.floats(0, 1), exceed=st.booleans())
def test_error_bound_holds_complex(system: DiagonalSystem, share: float, exceed: bool) -> None:
    check_bound(system, "complex", share, exceed)


def check_bound(system: DiagonalSystem, method: str, share: float, exceed: bool) -> None:
    states = max(1, round(share * system.n))
    reduction = truncate(balance(system, method), states, exceed=exceed)  # type: ignore[arg-type]
    certificate = reduction.certificate
    assert certificate.valid, certificate.failures
    assert exceed or reduction.system.n <= states
    assert certificate.spectral_radius < 1
    assert peak_error(system, reduction.system) <= certificate.bound + certificate.rounding_allowance
    # The allowance is for rounding only: it must stay out of sight of any error that one could want to bound.
    balancing = balance(system, method)  # type: ignore[arg-type]
    nearness = 1 - float(system.lam.abs().max())
    gains = float((balancing.factor_P.norm(dim=1) * balancing.factor_Q.norm(dim=1)).sum())
    assert certificate.rounding_allowance <= 1e3 * EPS * certificate.condition / nearness * gains


@pytest.mark.parametrize("method", ["real", "complex"])
def test_hankel_singular_values_do_not_depend_on_the_basis(method: str) -> None:
    system = random_system(0, n=10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    scale = 10 ** torch.linspace(-6, 6, 10, dtype=torch.float64)
    scaled = DiagonalSystem(system.lam[order], (system.B * scale[:, None])[order], (system.C / scale)[:, order])
    # 1e-9: rounding, relative to each value down to 1e-6 of the largest.
    a, b = balance(system, method).hsv, balance(scaled, method).hsv  # type: ignore[arg-type]
    resolved = a > 1e-6 * a[0]
    torch.testing.assert_close(a[resolved], b[resolved], rtol=1e-9, atol=0)
    # A dense change of basis of the real system, through the oracle.
    A, B, C = real_matrices(system)
    T = np.linalg.qr(np.random.default_rng(0).normal(size=A.shape))[0] @ np.diag(np.linspace(0.5, 2, len(A)))
    dense = lyapunov_hsv(np.linalg.solve(T, A @ T), np.linalg.solve(T, B), C @ T)
    mine = balance(system).hsv.numpy()
    resolved = dense > 1e-6 * dense[0]
    np.testing.assert_allclose(mine[resolved], dense[resolved], rtol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("method", ["real", "complex"])
def test_full_order_reproduces_the_layers_output(dtype: torch.dtype, tolerance: float, method: str) -> None:
    layer = lru(0, d_state=96).to(dtype)
    u = torch.randn(3, 200, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    before = layer(u).detach()
    adapter = LRUAdapter()
    reduction = truncate(balance(adapter.read(layer_values(layer)), method), 96)  # type: ignore[arg-type]
    assert reduction.certificate.bound == 0
    write(layer, adapter.plan(layer_values(layer), reduction))
    assert (layer(u) - before).norm() <= tolerance * before.norm()


def test_energy_of_the_output_error_obeys_the_bound() -> None:
    layer = lru(2).double()
    u = torch.zeros(4, 4000, 8, dtype=torch.float64)
    u[:, :500] = torch.randn(4, 500, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = layer(u).detach()
    adapter = LRUAdapter()
    reduction = truncate(balance(adapter.read(layer_values(layer))), 32)
    write(layer, adapter.plan(layer_values(layer), reduction))
    error = (layer(u) - before).norm(dim=(1, 2))
    certificate = reduction.certificate
    assert (error <= certificate.bound * u.norm(dim=(1, 2))).all()
    assert (error <= 1.01 * certificate.hinf_error * u.norm(dim=(1, 2))).all()  # the norm itself; the grid is near it
    assert error.max() > 0


def test_hand_solved_system_of_order_one() -> None:
    # G(z) = c b / (1 - a / z): P = b^2 / (1 - a^2), Q = c^2 / (1 - a^2), sigma = |b c| / (1 - a^2).
    system = DiagonalSystem(*(torch.tensor(x, dtype=torch.complex128) for x in ([0.5], [[2.0]], [[3.0]])), False)
    assert balance(system, "complex").hsv.item() == pytest.approx(6 / 0.75, rel=1e-14)


@pytest.mark.parametrize("states", [128, 64, 32, 16])
def test_real_part_aware_beats_complex_at_equal_numbers_of_states(states: int) -> None:
    system = LRUAdapter().read(layer_values(lru(5, d_state=256)))
    errors = {}
    for method in ("real", "complex"):
        reduction = truncate(balance(system, method), states)  # type: ignore[arg-type]
        assert reduction.system.n <= states
        errors[method] = reduction.certificate.relative_h2_error
    assert errors["real"] < errors["complex"]


def test_batch_of_systems_is_reduced_one_by_one() -> None:
    singles = [random_system(seed, n=9, p=1, q=1) for seed in range(6)]
    batch = DiagonalSystem(
        *(torch.stack([getattr(s, x) for s in singles]).unflatten(0, (2, 3)) for x in ("lam", "B", "C"))
    )
    together = truncate(balance(batch), 4)
    for index, single in enumerate(singles):
        alone = truncate(balance(single), 4)
        omega = torch.linspace(0, torch.pi, 50, dtype=torch.float64)
        position = divmod(index, 3)
        torch.testing.assert_close(
            together.system.transfer_function(omega)[position],
            alone.system.transfer_function(omega),
            rtol=1e-9,
            atol=1e-9,
        )
        assert together.certificates[index].bound == pytest.approx(alone.certificate.bound)


def test_large_system() -> None:
    system = random_system(7, n=1024, p=2, q=2, radius=(0.9, 1 - 1e-6))
    reduction = truncate(balance(system, "complex"), 100)
    assert reduction.system.n <= 100
    assert reduction.certificate.valid, reduction.certificate.failures


def test_system_that_does_nothing_becomes_one_idle_state() -> None:
    system = random_system(8)
    silent = DiagonalSystem(system.lam, torch.zeros_like(system.B), system.C)
    reduction = truncate(balance(silent), 3)
    assert reduction.system.n == 1
    assert reduction.certificate.valid
    assert reduction.system.h2_norm() == 0


def test_rescaling_changes_the_basis_and_nothing_else() -> None:
    system = random_system(9)
    reduction = truncate(balance(system), 4)
    scaled = reduction.rescaled(torch.linspace(0.1, 10, reduction.system.n, dtype=torch.float64))
    torch.testing.assert_close(scaled.system.kernel(20), reduction.system.kernel(20))
    torch.testing.assert_close(scaled.left @ scaled.right, reduction.left @ reduction.right)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InvalidSystemError, match="method must be"):
        balance(random_system(0), "modal")  # type: ignore[arg-type]
    with pytest.raises(InvalidSystemError, match="real output"):
        balance(random_system(0, real_output=False), "real")
    with pytest.raises(InvalidRankRuleError, match="at least 1"):
        truncate(balance(random_system(0)), 0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 7),
    st.sampled_from(["real", "complex"]),
    st.sampled_from(["smallest", "random"]),
)
def test_any_part_of_a_balanced_system_is_stable_and_obeys_its_bound(
    seed: int, states: int, method: Method, order: Literal["smallest", "random"]
) -> None:
    system = random_system(seed, real_output=method == "real")
    balancing = balance(system, method)
    other = balancing.rearranged(order)
    torch.testing.assert_close(other.hsv.sort(descending=True).values, balancing.hsv, rtol=0, atol=0)
    best, reduction = truncate(balancing, states), truncate(other, states)
    certificate = reduction.certificate
    assert certificate.valid
    assert certificate.spectral_radius < 1
    assert certificate.bound >= best.certificate.bound * (1 - 1e-9)
    if order == "smallest" and method == "complex":  # an isolated real eigenvalue costs the other a dimension
        missing = balancing.energy[: system.n - states].sum()  # what is kept are the last
        assert certificate.bound == pytest.approx(2 * float(missing), rel=1e-6)


def test_rearranged_batches_and_noise_stays_last() -> None:
    batch = [random_system(seed, p=1, q=1) for seed in (1, 2)]
    system = DiagonalSystem(
        torch.stack([one.lam for one in batch]),
        torch.stack([one.B * torch.tensor([1.0] * 5 + [0.0] * 3)[:, None] for one in batch]),
        torch.stack([one.C for one in batch]),
    )
    balancing = balance(system)
    other = balancing.rearranged("smallest")
    assert bool((other.hsv[:, 10:] < 1e-12).all())
    assert bool((other.energy[:, :5].diff(dim=-1) >= 0).all())
    reduction = truncate(other, 2)
    assert reduction.certificate.valid
    assert reduction.system.lam.shape == (2, 2)


@pytest.mark.parametrize("states", [130, 150])
def test_real_eigenvalues_are_not_cut_twice_as_far_as_asked(states: int) -> None:
    g = torch.Generator().manual_seed(0)
    B, C = (torch.randn(shape, dtype=torch.complex128, generator=g) for shape in ((160, 64), (64, 160)))
    system = DiagonalSystem(torch.rand(160, generator=g) * 0.98 + 0.01, B, C)
    reduction = truncate(balance(system), states)
    assert 0.98 * states <= reduction.system.n <= states
    assert reduction.certificate.valid


def test_the_error_is_looked_for_where_modes_were_removed() -> None:
    # Sixty slow modes side by side, of which the weaker half goes: its peaks are all that the error has.
    radius, strong = 1 - 1e-5, (torch.arange(30, dtype=torch.float64) + 0.5) * math.pi / 30
    weak = (torch.arange(30, dtype=torch.float64) + 0.93) * math.pi / 31
    gains = torch.cat([torch.ones(30), torch.full((30,), 1e-3)]).sqrt().to(torch.complex128)
    lam = radius * torch.exp(1j * torch.cat([strong, weak]))
    system = DiagonalSystem(lam, gains[:, None], gains[None])
    reduction = truncate(balance(system), 30)
    error = system.minus(reduction.system).transfer_function(weak).abs().max()
    assert reduction.certificate.hinf_error >= 0.99 * float(error)


@pytest.mark.parametrize("method", ["real", "complex"])
def test_states_are_rearranged_whole(method: Method) -> None:
    """A complex state has two values in the real method, which stay side by side, the larger one first."""
    pair = 2 if method == "real" else 1
    balancing = balance(random_system(4, n=9, real_output=method == "real"), method)
    states = balancing.hsv.reshape(-1, pair)
    assert torch.equal(balancing.rearranged("smallest").hsv.reshape(-1, pair), states.flip(0))
    drawn = balancing.rearranged("random").hsv.reshape(-1, pair)
    assert not torch.equal(drawn, states)
    assert torch.equal(drawn[drawn[:, 0].argsort(descending=True)], states)
    # The vectors go with their values.
    for other in (balancing.rearranged("smallest"), balancing.rearranged("random")):
        product = other.factor_Q.mH @ other.factor_P
        torch.testing.assert_close(product @ other.V, other.U * other.hsv.to(other.U.dtype))
