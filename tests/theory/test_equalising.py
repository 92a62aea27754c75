"""Coordinates for rounding: equal powers, and a noise that no other basis undercuts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressm.theory.equalising import equal_coordinates, equalising_rotation


def moment(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    return factor @ factor.mT


@given(st.integers(1, 12), st.integers(0, 1000), st.booleans())
@settings(max_examples=25)
def test_every_entry_has_the_mean_power(n: int, seed: int, singular: bool) -> None:
    P = moment(n, seed)
    P = P if not singular else torch.diag(torch.eye(n, dtype=torch.float64)[0])
    Q = equalising_rotation(P)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(n, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    powers = (Q @ P @ Q.mT).diagonal()
    torch.testing.assert_close(powers, (P.trace() / n).expand(n), rtol=1e-9, atol=1e-12)


@given(st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=25)
def test_no_other_basis_has_less_noise(n: int, seed: int) -> None:
    P, W = moment(n, seed) + torch.eye(n), moment(n, seed + 1) + torch.eye(n)
    into, out = (one[0] for one in equal_coordinates(P[None], W[None], any_basis=True))
    torch.testing.assert_close(out.mT @ into, torch.eye(n, dtype=torch.float64), rtol=1e-8, atol=1e-8)

    def noise(into: Tensor, out: Tensor) -> float:
        return float((into @ P @ into.mT).trace() * (out @ W @ out.mT).trace())

    least = float(torch.linalg.eigvals(P @ W).real.clamp_min(0).sqrt().sum().square())
    assert noise(into, out) == pytest.approx(least, rel=1e-4)
    other = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3 * torch.eye(n)
    assert noise(other, torch.linalg.inv(other).mT) >= least * (1 - 1e-9)
    powers = (into @ P @ into.mT).diagonal()
    torch.testing.assert_close(powers, powers.mean().expand(n), rtol=1e-4, atol=0)
