from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from compressm.errors import InvalidRankRuleError
from compressm.theory.recurrence import SelectiveBalancing, balance_selective, moments
from compressm.theory.selection import (
    _MODELS,
    compensation,
    reduce_selective,
    select_by_removal,
    select_with_compensation,
)
from helpers import random_signals


def random_moment(seed: int, n: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, rank or n, dtype=torch.float64, generator=generator)
    scale = torch.logspace(-2, 1, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    return (scale[:, None] * factor) @ (scale[:, None] * factor).mT


def power(W: torch.Tensor, P: torch.Tensor, out: torch.Tensor, kept: tuple[int, ...]) -> float:
    rest = np.eye(len(P)) - np.asarray(out).T @ np.eye(len(P))[list(kept)]
    return float(np.trace(W.numpy() @ rest @ P.numpy() @ rest.T))


def best_by_lstsq(P: torch.Tensor, kept: tuple[int, ...]) -> np.ndarray:
    """The map that recovers all states from the kept ones, by least squares on samples with this covariance."""
    samples = np.linalg.cholesky(P.numpy() + 1e-12 * np.eye(len(P)))  # columns are samples
    return np.linalg.lstsq(samples[list(kept)].T, samples.T, rcond=None)[0]


@pytest.mark.parametrize("seed", range(6))
def test_compensation_is_least_squares(seed: int) -> None:
    P = random_moment(seed, 6)
    np.testing.assert_allclose(
        compensation(P, torch.tensor([0, 2, 5])).numpy(), best_by_lstsq(P, (0, 2, 5)), rtol=0.02, atol=1e-2
    )  # the ridge of 1e-6 meets correlations close to 1


@pytest.mark.parametrize("seed", range(12))
def test_selection_is_as_good_as_the_best_of_all_subsets(seed: int) -> None:
    P, W = random_moment(seed, 7), random_moment(seed + 100, 7)
    for states in (2, 4):
        chosen = tuple(select_with_compensation(P, W, states).tolist())
        errors = {s: power(W, P, torch.from_numpy(best_by_lstsq(P, s)), s) for s in combinations(range(7), states)}
        # Exchanges end in a local optimum. It is nearly always the global one.
        assert errors[chosen] <= 1.5 * min(errors.values())
        identity = torch.eye(7, dtype=torch.float64)
        plain = {s: power(W, P, identity[list(s)], s) for s in combinations(range(7), states)}
        assert plain[tuple(select_by_removal(W * P, states).tolist())] <= 1.5 * min(plain.values())


def test_both_selections_find_the_optimum_most_of_the_time() -> None:
    hits = 0
    for seed in range(20):
        P, W = random_moment(seed, 7), random_moment(seed + 100, 7)
        errors = {s: power(W, P, torch.from_numpy(best_by_lstsq(P, s)), s) for s in combinations(range(7), 3)}
        hits += errors[tuple(select_with_compensation(P, W, 3).tolist())] <= min(errors.values()) * (1 + 1e-6)
    assert hits >= 16


@given(seed=st.integers(0, 1000), n=st.integers(1, 8), groups=st.integers(1, 2), selection=st.sampled_from(
    ["hankel", "least_squares", "gramians", "magnitude", "random", "means"]), folds_out=st.booleans())  # fmt: skip
def test_every_selection_keeps_as_many_distinct_states_as_asked(
    seed: int, n: int, groups: int, selection: str, folds_out: bool
) -> None:
    balancing = balance_selective(moments(random_signals(seed, d=2 * groups, n=n, groups=groups, length=6)))
    for states in {1, (n + 1) // 2, n}:
        found = reduce_selective(balancing, states, folds_out=folds_out, selection=selection)  # type: ignore[arg-type]
        assert found.kept is not None
        assert found.kept.shape == (groups, states)
        assert (found.kept.diff(dim=1) > 0).all()
        assert found.estimate.valid
        if states == n:
            eye = torch.eye(n, dtype=torch.float64).expand(groups, n, n)
            assert torch.equal(found.into, eye)
            assert torch.equal(found.out, eye)
            assert found.estimate.relative_error == 0


def test_one_decay_for_all_states_is_cut_exactly() -> None:
    balancing = balance_selective(moments(random_signals(5, d=4, n=6, groups=2, scalar_decay=True)))
    for states in (1, 3, 5):
        found = reduce_selective(balancing, states, folds_into=True)
        assert found.kept is None
        # Eckart-Young: no map of rank r does better than the discarded Hankel singular values.
        assert found.estimate.relative_error == pytest.approx(found.estimate.least_error, rel=1e-6)
        selected = reduce_selective(balancing, states)
        assert selected.estimate.relative_error >= found.estimate.relative_error * (1 - 1e-9)
        eye = torch.eye(states, dtype=torch.float64).expand(2, -1, -1)
        torch.testing.assert_close(found.into @ found.out.mT, eye)


def test_outputs_to_come_are_what_the_error_of_a_state_does_to_them_over_time() -> None:
    balancing = balance_selective(moments(random_signals(3, d=2, n=5)))
    P, W = _MODELS["hankel"](balancing, 0)
    rates = (balancing.moments.rates[0] / balancing.moments.tokens).numpy()
    error = np.random.default_rng(0).standard_normal(5)

    def squared_output(time: float) -> float:  # expected, with output vectors of the second moment W
        left = np.exp(-rates * time) * error
        return float(left @ balancing.W[0].numpy() @ left)

    to_come = quad(squared_output, 0, np.inf, epsabs=0, epsrel=1e-10)[0]
    assert float(error @ W.numpy() @ error) == pytest.approx(to_come, rel=1e-8)
    torch.testing.assert_close(P, balancing.P[0])


def test_of_two_states_that_are_alike_now_the_slower_is_kept() -> None:
    m = moments(random_signals(0, d=1, n=2))
    even = replace(m, P=torch.eye(2).double()[None], W=torch.eye(2).double()[None])
    for fast, slow in ((0, 1), (1, 0)):
        rates = torch.ones(1, 2, dtype=torch.float64)
        rates[0, fast] = 3.0
        kept = reduce_selective(balance_selective(replace(even, rates=rates * m.tokens)), 1).kept
        assert kept is not None
        assert kept.tolist() == [[slow]]


def test_dead_and_dependent_states_do_no_harm() -> None:
    P, W = random_moment(0, 6, rank=2), random_moment(1, 6)
    P[3], P[:, 3] = 0, 0
    W[4], W[:, 4] = 0, 0
    for states in range(1, 7):
        kept = select_with_compensation(P, W, states)
        assert len(set(kept.tolist())) == states
        assert torch.isfinite(compensation(P, kept)).all()
    assert 3 not in select_with_compensation(P, W, 2)
    zero = SelectiveBalancing(0 * P[None], 0 * W[None], torch.zeros(1, 6), moments(random_signals(0, n=6)))
    assert reduce_selective(zero, 3).estimate.relative_error == 0


def test_unfit_arguments_are_named() -> None:
    balancing = balance_selective(moments(random_signals(0)))
    with pytest.raises(InvalidRankRuleError, match="states must be at least 1; got 0"):
        reduce_selective(balancing, 0)
    with pytest.raises(InvalidRankRuleError, match=r"selection must be one of hankel, .*got 'best'"):
        reduce_selective(balancing, 1, selection="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("selection", ["hankel", "least_squares"])
def test_the_maps_that_a_layer_can_take_are_used_by_both_kinds_of_error(selection: str) -> None:
    """Any map, rotations, or a choice of states; the comparisons always choose states."""
    P, W = random_moment(0, 5)[None], random_moment(1, 5)[None]
    balancing = balance_selective(replace(moments(random_signals(0, n=5)), P=P, W=W, tokens=torch.tensor(1.0)))
    values = balancing.hsv[0]
    any_map = reduce_selective(balancing, 2, True, selection=selection)  # type: ignore[arg-type]
    assert any_map.kept is None
    assert any_map.discarded is not None
    torch.testing.assert_close(any_map.discarded[0], values[2:].sum(), rtol=1e-6, atol=0)
    rotated = reduce_selective(balancing, 2, selection=selection, rotates=True)  # type: ignore[arg-type]
    assert rotated.kept is None
    torch.testing.assert_close(rotated.into @ rotated.into.mT, torch.eye(2, dtype=torch.float64)[None])
    projected = reduce_selective(balancing, 2, folds_out=False, selection=selection, rotates=True)  # type: ignore[arg-type]
    torch.testing.assert_close(projected.out, projected.into)
    # The readout is the least squares estimate of the states from their coordinates.
    basis = rotated.into[0].numpy()
    best = np.linalg.solve(basis @ P[0].numpy() @ basis.T, basis @ P[0].numpy())
    np.testing.assert_allclose(rotated.out[0].numpy(), best, atol=1e-4 * abs(best).max())
    chosen = reduce_selective(balancing, 2, selection=selection)  # type: ignore[arg-type]
    assert chosen.kept is not None
    for made in (rotated, chosen):
        assert made.discarded is not None
        assert float(made.discarded[0]) >= float(any_map.discarded[0])
    for other in ("gramians", "magnitude", "random", "means"):
        for maps in ({"folds_into": True}, {"rotates": True}):
            assert reduce_selective(balancing, 2, selection=other, **maps).kept is not None  # type: ignore[arg-type]
    # At full order nothing is mapped.
    for maps in ({"folds_into": True}, {"rotates": True}, {}):
        whole = reduce_selective(balancing, 9, selection=selection, **maps)  # type: ignore[arg-type]
        assert torch.equal(whole.into, torch.eye(5, dtype=torch.float64)[None])


def test_the_error_of_a_cut_is_the_lost_share_of_the_outputs_power() -> None:
    balancing = balance_selective(moments(random_signals(4, d=4, n=5, groups=2)))
    P, W = balancing.P.numpy(), balancing.W.numpy()
    for selection in ("hankel", "gramians", "means"):
        found = reduce_selective(balancing, 3, selection=selection)  # type: ignore[arg-type]
        lost = total = discarded = 0.0
        for g in range(2):
            rest = np.eye(5) - found.out[g].numpy().T @ found.into[g].numpy()
            lost, total = lost + np.trace(W[g] @ rest @ P[g] @ rest.T), total + np.trace(W[g] @ P[g])
            roots = [np.linalg.cholesky(one[g]) for one in (W, P)]
            sigma = np.linalg.svd(roots[0].T @ rest @ roots[1], compute_uv=False).sum()
            assert found.discarded is not None
            assert float(found.discarded[g]) == pytest.approx(sigma, rel=1e-6)
            discarded += sigma
        estimate = found.estimate
        assert (estimate.states_before, estimate.states_after, estimate.failures) == (5, 3, ())
        assert estimate.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-6)
        least = float(balancing.hsv[:, 3:].square().sum())
        assert estimate.least_error == pytest.approx((least / total) ** 0.5, rel=1e-6)
        assert estimate.energy_kept == pytest.approx(max(0.0, 1 - discarded / float(balancing.hsv.sum())))
        assert estimate.errors() == (estimate.relative_error, None, None)
        assert estimate.to_dict()["failures"] == []


def test_maps_that_are_not_finite_fail_and_discard_everything() -> None:
    P, W = random_moment(0, 4), random_moment(1, 4)
    P[0, 1] = P[1, 0] = torch.nan
    broken = SelectiveBalancing(P[None], W[None], torch.ones(1, 4).double(), moments(random_signals(0, n=4)))
    found = reduce_selective(broken, 2)
    assert found.estimate.failures == ("the maps are not finite",)
    assert not found.estimate.valid
    assert found.discarded is not None
    assert found.discarded.tolist() == [torch.inf]
