"""Coordinates in order of worth, against formulas that know nothing of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressm.theory.ordering import balanced_coordinates, nested_basis, order_states, prefix_errors
from compressm.theory.recurrence import Moments, balance_selective
from compressm.theory.selection import subspace


def moment(n: int, seed: int, groups: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(groups, n, n, generator=generator, dtype=torch.float64)
    return factor @ factor.mT


def error(P: Tensor, W: Tensor, rest: Tensor) -> float:
    """``(tr W Z P Z^T / tr W P)^1/2`` over all groups."""
    return float((torch.einsum("gij,gjk,gkl,gil->", W, rest, P, rest) / (W * P).sum()).sqrt())


@given(st.integers(2, 9), st.integers(0, 1000), st.sampled_from(["permutation", "rotation", "any"]))
@settings(max_examples=20)
def test_errors_of_prefixes_are_those_of_their_projections(n: int, seed: int, kind: str) -> None:
    P, W, zeros = moment(n, seed, 2), moment(n, seed + 1, 2), torch.zeros(2, n, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    balancing = balance_selective(Moments(one, P, W, W, zeros, zeros, zeros + 1))
    order = order_states(balancing, kind == "any", kind == "rotation", "least_squares")
    into, out = order.into, order.out
    eye = torch.eye(n, dtype=torch.float64).expand(2, n, n)
    torch.testing.assert_close(out.mT @ into, eye, rtol=1e-7, atol=1e-7)
    if kind == "rotation":
        torch.testing.assert_close(into @ into.mT, eye, rtol=1e-10, atol=1e-10)
    expected = prefix_errors(balancing, order)
    for r in range(n + 1):
        rest = eye - out[:, :r].mT @ into[:, :r]
        assert float(expected[r]) == pytest.approx(error(P, W, rest), rel=1e-4, abs=1e-6)


@given(st.integers(2, 9), st.integers(0, 1000))
@settings(max_examples=20)
def test_balanced_coordinates_balance(n: int, seed: int) -> None:
    P, W = (moment(n, one)[0] + torch.eye(n) for one in (seed, seed + 1))
    T = balanced_coordinates(P, W)
    inverse = torch.linalg.inv(T)
    s = torch.linalg.eigvals(P @ W).real.clamp_min(0).sqrt().sort(descending=True).values
    for balanced in (T @ P @ T.mT, inverse.mT @ W @ inverse):
        torch.testing.assert_close(balanced, torch.diag(s), rtol=1e-2, atol=1e-4 * float(s[0]))


def test_half_of_a_nested_basis_is_the_subspace_of_that_size() -> None:
    P, W = moment(8, 0)[0], moment(8, 1)[0]
    basis, direct = nested_basis(P, W), subspace(P, W, 4)
    torch.testing.assert_close(basis[:, :4] @ basis[:, :4].mT, direct @ direct.mT, rtol=1e-9, atol=1e-9)
