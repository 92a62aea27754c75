"""How many states each layer keeps, by the predicted damage: the rise of a sequence's loss, in nats.

Every layer has a *damage curve*: the predicted damage of keeping 0, 1, ..., n states, decreasing to 0. The damages of
several layers add up.

The prediction is quadratic and fails when a layer stops working. Measured on a Mamba-2 of two layers of 64 states:
keeping 31 and 1 states was predicted to cost 0.26 nats and cost 12.5; 45 and 3 cost 2.6 times the prediction, 48 and 16
twice. Every layer therefore keeps a minimum, the floor. Measure a plan's damage on held-out data before writing it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError

FLOOR = 1 / 16  # of a layer's states


def linear_curve(damage: Tensor) -> Tensor:
    """Damage curve of all systems of a linear layer from `CovarianceBalancing.damage`, shape ``(*batch, n)``."""
    per_state = damage.reshape(-1, damage.shape[-1]).sum(0)
    tails = per_state.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])


def calibrated(curve: Tensor, measured: Mapping[int, float]) -> Tensor:
    """A damage curve corrected to pass through better predictions for some ranks.

    The logarithm of the ratio ``measured / curve`` is interpolated linearly between these ranks, and constant beyond.

    Args:
        curve: shape ``(n + 1,)``.
        measured: damages by rank.

    Returns:
        shape ``(n + 1,)``, decreasing.
    """
    ranks = sorted(rank for rank in measured if float(curve[rank]) > 0 and measured[rank] > 0)
    if not ranks:
        return curve
    ratios = [math.log(measured[rank] / float(curve[rank])) for rank in ranks]
    between = np.interp(np.arange(curve.shape[0]), ranks, ratios)
    scaled = curve * torch.from_numpy(np.exp(between))
    return scaled.flip(0).cummax(0).values.flip(0)


def within_loss(curves: Mapping[str, Tensor], max_loss: float, floor: float = FLOOR) -> dict[str, int]:
    """The fewest states, over all layers, whose predicted damage is at most ``max_loss`` nats per sequence.

    Args:
        curves: per layer, shape ``(n + 1,)``.
        max_loss: at least 0.
        floor: share of its states that every layer keeps, rounded up.

    Raises:
        InvalidRankRuleError: a number out of range.
    """
    if not (math.isfinite(max_loss) and max_loss >= 0):
        raise InvalidRankRuleError(f"max_loss must be a number of at least 0, in nats; got {max_loss!r}")
    return _cheapest(curves, floor, stop=lambda damage, _: damage > max_loss)


def within_states(curves: Mapping[str, Tensor], total: int, floor: float = FLOOR) -> dict[str, int]:
    """Distribute ``total`` states over the layers such that the predicted damage is least.

    Raises:
        InvalidRankRuleError: a total below the layers' floors.
    """
    least = sum(_floors(curves, floor).values())
    if total < least:
        raise InvalidRankRuleError(f"total_states={total} is less than the {least} that the layers' floors need")
    return _cheapest(curves, floor, stop=lambda _, states: states < total)


def _floors(curves: Mapping[str, Tensor], floor: float) -> dict[str, int]:
    if not 0 <= floor <= 1:
        raise InvalidRankRuleError(f"floor must be a share in [0, 1]; got {floor!r}")
    return {name: max(1, math.ceil(floor * (curve.shape[0] - 1))) for name, curve in curves.items()}


def _cheapest(curves: Mapping[str, Tensor], floor: float, stop: Callable[[float, int], bool]) -> dict[str, int]:
    """Remove states where this costs least, as long as ``stop`` allows it.

    Each layer's curve is replaced by its lower convex hull, along which the next step is always the cheapest.
    """
    floors = _floors(curves, floor)
    ranks = {name: curve.shape[0] - 1 for name, curve in curves.items()}
    damage = 0.0
    queue = [step for name, curve in curves.items() if (step := _next_step(name, curve, ranks[name], floors[name]))]
    heapq.heapify(queue)
    while queue:
        _, name, lower = heapq.heappop(queue)
        for rank in range(ranks[name] - 1, lower - 1, -1):  # take a step of several states in part if it must stop
            rise = float(curves[name][rank] - curves[name][ranks[name]])
            if stop(damage + rise, sum(ranks.values()) - ranks[name] + rank):
                break
            damage, ranks[name] = damage + rise, rank
        else:
            if step := _next_step(name, curves[name], ranks[name], floors[name]):
                heapq.heappush(queue, step)
    return ranks


def _next_step(name: str, curve: Tensor, rank: int, floor: int) -> tuple[float, str, int] | None:
    """The lower rank with the least damage per removed state, and that damage."""
    if rank <= floor:
        return None
    lower = torch.arange(floor, rank)
    slopes = (curve[floor:rank] - curve[rank]) / (rank - lower)
    best = int(slopes.argmin())
    return float(slopes[best]), name, floor + best


__all__ = ["FLOOR", "calibrated", "linear_curve", "within_loss", "within_states"]
