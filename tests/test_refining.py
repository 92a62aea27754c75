"""The ways of `benchmarks/refining.py`, against sums over impulse responses and simulations."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compressm.scans import lti_scan
from compressm.theory.balancing import Balancing, Reduction, balance, truncate
from compressm.theory.systems import DiagonalSystem


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("refining")


@pytest.fixture
def cut() -> tuple[Balancing, Reduction]:
    draw = torch.Generator().manual_seed(0)
    decay, phase = (torch.rand(20, generator=draw, dtype=torch.float64) for _ in range(2))
    lam = torch.exp(torch.complex(-0.02 - 0.3 * decay, 3 * phase))
    B = torch.randn(20, 3, generator=draw, dtype=torch.complex128)
    C = torch.randn(3, 20, generator=draw, dtype=torch.complex128)
    balancing = balance(DiagonalSystem(lam, B, C))
    return balancing, truncate(balancing, 5)


def test_the_h2_error_is_that_of_the_impulse_responses(ways: Any, cut: tuple[Balancing, Reduction]) -> None:
    whole, reduced = cut[0].system, cut[1].system
    kernel, other = (one.kernel(1500) for one in (whole, reduced))  # 0.98^1500 is 1e-13
    expected = (kernel - other).square().sum() / kernel.square().sum()
    torch.testing.assert_close(ways.h2_error(ways.of(whole))(ways.of(reduced)), expected, rtol=1e-9, atol=0)


def test_an_h2_optimal_system_is_better_than_the_truncation_and_stationary(
    ways: Any, cut: tuple[Balancing, Reduction]
) -> None:
    objective = ways.h2_error(ways.of(cut[0].system))
    better = ways.refined(cut[1], objective, 400)
    assert objective(ways.of(better.system)) < 0.999 * objective(ways.of(cut[1].system))
    C = better.system.C.clone().requires_grad_()
    value = objective((better.system.lam, better.system.B, C))
    (slope,) = torch.autograd.grad(value, C)
    assert float(slope.abs().max() * C.detach().abs().max()) < 1e-4


def test_the_weighted_error_is_the_simulated_one_if_inputs_and_gradients_are_independent(
    ways: Any, cut: tuple[Balancing, Reduction]
) -> None:
    torch.manual_seed(0)
    u, g = (torch.randn(2000, 64, 3, dtype=torch.float64).cumsum(1) for _ in range(2))
    whole, reduced = ways.of(cut[0].system), ways.of(cut[1].system)

    def change(system: tuple[torch.Tensor, ...]) -> torch.Tensor:
        lam, B, C = system
        y = lti_scan(u, lam.abs().log(), lam.angle(), B.real, B.imag, C.real, C.imag, engine="loop")
        return (g * y).sum((1, 2))

    simulated = (change(whole) - change(reduced)).square().mean() / change(whole).square().mean()
    predicted = ways.weighted_error(whole, u, g)(reduced)
    assert 0.5 < float(predicted / simulated) < 2  # random walks are not stationary


def test_a_singular_perturbation_keeps_the_gain_with_its_dense_direct_term_only(
    ways: Any, cut: tuple[Balancing, Reduction]
) -> None:
    found, at_one = ways.singular_perturbation(*cut), torch.zeros(1, dtype=torch.float64)
    whole, reduced = (s.transfer_function(at_one)[0].real for s in (cut[0].system, found.reduction.system))
    torch.testing.assert_close(reduced + found.direct, whole, rtol=1e-9, atol=1e-9)
    beside = found.direct - torch.diag(found.direct.diagonal())
    assert float(beside.norm()) > 0.05 * float(whole.norm())
    product = found.reduction.left @ found.reduction.right
    torch.testing.assert_close(product, torch.diag(product.diagonal()), rtol=0, atol=1e-9)


def test_a_constant_input_gives_the_same_response_after_its_gain_is_restored(
    ways: Any, cut: tuple[Balancing, Reduction]
) -> None:
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = ways.gain_kept(cut[0].system, cut[1], v)
    before, after = (s.kernel(1500).sum(0) @ v for s in (cut[0].system, found.system))
    torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-8)
    assert not math.isclose(float((cut[1].system.kernel(1500).sum(0) @ v - before).norm()), 0, abs_tol=1e-3)
