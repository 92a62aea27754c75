"""Every published way to pick states, held against its formula and a search through all subsets."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from test_recurrence import brute_force
from test_selection import random_moment

from compressm.adapters.linear_attention import DeltaNetAdapter
from compressm.layers import DeltaNet
from compressm.theory.balancing import balance, truncate
from compressm.theory.pruning import Score, prune
from compressm.theory.recurrence import SelectiveBalancing, Signals, balance_selective, moments
from compressm.theory.selection import reduce_selective, select_by_removal, select_with_compensation, subspace
from helpers import random_signals, random_system, real_matrices

N, SEEDS = 5, range(12)


def signals(seed: int) -> Signals:
    """Vectors with a mean of their own, states of very different rates."""
    plain = random_signals(seed, batch=2, length=25, d=3, n=N)
    generator = torch.Generator().manual_seed(seed + 500)
    b, c = (2 * torch.randn(N, generator=generator) for _ in range(2))
    rates = torch.logspace(-1.5, 1, N)[torch.randperm(N, generator=generator)] * (1 + torch.rand(3, N))
    return replace(plain, B=plain.B + b, C=plain.C + c, rates=rates)


def by_subsets(P: np.ndarray, W: np.ndarray, states: int, folds_out: bool) -> tuple[int, ...]:
    """The subset with the least error ``tr W R``, R what is left of P, by trying all of them.

    R is the Schur complement where the output map may take over the work of the states that go, and otherwise what
    these states themselves contribute.
    """

    def error(kept: tuple[int, ...]) -> float:
        gone = [i for i in range(len(P)) if i not in kept]
        if not folds_out:
            return float((W * P)[np.ix_(gone, gone)].sum())
        inner, across = P[np.ix_(kept, kept)], P[list(kept)]
        return float(np.trace(W @ (P - across.T @ np.linalg.lstsq(inner, across, rcond=1e-9)[0])))

    return min(combinations(range(len(P)), states), key=error)


def kept_by(balancing: SelectiveBalancing, selection: Any, folds_out: bool = True, states: int = 2) -> tuple[int, ...]:
    kept = reduce_selective(balancing, states, folds_out=folds_out, selection=selection).kept
    assert kept is not None
    return tuple(kept[0].tolist())


def mean_parts(s: Signals) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over tokens of B and C, and over channels of the rates."""
    B, C = (vectors[:, :, 0].double().mean((0, 1)).numpy() for vectors in (s.B, s.C))
    return B, C, s.rates.double().mean(0).numpy()


def moments_of(s: Signals) -> tuple[np.ndarray, np.ndarray]:
    """P and W per token, channel by channel in a float64 loop."""
    P, W = brute_force(s)
    tokens = s.x.shape[0] * s.x.shape[1]
    return P[0] / tokens, W[0] / tokens


@pytest.mark.parametrize("folds_out", [True, False])
@pytest.mark.parametrize("selection", ["hankel", "least_squares"])
def test_states_are_kept_for_the_outputs_to_come_or_the_present_one(selection: str, folds_out: bool) -> None:
    found = differ = 0
    for seed in SEEDS:
        s = signals(seed)
        P, W = moments_of(s)
        rates = mean_parts(s)[2]
        # Integrated over all time to come, the error in the entries i and j decays at the sum of their rates.
        to_come = W / (rates[:, None] + rates)
        wanted = {"hankel": to_come, "least_squares": W}
        best = {name: by_subsets(P, weight, 2, folds_out) for name, weight in wanted.items()}
        found += kept_by(balance_selective(moments(s)), selection, folds_out) == best[selection]
        differ += best["hankel"] != best["least_squares"]
    assert found >= len(SEEDS) - 1  # an exchange may end in a local optimum
    assert differ >= 3  # so that one is not taken for the other


@pytest.mark.parametrize("folds_out", [True, False])
def test_means_are_the_time_invariant_system_of_the_mean_vectors(folds_out: bool) -> None:
    differ = 0
    for seed in SEEDS:
        s = signals(seed)
        b, c, rates = mean_parts(s)
        # Gramians of dh/dt = -diag(rates) h + b u, y = c h: the integrals of exp(-(a_i + a_j) t) b_i b_j.
        sums = rates[:, None] + rates
        best = by_subsets(np.outer(b, b) / sums, np.outer(c, c) / sums, 2, folds_out)
        balancing = balance_selective(moments(s))
        assert kept_by(balancing, "means", folds_out) == best, seed
        differ += best != kept_by(balancing, "hankel", folds_out)
    assert differ >= 3


@pytest.mark.parametrize("states", [1, 2, 4])
def test_empirical_gramians_keep_the_largest_products_of_their_diagonals(states: int) -> None:
    for seed in SEEDS:
        s = signals(seed)
        P, W = moments_of(s)
        best = np.sort(np.argsort(-np.diag(P) * np.diag(W))[:states])
        balancing = balance_selective(moments(s))
        assert kept_by(balancing, "gramians", states=states) == tuple(best)
        found = reduce_selective(balancing, states, selection="gramians")
        assert torch.equal(found.out, found.into)  # for comparison: C is not mapped


