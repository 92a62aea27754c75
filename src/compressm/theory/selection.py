"""Which states of a selective recurrence to keep, and how C compensates for the removed ones.

The states of S6 decay at different rates. A mixture of them is no longer a plain recurrence, so ``into`` selects a set
S of old states. The best linear estimate of all states from the kept ones is ``h = P_{:S} P_SS^-1 h_S``, hence ``out =
P_SS^-1 P_S:`` is the least squares solution. The Schur complement R is the part of P that the kept states do not
explain, and it gives the error:

    error^2 = tr W R,    R = P - P_{:S} P_SS^-1 P_{S:}

Adding state j lowers the squared error by ``(R W R)_jj / R_jj``. States are picked greedily by this gain, and then
exchanged one at a time while the error falls: orthogonal least squares (Chen, Billings, Luo 1989) with a weight.

With ``W = E[C C^T]`` this is the error of the present output. A Hankel operator weighs all future outputs. After a
time t of operational time, ``exp(-(a_i + a_j) t)`` of the product of entries i and j is left. The error summed over
time therefore has ``W_ij / (a_i + a_j)`` in place of ``W_ij``, which gives slowly decaying states more weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError
from compressm.runtime.random_state import generator_from
from compressm.theory.recurrence import ErrorEstimate, SelectiveBalancing, SelectiveReduction, removal_costs, root

Selection = Literal[
    "hankel", "least_squares", "means", "gramians", "magnitude", "random", "smallest", "modal", "hinf", "energy",
    "random_modes",
]  # fmt: skip

# The moments are gathered in float32. The ridge keeps the least squares solution from amplifying their rounding.
RIDGE = 1e-6
EXCHANGES = 10
SUBSPACE_STEPS = 20


def reduce_selective(
    balancing: SelectiveBalancing,
    states: int,
    folds_into: bool = False,
    folds_out: bool = True,
    selection: Selection = "hankel",
    *,
    rotates: bool = False,
) -> SelectiveReduction:
    """Reduce a selective recurrence to ``states`` states.

    Args:
        balancing: its moments.
        states: how many to keep, from 1 to n.
        folds_into, folds_out, rotates: which maps the layer can take; see `SelectiveAdapter`.
        selection: how states are picked: by the error of all future outputs (``"hankel"``) or of the present one
            (``"least_squares"``), see the module's text. Without ``folds_out`` the removed states are those with the
            least joint contribution, ``sum_ij (W * P)_ij`` over them. The others are for comparison. ``"gramians"``
            keeps the largest ``W_jj P_jj`` (the diagonals of empirical Gramians), ``"magnitude"`` the largest B and C,
            and ``"random"`` draws; these three do not map C. ``"means"`` replaces B and C by their means over the data,
            as the CompreSSM paper does, and then proceeds as ``"hankel"``.

    Raises:
        InvalidRankRuleError: fewer than one state asked for, or an unknown selection.
    """
    groups, n = balancing.P.shape[:2]
    if states < 1:
        raise InvalidRankRuleError(f"states must be at least 1; got {states}")
    if selection not in (known := (*_MODELS, *_SCORES)):
        raise InvalidRankRuleError(f"selection must be one of {', '.join(known)}; got {selection!r}")
    states = min(states, n)
    if rotates and selection in ("hankel", "least_squares") and states < n:
        pairs = [_present(balancing, g) for g in range(groups)]
        bases = [subspace(P, W, states) for P, W in pairs]
        reads = [readout(P, basis) if folds_out else basis.mT for (P, _), basis in zip(pairs, bases, strict=True)]
        return reduction_by_maps(balancing, torch.stack(bases).mT, torch.stack(reads), None)
    if folds_into and selection in ("hankel", "least_squares") and states < n:
        into, out = _balanced_maps(balancing, states)
        return reduction_by_maps(balancing, into, out, None)
    kept, out, costs = [], [], removal_costs(balancing)
    for g in range(groups):
        if selection in _SCORES:
            kept.append(by_score(balancing, selection, g)[:states].sort().values)
            out.append(torch.eye(n, dtype=torch.float64)[kept[-1]])
            continue
        P, W = _MODELS[selection](balancing, g)
        power = removal_power(balancing, selection, g, costs)
        kept.append(select_with_compensation(P, W, states) if folds_out else select_by_removal(power, states))
        out.append(compensation(P, kept[-1]) if folds_out else torch.eye(n, dtype=torch.float64)[kept[-1]])
    chosen = torch.stack(kept)
    return reduction_by_maps(balancing, torch.eye(n, dtype=torch.float64)[chosen], torch.stack(out), chosen)


def is_score(selection: Selection) -> bool:
    """Whether a selection ranks the states by one number each."""
    return selection in _SCORES


def scores(balancing: SelectiveBalancing, selection: Selection) -> Tensor:
    """The scores of all states, shape ``(groups, n)``, for the selections that have one."""
    return _SCORES[selection](balancing)


def by_score(balancing: SelectiveBalancing, selection: Selection, group: int) -> Tensor:
    """The states of a group by a score, the best first, for the selections that have one."""
    return torch.argsort(-scores(balancing, selection)[group], stable=True)


def removal_power(balancing: SelectiveBalancing, selection: Selection, group: int, costs: Tensor | None) -> Tensor:
    """The joint contributions of a group's states to the output, for `select_by_removal`.

    Args:
        balancing: the moments.
        selection: one without a score.
        group: of B and C.
        costs: from `removal_costs`.
    """
    if costs is not None and selection != "means":
        return costs[group]
    P, W = _MODELS[selection](balancing, group)
    return W * P


def select_with_compensation(P: Tensor, W: Tensor, states: int) -> Tensor:
    """The states that recover the output best by least squares; see the module's text.

    Args:
        P, W: moments, symmetric positive semidefinite, float64, shape ``(n, n)``.
        states: how many, at most n.

    Returns:
        their indices, ascending.
    """
    n = P.shape[0]
    if states >= n:
        return torch.arange(n)
    chosen, R = list[int](), P
    for _ in range(states):
        j = int(_gains(P, R, W, chosen).argmax())
        chosen.append(j)
        R = _without(R, j, P)
    for _ in range(EXCHANGES):
        changed = False
        for position in range(states):
            rest = chosen[:position] + chosen[position + 1 :]
            gains = _gains(P, _schur(P, rest), W, rest)
            best = int(gains.argmax())
            if gains[best] > gains[chosen[position]] * (1 + 1e-6):
                chosen[position], changed = best, True
        if not changed:
            break
    return torch.tensor(sorted(chosen))


def _gains(P: Tensor, R: Tensor, W: Tensor, chosen: list[int]) -> Tensor:
    """By how much each state would lower the error; states that others determine rank last, chosen ones never count."""
    free = R.diagonal()
    gains = ((R @ W) * R).sum(1) / free.clamp_min(1e-300)
    gains = torch.where(free > RIDGE * P.diagonal(), gains, -1.0)
    gains[chosen] = -2.0
    return gains


def _without(R: Tensor, j: int, P: Tensor) -> Tensor:
    pivot = R[j, j].clamp_min(RIDGE * P[j, j])
    return R if float(pivot) <= 0 else R - torch.outer(R[:, j], R[j]) / pivot


def _schur(P: Tensor, chosen: list[int]) -> Tensor:
    if not chosen:
        return P
    kept = torch.tensor(chosen)
    return P - P[:, kept] @ compensation(P, kept)


def compensation(P: Tensor, kept: Tensor) -> Tensor:
    """``P_SS^-1 P_S:``, the map by which C compensates for the removed states, shape ``(r, n)``; the identity on kept
    states."""
    scale = P.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    unit = P / scale[:, None] / scale
    inner = unit[kept][:, kept] + RIDGE * torch.eye(kept.shape[0], dtype=P.dtype)
    out = torch.linalg.solve(inner, unit[kept]) / scale[kept][:, None] * scale
    out[:, kept] = torch.eye(kept.shape[0], dtype=P.dtype)
    return out


def select_by_removal(power: Tensor, states: int) -> Tensor:
    """The states to keep where C cannot compensate for the others: those removed have the least ``sum_ij power_ij``.

    Args:
        power: the joint contribution of states i and j to the output, ``E[C_i h_i C_j h_j]``, shape ``(n, n)``. It is
            ``W * P`` if states and output vectors are uncorrelated beyond their second moments.
        states: how many, at most n.

    Returns:
        their indices, ascending.
    """
    n = power.shape[0]
    gone = removal_order(power, n - states)
    for _ in range(EXCHANGES if 0 < len(gone) < n else 0):
        changed = False
        for position, j in enumerate(gone):
            others = torch.tensor(gone[:position] + gone[position + 1 :], dtype=torch.long)
            cost = (power.diagonal() + 2 * power[others].sum(0)).index_fill(0, others, torch.inf)
            best = int(cost.argmin())
            if cost[best] < cost[j] - 1e-6 * power.diagonal()[j].abs():
                gone[position], changed = best, True
        if not changed:
            break
    stays = torch.ones(n, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero()[:, 0]


def removal_order(power: Tensor, count: int) -> list[int]:
    """The first ``count`` states to remove, each the one that adds least to the error then.

    Args:
        power: as in `select_by_removal`.
        count: at most n.
    """
    gone, cost = list[int](), power.diagonal().clone()  # cost of removing each state after those already gone
    for _ in range(count):
        j = int(cost.index_fill(0, torch.tensor(gone, dtype=torch.long), torch.inf).argmin())
        gone.append(j)
        cost = cost + 2 * power[j]
    return gone


def subspace(P: Tensor, W: Tensor, states: int) -> Tensor:
    """Orthonormal basis of the subspace onto which states and output vectors are projected with the least error.

    With the projection Z onto the removed complement, the error is ``tr W Z P Z``: a convex quadratic function of Z
    with the gradient ``2 M``, ``M = sym(P Z W)``. Its linearisation at Z plus ``s |Z' - Z|^2``, with s large enough, is
    an upper bound. Among all projections ``Z'``, the one onto the eigenvectors of ``M - s Z`` with the smallest
    eigenvalues minimises that bound. The step is iterated, with a larger s whenever the error did not fall. It starts
    from the eigenvectors of ``sym(P W)``, ``P + c W``, P and W, and the best basis found is returned.

    Args:
        P, W: moments, symmetric positive semidefinite, float64, shape ``(n, n)``.
        states: how many, at most n.

    Returns:
        shape ``(n, states)``.
    """
    n, best = P.shape[0], (torch.inf, torch.eye(P.shape[0], dtype=P.dtype)[:, :states])
    balance = P.trace() / W.trace().clamp_min(1e-300)
    for start in (P @ W, P + balance * W, P, W):
        matrix, rest, least, shift = (start + start.mT) / 2, torch.zeros_like(P), torch.inf, torch.zeros(())
        for _ in range(SUBSPACE_STEPS):
            vectors = torch.linalg.eigh(matrix - shift * rest).eigenvectors
            new = vectors[:, : n - states] @ vectors[:, : n - states].mT
            error = float((W * (new @ P @ new)).sum())
            if error >= least:
                shift = 4 * shift
                continue
            best = min(best, (error, vectors[:, n - states :]), key=lambda seen: seen[0])
            half = P @ new @ W / 2
            matrix, shift = half + half.mT, shift / 1.5 if math.isfinite(least) else half.norm()
            rest, least = new, error
    return best[1].flip(-1)


def readout(P: Tensor, basis: Tensor) -> Tensor:
    """The map ``out = (U^T P U)^-1 U^T P``, for a subspace with orthonormal basis U.

    ``out^T U^T h`` is the best linear estimate of the state ``h`` from its coordinates ``U^T h``. On the subspace
    itself ``out`` equals ``U^T``.

    Args:
        P: second moment of the states, shape ``(n, n)``.
        basis: shape ``(n, r)``.

    Returns:
        shape ``(r, n)``.
    """
    inner = basis.mT @ P @ basis
    across = basis.mT @ P - inner @ basis.mT  # U^T P (I - U U^T)
    scale = inner.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    unit = inner / scale[:, None] / scale + RIDGE * torch.eye(inner.shape[0], dtype=P.dtype)
    return basis.mT + torch.linalg.solve(unit, across / scale[:, None]) / scale[:, None]


def _balanced_maps(balancing: SelectiveBalancing, states: int) -> tuple[Tensor, Tensor]:
    """Balanced truncation, exact where all states decay alike: ``into = s^-1/2 U^T L_W^T``, ``out = s^-1/2 V^T L_P^T``.
    Directions with ``s = 0`` become states with B = C = 0."""
    L_P, L_W = root(balancing.P), root(balancing.W)
    U, hsv, Vh = torch.linalg.svd(L_W.mT @ L_P)
    hsv = hsv[..., :states]
    sound = hsv > hsv[..., :1] * hsv.shape[-1] * torch.finfo(torch.float64).eps
    half = torch.where(sound, hsv.clamp_min(1e-300).rsqrt(), 0.0)[..., :, None]
    return half * (U[..., :states].mT @ L_W.mT), half * (Vh[..., :states, :] @ L_P.mT)


def reduction_by_maps(
    balancing: SelectiveBalancing, into: Tensor, out: Tensor, kept: Tensor | None
) -> SelectiveReduction:
    """The reduction by given maps, with its predicted error; see `SelectiveReduction`."""
    P, W, n = balancing.P, balancing.W, balancing.P.shape[-1]
    rest = torch.eye(n, dtype=torch.float64) - out.mT @ into
    power = float((W * P).sum())
    lost = float((W * (rest @ P @ rest.mT)).sum())
    least = float(balancing.hsv[..., into.shape[-2] :].square().sum())
    lost = max(lost, least)  # less than the least possible is rounding
    relative, bound = ((max(value, 0.0) / power) ** 0.5 if power > 0 else 0.0 for value in (lost, least))
    if kept is not None and (costs := removal_costs(balancing)) is not None:
        relative = _relative_cost(balancing, costs, kept)
        bound = min(bound, relative)
    failures = () if bool(torch.isfinite(into).all() and torch.isfinite(out).all()) else ("the maps are not finite",)
    discarded = _discarded(balancing, rest)
    energy = float(balancing.hsv.sum())
    share = max(0.0, 1 - float(discarded.sum()) / energy) if energy > 0 else 1.0
    estimate = ErrorEstimate(n, into.shape[-2], relative, bound, failures, energy_kept=share)
    return SelectiveReduction(into, out, kept, estimate, balancing.moments, discarded)


def _relative_cost(balancing: SelectiveBalancing, costs: Tensor, kept: Tensor) -> float:
    """The relative error of the output when all but the kept states, shape ``(groups, r)``, are removed."""
    gone = torch.ones_like(costs[..., 0]).scatter_(1, kept, 0.0)
    assert balancing.moments.reads is not None
    power = float(balancing.moments.reads.sum() / balancing.moments.tokens)
    lost = float((gone[:, :, None] * costs * gone[:, None, :]).sum())
    return (max(lost, 0.0) / power) ** 0.5 if power > 0 else 0.0


def _discarded(balancing: SelectiveBalancing, rest: Tensor) -> Tensor:
    """Hankel energy that a cut discards; see `SelectiveReduction.discarded`.

    Args:
        balancing: the moments.
        rest: ``I - out^T into``, shape ``(groups, n, n)``.
    """
    if not bool(rest.isfinite().all()):
        return torch.full_like(balancing.hsv[:, 0], torch.inf)
    return torch.linalg.svdvals(root(balancing.W).mT @ rest @ root(balancing.P)).sum(-1)


def _present(balancing: SelectiveBalancing, group: int) -> tuple[Tensor, Tensor]:
    P, W = balancing.P[group], balancing.W[group]
    return (P + P.mT) / 2, (W + W.mT) / 2


def _to_come(balancing: SelectiveBalancing, group: int) -> tuple[Tensor, Tensor]:
    P, W = _present(balancing, group)
    return P, W / _rate_sums(balancing, group)


def _means(balancing: SelectiveBalancing, group: int) -> tuple[Tensor, Tensor]:
    """P and W of the time-invariant recurrence that has the means of B and C and is driven by white noise."""
    m, sums = balancing.moments, _rate_sums(balancing, group)
    b, c = m.B[group] / m.tokens, m.C[group] / m.tokens
    return torch.outer(b, b) / sums, torch.outer(c, c) / sums


def _rate_sums(balancing: SelectiveBalancing, group: int) -> Tensor:
    rates = balancing.moments.rates[group] / balancing.moments.tokens
    return rates[:, None] + rates


# How each selection models P and W of one group.
_MODELS: dict[str, Callable[[SelectiveBalancing, int], tuple[Tensor, Tensor]]] = {
    "hankel": _to_come,
    "least_squares": _present,
    "means": _means,
}


def _random(balancing: SelectiveBalancing) -> Tensor:
    return torch.rand(balancing.P.shape[:2], generator=generator_from(balancing.moments.P))


def _by_gramians(balancing: SelectiveBalancing) -> Tensor:
    return balancing.P.diagonal(dim1=-2, dim2=-1) * balancing.W.diagonal(dim1=-2, dim2=-1)


def _by_magnitude(balancing: SelectiveBalancing) -> Tensor:
    m = balancing.moments
    return (m.B / m.tokens).abs() * (m.C / m.tokens).abs() / (m.rates / m.tokens)


_SCORES: dict[str, Callable[[SelectiveBalancing], Tensor]] = {
    "gramians": _by_gramians,
    "magnitude": _by_magnitude,
    "random": _random,
}
