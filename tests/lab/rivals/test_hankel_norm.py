"""The Hankel nuclear norm against Hankel singular values from elsewhere, and its derivative against differences."""

from __future__ import annotations

import math

import pytest
import torch

from compressm.errors import UnsupportedModelError
from compressm.lab.rivals.hankel_norm import hankel_nuclear_norm, hankel_penalty
from compressm.layers import LRU
from compressm.theory import balancing
from compressm.theory.systems import DiagonalSystem


def system(n: int, p: int, q: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.complex128, generator=generator)

    radius = 0.3 + 0.65 * torch.rand(n, dtype=torch.float64, generator=generator)
    phase = 2 * math.pi * torch.rand(n, dtype=torch.float64, generator=generator)
    return torch.polar(radius, phase), draw(n, p), draw(q, n)


@pytest.mark.parametrize(("n", "p", "q"), [(1, 1, 1), (6, 2, 3), (40, 3, 2), (5, 9, 8)])
def test_it_is_the_sum_of_the_singular_values_of_the_hankel_matrix(n: int, p: int, q: int) -> None:
    lam, B, C = system(n, p, q, n)
    length = 400  # a mode of 0.95, the slowest there is, has sunk to 1e-9
    kernel = DiagonalSystem(lam, B, C, real_output=False).kernel(2 * length)
    rows = [torch.cat(list(kernel[i : i + length].unbind(0)), 1) for i in range(length)]
    if p * q * length**2 > 5e6:  # the Hankel matrix would be huge: the library's own values, by other factors
        expected = balancing.balance(DiagonalSystem(lam, B, C, real_output=False), "complex").hsv.sum()
    else:
        expected = torch.linalg.svdvals(torch.cat(rows, 0)).sum()
    torch.testing.assert_close(hankel_nuclear_norm(lam, B, C), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_derivative(seed: int) -> None:
    values = [x.requires_grad_() for x in system(5, 2, 3, seed)]
    assert torch.autograd.gradcheck(hankel_nuclear_norm, values, rtol=1e-4, atol=1e-6)


def test_it_does_not_depend_on_the_scale_of_the_states() -> None:
    lam, B, C = system(12, 2, 2, 0)
    scale = torch.logspace(-3, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(
        hankel_nuclear_norm(lam, B * scale[:, None], C / scale), hankel_nuclear_norm(lam, B, C), rtol=1e-6, atol=0
    )


def test_unreached_and_repeated_states_make_no_trouble() -> None:
    lam, B, C = system(8, 2, 2, 0)
    lam, B = torch.cat([lam, lam[:3]]), torch.cat([B, torch.zeros(3, 2)])
    C = torch.cat([C, torch.randn(2, 3, dtype=torch.complex128)], 1)
    values = [x.requires_grad_() for x in (lam, B, C)]
    norm = hankel_nuclear_norm(*values)
    expected = balancing.balance(DiagonalSystem(*(x.detach() for x in values), real_output=False), "complex").hsv.sum()
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    norm.backward()
    assert all(bool(torch.isfinite(x.grad.abs()).all()) for x in values if x.grad is not None)


def test_training_with_the_penalty_makes_the_small_values_smaller() -> None:
    torch.manual_seed(0)
    layer = LRU(4, 32, r_min=0.5)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    before = _tail(layer)
    for _ in range(60):
        optimizer.zero_grad()
        (1e-2 * hankel_penalty(layer)).backward()
        optimizer.step()
    assert _tail(layer) < 0.7 * before


def _tail(layer: LRU) -> float:
    lam, B, C = (
        torch.polar(torch.exp(-layer.nu_log.exp()), layer.theta_log.exp()),
        layer.gamma_log.exp()[:, None] * torch.complex(layer.B_re, layer.B_im),
        torch.complex(layer.C_re, layer.C_im),
    )
    hsv = balancing.balance(DiagonalSystem(lam, B, C, real_output=False), "complex").hsv
    return float(hsv[8:].sum())


def test_a_model_without_such_a_layer() -> None:
    with pytest.raises(UnsupportedModelError, match="LRU"):
        hankel_penalty(torch.nn.Linear(2, 2))