@pytest.mark.parametrize("states", [1, 2, 4])
def test_magnitude_keeps_the_largest_means_of_b_and_c_over_the_rate(states: int) -> None:
    differ = 0
    for seed in SEEDS:
        s = signals(seed)
        b, c, rates = mean_parts(s)
        best = tuple(np.sort(np.argsort(-np.abs(b) * np.abs(c) / rates)[:states]))
        balancing = balance_selective(moments(s))
        assert kept_by(balancing, "magnitude", states=states) == best
        differ += best != kept_by(balancing, "gramians", states=states)
    assert differ >= 2


def test_random_states_are_drawn_evenly_and_alike_from_the_same_data() -> None:
    counts = np.zeros(N)
    for seed in range(150):
        plain = random_signals(seed, length=4, d=1, n=N)
        loud = torch.logspace(1, -1, N)  # by any score the first states would stay
        balancing = balance_selective(moments(replace(plain, B=loud * plain.B, C=loud * plain.C)))
        kept = kept_by(balancing, "random")
        assert kept == kept_by(balancing, "random")
        counts[list(kept)] += 1
    assert counts.sum() == 300
    assert 40 <= counts.min() <= counts.max() <= 80  # 60 each, with a standard deviation of 6


@pytest.mark.parametrize("score", ["modal", "hinf", "energy"])
@pytest.mark.parametrize("real_output", [True, False])
def test_pruning_keeps_the_modes_with_the_largest_published_score(score: Score, real_output: bool) -> None:
    for seed in range(3):
        system = random_system(seed, n=6, radius=(0.2, 0.9), real_output=real_output)
        lam, B, C = (x.numpy() for x in (system.lam, system.B, system.C))
        powers = lam[:, None] ** np.arange(200)
        values = np.zeros(6)
        gains = np.zeros(6)
        for i in range(6):
            mode = np.outer(C[:, i], B[i])  # its impulse response is lam^k times this matrix
            omega = np.linspace(-np.pi, np.pi, 1001)
            response = np.abs((powers[i] * np.exp(-1j * np.outer(omega, np.arange(200)))).sum(1)).max()
            gains[i] = response * np.linalg.norm(mode, 2)
            values[i] = {
                "modal": abs(lam[i]),
                "hinf": gains[i],
                "energy": (np.abs(powers[i]) ** 2).sum() * np.linalg.norm(mode, "fro") ** 2,
            }[score]
        for states in (1, 3, 5):
            best = np.sort(np.argsort(-values)[:states])
            reduction = prune(system, states, score)
            np.testing.assert_array_equal(reduction.system.lam.numpy(), lam[best])
            gone = [i for i in range(6) if i not in best]
            assert reduction.certificate.bound == pytest.approx(gains[gone].sum(), rel=2e-3)


def test_the_three_scores_are_not_the_same() -> None:
    systems = [random_system(seed, n=6, radius=(0.2, 0.9)) for seed in range(6)]
    scores: list[Score] = ["modal", "hinf", "energy"]
    for first, second in combinations(scores, 2):
        pairs = [[prune(system, 3, score).system.lam for score in (first, second)] for system in systems]
        assert any(not torch.equal(*pair) for pair in pairs), (first, second)


@pytest.mark.parametrize("states", [1, 3, 6])
def test_the_smallest_and_random_balanced_states_discard_what_they_leave_out(states: int) -> None:
    """The CompreSSM paper's comparisons: other parts of the balanced system than the first."""
    for seed in range(4):
        system = random_system(seed, n=8, radius=(0.5, 0.95), real_output=False)
        A = np.diag(system.lam.numpy())
        P = np.linalg.solve(np.eye(64) - np.kron(A, A.conj()), (system.B @ system.B.mH).numpy().reshape(-1))
        Q = np.linalg.solve(np.eye(64) - np.kron(A.conj(), A), (system.C.mH @ system.C).numpy().reshape(-1))
        values = np.sort(np.sqrt(np.linalg.eigvals(P.reshape(8, 8) @ Q.reshape(8, 8)).real))[::-1]
        balancing = balance(system, "complex")
        np.testing.assert_allclose(balancing.hsv.numpy(), values, rtol=1e-8)
        bounds = {
            order: truncate(balancing.rearranged(order), states).certificate.bound  # type: ignore[arg-type]
            for order in ("smallest", "random")
        }
        assert bounds["smallest"] == pytest.approx(2 * values[: 8 - states].sum())
        subsets = [2 * values[list(gone)].sum() for gone in combinations(range(8), 8 - states)]
        assert min(abs(bounds["random"] - one) for one in subsets) < 1e-9 * values.sum()


def test_the_real_method_has_two_values_per_state_of_the_order_2n_system() -> None:
    system = random_system(1, n=5)
    A, B, C = real_matrices(system)
    P = np.linalg.solve(np.eye(100) - np.kron(A, A), (B @ B.T).reshape(-1)).reshape(10, 10)
    Q = np.linalg.solve(np.eye(100) - np.kron(A.T, A.T), (C.T @ C).reshape(-1)).reshape(10, 10)
    values = np.sort(np.sqrt(np.linalg.eigvals(P @ Q).real))[::-1]
    np.testing.assert_allclose(balance(system).hsv.numpy(), values, rtol=1e-8)
    smallest = truncate(balance(system).rearranged("smallest"), 2, exceed=True).certificate
    assert smallest.bound == pytest.approx(2 * values[:6].sum())


