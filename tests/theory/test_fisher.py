from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressm.errors import InvalidRankRuleError, InvalidSystemError
from compressm.theory.fisher import MaskEstimate, MaskFisher, reduce_by_fisher, select_by_fisher
from compressm.theory.recurrence import moments
from compressm.theory.selection import compensation, select_by_removal
from helpers import random_signals


def scores(seed: int, sequences: int, groups: int, n: int) -> torch.Tensor:
    """Gradients with a common part, so that contributions cancel."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups * n, groups * n, dtype=torch.float64, generator=generator)
    scale = 10 ** (-1.5 * torch.rand(groups * n, dtype=torch.float64, generator=generator))
    draws = torch.randn(sequences, groups * n, dtype=torch.float64, generator=generator)
    return ((draws @ mixing) * scale).view(sequences, groups, n)


def cost(F: torch.Tensor, gone: list[int]) -> float:
    return float(F[gone][:, gone].sum()) / 2


@pytest.mark.parametrize("seed", range(8))
def test_selection_is_as_good_as_the_best_of_all_subsets(seed: int) -> None:
    fisher = MaskFisher.of(scores(seed, 4000, 2, 4))
    F = fisher.shrunk()
    for states in (1, 2, 3):
        found = select_by_fisher(fisher, states)
        assert found.kept.shape == (2, states)
        costs = {}
        for a, b in product(combinations(range(4), states), repeat=2):
            kept = [*a, *(4 + j for j in b)]
            costs[a, b] = cost(F, [j for j in range(8) if j not in kept])
        mine = tuple(map(tuple, found.kept.tolist()))
        assert found.damage == pytest.approx(costs[mine], rel=1e-9, abs=1e-12)
        assert costs[mine] <= 1.5 * min(costs.values())  # exchanges end in a local optimum


@pytest.mark.parametrize("seed", range(5))
def test_of_one_group_it_is_selection_by_removal(seed: int) -> None:
    fisher = MaskFisher.of(scores(seed, 5000, 1, 9))
    expected = select_by_removal(fisher.shrunk(), 4)
    assert select_by_fisher(fisher, 4).kept[0].tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_gains_are_the_minimum_over_the_kept_masks(seed: int) -> None:
    fisher = MaskFisher.of(scores(seed, 4000, 2, 5))
    F = fisher.shrunk()
    plain, taken_over = select_by_fisher(fisher, 3), select_by_fisher(fisher, 3, gains=True)
    assert torch.equal(plain.kept, taken_over.kept)
    assert taken_over.damage < plain.damage

    def damage(gains: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(2, 5, dtype=torch.float64).scatter(1, plain.kept, gains).flatten()
        return (mask - 1) @ F @ (mask - 1) / 2

    gains = taken_over.gains.clone().requires_grad_()
    value = damage(gains)
    assert float(value.detach()) == pytest.approx(taken_over.damage, rel=1e-9)
    (slope,) = torch.autograd.grad(value, gains)
    assert float(slope.abs().max()) < 1e-4 * float(F.diagonal().max())  # of a ridge of 1e-6


def test_few_sequences_are_not_believed_about_pairs() -> None:
    # Eight independent states, five sequences: F is singular, and sets of states seem to cost nothing.
    generator = torch.Generator().manual_seed(0)
    few = MaskFisher.of(torch.randn(5, 1, 8, dtype=torch.float64, generator=generator))
    many = MaskFisher.of(torch.randn(100000, 1, 8, dtype=torch.float64, generator=generator))
    assert few.shrinkage() > 0.5
    bare = torch.linalg.eigvalsh(few.F.flatten(2).flatten(0, 1))
    assert float(bare[0]) < 1e-12
    assert float(torch.linalg.eigvalsh(few.shrunk())[0]) > 0.01
    assert MaskFisher.of(torch.randn(1, 1, 8)).shrinkage() == 1.0
    torch.testing.assert_close(many.shrunk(), torch.eye(8, dtype=torch.float64), atol=0.03, rtol=0)
    # Correlated ones, many sequences: what is seen is believed.
    assert MaskFisher.of(scores(0, 100000, 1, 8)).shrinkage() < 0.01


def test_shrinkage_has_the_least_expected_error() -> None:
    # Over many draws of twelve sequences: the estimated alpha is near the one with the least squared error.
    mixing = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = mixing @ mixing.T
    generator, alphas, errors = torch.Generator().manual_seed(2), [], torch.zeros(21, dtype=torch.float64)
    for _ in range(400):
        g = torch.randn(12, 6, dtype=torch.float64, generator=generator) @ mixing.T
        fisher = MaskFisher.of(g[:, None])
        alphas.append(fisher.shrinkage())
        F = fisher.F.flatten(2).flatten(0, 1)
        for index, alpha in enumerate(torch.linspace(0, 1, 21)):
            errors[index] += ((1 - alpha) * F + alpha * torch.diag(F.diagonal()) - truth).square().sum()
    best = float(errors.argmin()) / 20
    assert abs(sum(alphas) / len(alphas) - best) < 0.15


def test_sums_add_up_and_fade() -> None:
    g = scores(3, 12, 2, 3)
    whole, parts = MaskFisher.of(g), [MaskFisher.of(part) for part in g.split(4)]
    summed = parts[0].plus(parts[1]).plus(parts[2])
    for name, value in whole.tensors().items():
        torch.testing.assert_close(summed.tensors()[name], value)
    faded = parts[0].plus(parts[1], 0.5)
    torch.testing.assert_close(faded.F, (0.5 * parts[0].products + parts[1].products) / 6)
    assert float(faded.weights) == 5


@given(seed=st.integers(0, 10**6), groups=st.integers(1, 3), n=st.integers(1, 6), sequences=st.integers(1, 12))
def test_any_selection_is_whole_and_its_damage_no_less_than_nothing(
    seed: int, groups: int, n: int, sequences: int
) -> None:
    fisher = MaskFisher.of(scores(seed, sequences, groups, n))
    for states in range(1, n + 1):
        found = select_by_fisher(fisher, states, gains=bool(seed % 2))
        assert found.kept.shape == found.gains.shape == (groups, states)
        assert all(len(set(row)) == states and row == sorted(row) for row in found.kept.tolist())
        assert found.damage >= 0
        assert bool(found.gains.isfinite().all())


@pytest.mark.parametrize("takes_over", ["nobody", "gains", "least_squares"])
def test_the_reduction_selects_and_says_what_to_expect(takes_over: Any) -> None:
    signals = random_signals(0, batch=4, length=30, d=4, n=5, groups=2)
    seen = moments(signals)
    fisher = MaskFisher.of(scores(2, 300, 2, 5))
    reduction = reduce_by_fisher(fisher, 3, seen, takes_over)
    assert reduction.kept is not None
    estimate = reduction.estimate
    assert isinstance(estimate, MaskEstimate)
    selection = select_by_fisher(fisher, 3, gains=takes_over == "gains")
    assert torch.equal(reduction.kept, selection.kept)
    assert estimate.predicted_damage == selection.damage > 0
    for g in range(2):
        expected = torch.eye(5, dtype=torch.float64)[selection.kept[g]]
        assert torch.equal(reduction.into[g], expected)
        if takes_over == "least_squares":
            P = seen.P[g] / seen.tokens
            assert torch.equal(reduction.out[g], compensation((P + P.mT) / 2, selection.kept[g]))
        else:
            assert torch.equal(reduction.out[g], expected * selection.gains[g][:, None])
    # tr W (I - out^T into) P (I - out^T into)^T, summed over groups
    lost = total = 0.0
    for g in range(2):
        P, W = seen.P[g] / seen.tokens, seen.W[g] / seen.tokens
        rest = torch.eye(5, dtype=torch.float64) - reduction.out[g].T @ reduction.into[g]
        lost, total = lost + float(torch.trace(W @ rest @ P @ rest.T)), total + float(torch.trace(W @ P))
    assert estimate.relative_error == pytest.approx((lost / total) ** 0.5)
    assert json.loads(json.dumps(estimate.to_dict(), allow_nan=False))["shrinkage"] == fisher.shrinkage()
    with pytest.raises(InvalidSystemError, match="observe both"):
        reduce_by_fisher(MaskFisher.of(scores(2, 30, 2, 4)), 3, seen)


def test_bad_arguments_are_refused() -> None:
    fisher = MaskFisher.of(scores(0, 9, 1, 4))
    with pytest.raises(InvalidRankRuleError, match="at least 1"):
        select_by_fisher(fisher, 0)
    with pytest.raises(InvalidSystemError, match="must be finite"):
        select_by_fisher(replace(fisher, products=fisher.products * torch.nan), 2)
    with pytest.raises(InvalidSystemError, match="0 sequences"):
        select_by_fisher(replace(fisher, sequences=torch.zeros(())), 2)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_factors_and_states_do_not_depend_on_the_unit_of_the_loss(scale: float) -> None:
    g = scores(5, 4000, 2, 5)
    one, other = (select_by_fisher(MaskFisher.of(x), 3, gains=True) for x in (g, scale * g))
    assert torch.equal(one.kept, other.kept)
    torch.testing.assert_close(other.gains, one.gains, rtol=1e-6, atol=1e-6)
    assert other.damage == pytest.approx(scale**2 * one.damage, rel=1e-6)
