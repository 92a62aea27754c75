"""Which states of a selective recurrence to keep, and how C takes over the work of those that go.

States of S6 decay at different rates, so that a new state which is still a plain recurrence is an old one: ``into`` is
a selection. The state that is read off the kept ones, ``h = P_{:S} P_SS^-1 h_S``, is the best linear estimate of all,
hence ``out = P_SS^-1 P_S:`` is the least squares solution, and what remains of P is its Schur complement R:

    error^2 = tr W R,    R = P - P_{:S} P_SS^-1 P_{S:}

Adding state j lowers it by ``(R W R)_jj / R_jj``: the states are picked greedily by that, and then exchanged one at a
time while the error falls. It is orthogonal least squares (Chen, Billings, Luo 1989) with a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError
from compressm.selective import ErrorEstimate, SelectiveBalancing, SelectiveReduction, root

Selection = Literal["least_squares", "gramians", "magnitude", "random", "means"]

# The moments are gathered in float32: what they cannot resolve must not be extrapolated from.
RIDGE = 1e-6
EXCHANGES = 10


def reduce_selective(
    balancing: SelectiveBalancing,
    states: int,
    folds_into: bool = False,
    folds_out: bool = True,
    selection: Selection = "least_squares",
) -> SelectiveReduction:
    """Reduce a selective recurrence to ``states`` states.

    Args:
        balancing: its moments.
        states: how many to keep, from 1 to n.
        folds_into, folds_out: which maps the layer can take; see `SelectiveAdapter`.
        selection: how states are picked. ``"least_squares"`` is described in the module's text; without ``folds_out``
            those states go that together contribute least, ``sum_ij (W * P)_ij`` over the removed. The others are for
            comparison: the largest ``W_jj P_jj`` (``"gramians"``: diagonal empirical ones), the largest ``"magnitude"``
            of B and C, and ``"random"`` (from torch's random state); they do not map C. ``"means"`` replaces B and C
            by their means over the data, as the CompreSSM paper does, and then goes on as ``"least_squares"``.

    Raises:
        InvalidRankRuleError: fewer than one state asked for, or an unknown selection.
    """
    groups, n = balancing.P.shape[:2]
    if states < 1:
        raise InvalidRankRuleError(f"states must be at least 1; got {states}")
    if selection not in ("least_squares", *_SCORES, "means"):
        known = ", ".join(("least_squares", *_SCORES, "means"))
        raise InvalidRankRuleError(f"selection must be one of {known}; got {selection!r}")
    states = min(states, n)
    if folds_into and selection == "least_squares" and states < n:
        into, out = _balanced_maps(balancing, states)
        return _reduction(balancing, into, out, None)
    kept, out = [], []
    for g in range(groups):
        P, W = _symmetric(balancing.P[g], balancing.W[g])
        if selection in _SCORES:
            chosen = torch.argsort(-_SCORES[selection](balancing)[g], stable=True)[:states]
            kept.append(chosen.sort().values)
            out.append(torch.eye(n, dtype=torch.float64)[kept[-1]])
            continue
        model = _means(balancing)[g] if selection == "means" else (P, W)
        kept.append(select_with_compensation(*model, states) if folds_out else select_by_removal(*model, states))
        out.append(compensation(model[0], kept[-1]) if folds_out else torch.eye(n, dtype=torch.float64)[kept[-1]])
    chosen = torch.stack(kept)
    return _reduction(balancing, torch.eye(n, dtype=torch.float64)[chosen], torch.stack(out), chosen)


def select_with_compensation(P: Tensor, W: Tensor, states: int) -> Tensor:
    """The states from which the output is best recovered by least squares; see the module's text.

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
    """By how much each state would lower the error; states that others determine come last, chosen ones never."""
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
    """``P_SS^-1 P_S:``, by which C takes over the work of the states that go; shape ``(r, n)``, the identity on kept
    states."""
    n = P.shape[0]
    scale = P.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    unit = P / scale[:, None] / scale
    inner = unit[kept][:, kept] + RIDGE * torch.eye(kept.shape[0], dtype=P.dtype)
    out = torch.linalg.solve(inner, unit[kept]) / scale[kept][:, None] * scale
    out[:, kept] = torch.eye(kept.shape[0], dtype=P.dtype)
    assert out.shape == (kept.shape[0], n)
    return out


def select_by_removal(P: Tensor, W: Tensor, states: int) -> Tensor:
    """The states to keep where nothing can take over the work of the others: those go whose summed contribution to the
    output, ``E[(sum_j C_j h_j)^2] = sum_ij (W * P)_ij`` over the removed, is least. Shapes as above."""
    n = P.shape[0]
    power = W * P
    gone, cost = list[int](), power.diagonal().clone()  # cost of removing each state after those already gone
    for _ in range(n - states):
        j = int(cost.index_fill(0, torch.tensor(gone, dtype=torch.long), torch.inf).argmin())
        gone.append(j)
        cost = cost + 2 * power[j]
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


def _balanced_maps(balancing: SelectiveBalancing, states: int) -> tuple[Tensor, Tensor]:
    """Balanced truncation, exact where all states decay alike: ``into = s^-1/2 U^T L_W^T``, ``out = s^-1/2 V^T L_P^T``.
    Directions that carry nothing become states that do nothing."""
    L_P, L_W = root(balancing.P), root(balancing.W)
    U, hsv, Vh = torch.linalg.svd(L_W.mT @ L_P)
    hsv = hsv[..., :states]
    sound = hsv > hsv[..., :1] * hsv.shape[-1] * torch.finfo(torch.float64).eps
    half = torch.where(sound, hsv.clamp_min(1e-300).rsqrt(), 0.0)[..., :, None]
    return half * (U[..., :states].mT @ L_W.mT), half * (Vh[..., :states, :] @ L_P.mT)


def _reduction(balancing: SelectiveBalancing, into: Tensor, out: Tensor, kept: Tensor | None) -> SelectiveReduction:
    P, W, n = balancing.P, balancing.W, balancing.P.shape[-1]
    rest = torch.eye(n, dtype=torch.float64) - out.mT @ into
    power = float((W * P).sum())
    lost = float((W * (rest @ P @ rest.mT)).sum())
    least = float(balancing.hsv[..., into.shape[-2] :].square().sum())
    relative, bound = ((max(value, 0.0) / power) ** 0.5 if power > 0 else 0.0 for value in (lost, least))
    failures = () if bool(torch.isfinite(into).all() and torch.isfinite(out).all()) else ("the maps are not finite",)
    estimate = ErrorEstimate(n, into.shape[-2], relative, bound, failures)
    return SelectiveReduction(into, out, kept, estimate, balancing.moments)


def _symmetric(P: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    return (P + P.mT) / 2, (W + W.mT) / 2


def _means(balancing: SelectiveBalancing) -> list[tuple[Tensor, Tensor]]:
    """P and W of the time-invariant recurrence with the means of B and C, driven by white noise in operational time."""
    m = balancing.moments
    B, C, rates = m.B / m.tokens, m.C / m.tokens, m.rates / m.tokens
    pairs = []
    for b, c, a in zip(B, C, rates, strict=True):
        observed = torch.outer(c, c) / (a[:, None] + a)
        pairs.append((torch.outer(b, b) / (a[:, None] + a), observed))
    return pairs


def _random(balancing: SelectiveBalancing) -> Tensor:
    return torch.rand(balancing.P.shape[:2])


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
