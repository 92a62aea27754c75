"""One budget of states over layers, spent by the share of its layer's Hankel energy that each state adds."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# Maps a number of states to the Hankel energy that a cut to it discards in each of a layer's systems, ``(*batch,)``.
Discards = Callable[[int], Tensor]
# How many cuts of a layer a budget computes, if the discarded energy does not follow from the singular values.
_SAMPLES = 8


def shared_budget(
    groups: Sequence[Sequence[str]],
    sizes: Sequence[Sequence[int]],
    energies: Mapping[str, Tensor],
    total: int,
    discards: Mapping[str, Discards],
) -> list[int | None]:
    """Sizes within the budget. Starting from the least sizes, the step with the largest gain per state is taken as long
    as one fits; a gain is a share of the layer's own energy."""
    alone = len(groups) == 1  # a single group gets the whole budget, so its gains need not be computed
    gains = [
        [0.0] * max(s, default=1)
        if alone
        else torch.stack([_shares(energies[n], discards.get(n))[: max(s, default=1)] for n in g]).mean(0).tolist()
        for g, s in zip(groups, sizes, strict=True)
    ]
    places = [0] * len(groups)
    spent = (
        len(g) * s[0] if s else sum(energies[name].shape[-1] for name in g)
        for g, s in zip(groups, sizes, strict=True)
    )  # fmt: skip
    left, waiting = total - sum(spent), list[tuple[float, int]]()

    def wait(index: int) -> None:
        if places[index] + 1 < len(sizes[index]):
            before, after = sizes[index][places[index] : places[index] + 2]
            heapq.heappush(waiting, (-sum(gains[index][before:after]) / (after - before), index))

    for index in range(len(groups)):
        wait(index)
    while waiting:
        _, index = heapq.heappop(waiting)
        before, after = sizes[index][places[index] : places[index] + 2]
        cost = len(groups[index]) * (after - before)
        if cost <= left:
            left -= cost
            places[index] += 1
            wait(index)
    return [s[place] if s else None for s, place in zip(sizes, places, strict=True)]


def _shares(energy: Tensor, discards: Discards | None) -> Tensor:
    """The share of a layer's energy that each state adds, the largest over the layer's systems, shape ``(n,)``."""
    energy = energy.to(torch.float64).reshape(-1, energy.shape[-1])
    total, n = energy.sum(-1, keepdim=True), energy.shape[-1]
    if discards is not None:
        tried = sorted({*torch.linspace(1, n, min(n, _SAMPLES)).round().int().tolist()})
        lost = torch.stack([total[:, 0], *(discards(states).reshape(-1) for states in tried)], -1)
        energy = torch.tensor([_gains([0, *tried], one) for one in lost.tolist()], dtype=torch.float64)
    share = energy / total.clamp_min(torch.finfo(torch.float64).tiny)
    return share.amax(0)


def _gains(sizes: Sequence[int], lost: Sequence[float]) -> list[float]:
    """The energy that each state adds, decreasing, from the losses of cuts to some sizes.

    The gains are the slopes of the lower convex hull, since one state may add little alone and much with the next one.
    """
    gains, here = list[float](), 0
    while here < len(sizes) - 1:
        slopes = [(lost[here] - lost[k]) / (sizes[k] - sizes[here]) for k in range(here + 1, len(sizes))]
        best = max(range(len(slopes)), key=lambda k: (slopes[k], k))
        gains += [max(0.0, slopes[best])] * (sizes[here + 1 + best] - sizes[here])
        here += 1 + best
    return gains