def least_squares_error(P: torch.Tensor, W: torch.Tensor, kept: tuple[int, ...]) -> float:
    inner, across = P.numpy()[np.ix_(kept, kept)], P.numpy()[list(kept)]
    return float(np.trace(W.numpy() @ (P.numpy() - across.T @ np.linalg.solve(inner, across))))


@pytest.mark.parametrize(("seed", "states"), [(25, 4), (39, 4)])
def test_exchanges_mend_what_greed_got_wrong(seed: int, states: int) -> None:
    # Systems in which the states that are best one after the other are not the best together.
    P, W = random_moment(seed, 7), random_moment(seed + 100, 7)
    greedy: tuple[int, ...] = ()
    for _ in range(states):
        greedy = min(
            (tuple(sorted((*greedy, j))) for j in range(7) if j not in greedy),
            key=lambda kept: least_squares_error(P, W, kept),
        )
    best = min(combinations(range(7), states), key=lambda kept: least_squares_error(P, W, kept))
    assert least_squares_error(P, W, greedy) > 1.15 * least_squares_error(P, W, best)
    assert tuple(select_with_compensation(P, W, states).tolist()) == best


@pytest.mark.parametrize(("seed", "states"), [(0, 2), (10, 2), (24, 2), (28, 3), (35, 1)])
def test_exchanges_mend_removals_too(seed: int, states: int) -> None:
    # Contributions of states that cancel each other, which removing one after the other cannot see.
    generator = torch.Generator().manual_seed(seed)
    f, c = (torch.randn(5, rank, dtype=torch.float64, generator=generator) for rank in (3, 2))
    P, W = f @ f.mT + 0.1 * torch.eye(5, dtype=torch.float64), c @ c.mT

    def cost(kept: tuple[int, ...]) -> float:
        gone = [i for i in range(5) if i not in kept]
        return float((W * P)[gone][:, gone].sum())

    greedy = tuple(range(5))
    while len(greedy) > states:
        greedy = min((tuple(i for i in greedy if i != j) for j in greedy), key=cost)
    best = min(combinations(range(5), states), key=cost)
    assert cost(greedy) > 1.4 * cost(best)
    assert tuple(select_by_removal(W * P, states).tolist()) == best


def least_projection_error(P: np.ndarray, W: np.ndarray, states: int, starts: int = 4) -> float:
    """The least ``tr W Z P Z`` over projections Z onto ``n - states`` dimensions, by gradients from random starts."""
    n = len(P)

    def error(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kept = torch.tensor(flat.reshape(n, states), requires_grad=True)
        basis = torch.linalg.qr(kept)[0]
        rest = torch.eye(n, dtype=torch.float64) - basis @ basis.mT
        value = (torch.from_numpy(W) * (rest @ torch.from_numpy(P) @ rest)).sum()
        value.backward()
        return value.item(), kept.grad.numpy().ravel()  # type: ignore[union-attr]

    draws = np.random.default_rng(0)
    return min(
        minimize(error, draws.standard_normal(n * states), jac=True, options={"maxiter": 200}).fun
        for _ in range(starts)
    )


def spread_moment(seed: int, n: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, n, dtype=torch.float64, generator=generator)
    scale = torch.logspace(-1, 0.5, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    return (scale[:, None] * factor) @ (scale[:, None] * factor).mT


@pytest.mark.parametrize("seed", [2, 4, 7, 10])
def test_a_subspace_is_nearly_the_best_there_is(seed: int) -> None:
    # In these the eigenvectors that the search starts from are far from it: by half, and tenfold.
    P, W = spread_moment(seed), spread_moment(seed + 50)
    basis = subspace(P, W, 2)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(2, dtype=torch.float64))
    rest = torch.eye(5, dtype=torch.float64) - basis @ basis.mT
    made = float((W @ rest @ P @ rest).trace())
    assert made <= 1.15 * least_projection_error(P.numpy(), W.numpy(), 2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("states", [2, 4])
def test_the_directions_of_a_delta_net_are_within_five_percent_of_the_best(states: int, gated: bool) -> None:
    for seed in (0, 2):
        torch.manual_seed(seed)
        layer = DeltaNet(16, 8, 2, gated=gated).double()
        u = torch.randn(4, 60, 16, dtype=torch.float64).cumsum(1) / 5
        with torch.no_grad():
            balancing = balance_selective(moments(DeltaNetAdapter().signals(layer, u)))
        found = reduce_selective(balancing, states, folds_out=False, rotates=True)
        for g in range(2):
            P, W = balancing.P[g].numpy(), balancing.W[g].numpy()
            rest = np.eye(8) - found.out[g].numpy().T @ found.into[g].numpy()
            made = float(np.trace(W @ rest @ P @ rest.T))
            assert made <= 1.05 * least_projection_error(P, W, states, starts=2)
