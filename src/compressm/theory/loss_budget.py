"""How many states each layer keeps, by the predicted damage: the rise of the loss, in nats.

Every layer has a *damage curve*: the predicted damage of keeping 0, 1, ..., n states, decreasing to 0. The damages of
several layers add up.

The prediction is quadratic and fails when a layer stops working. Measured on a Mamba-2 of two layers of 64 states:
keeping 31 and 1 states was predicted to cost 0.26 nats and cost 12.5; 45 and 3 cost 2.6 times the prediction, 48 and 16
twice. Every layer therefore keeps a minimum, the floor. Measure a plan's damage on held-out data before writing it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError

FLOOR = 1 / 16  # of a layer's states


@dataclass(frozen=True)
class Offer:
    """The sizes that some layers can have in common.

    Attributes:
        sizes: ascending.
        damages: predicted damage of each size, decreasing, summed over the layers.
        layers: how many they are.
    """

    sizes: Sequence[int]
    damages: Sequence[float]
    layers: int = 1

    @classmethod
    def of(cls, curves: Sequence[Tensor], sizes: Sequence[int], floor: float = FLOOR) -> Offer:
        """The offer of layers with these damage curves.

        Args:
            curves: one per layer, shape ``(n + 1,)``.
            sizes: the sizes that they can have, ascending.
            floor: share of its states that every layer keeps, rounded up.

        Raises:
            InvalidRankRuleError: a share out of range.
        """
        if not 0 <= floor <= 1:
            raise InvalidRankRuleError(f"floor must be a share in [0, 1]; got {floor!r}")
        least = max(math.ceil(floor * (curve.shape[0] - 1)) for curve in curves)
        allowed = [size for size in sizes if size >= least] or list(sizes[-1:])
        damages = [sum(float(curve[size]) for curve in curves) for size in allowed]
        return cls(allowed, damages, len(curves))


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


def within_loss(offers: Sequence[Offer], max_loss: float) -> list[int]:
    """The sizes with the fewest states, over all layers, whose predicted damage is at most ``max_loss`` nats.

    Raises:
        InvalidRankRuleError: a number out of range.
    """
    if not (math.isfinite(max_loss) and max_loss >= 0):
        raise InvalidRankRuleError(f"max_loss must be a number of at least 0, in nats; got {max_loss!r}")
    allowed = max_loss * (1 + 1e-12)  # a sum's rounding is no damage
    return _cheapest(offers, lambda damage, _: damage <= allowed)


def within_states(offers: Sequence[Offer], total: int) -> list[int]:
    """The sizes of at most ``total`` states over all layers whose predicted damage is least.

    Raises:
        InvalidRankRuleError: a total below the layers' least sizes.
    """
    least = sum(offer.layers * offer.sizes[0] for offer in offers)
    if total < least:
        raise InvalidRankRuleError(f"total_states={total} is less than the {least} that the layers' floors need")
    return _cheapest(offers, lambda _, states: states > total)


def _cheapest(offers: Sequence[Offer], take: Callable[[float, int], bool]) -> list[int]:
    """Remove states where this costs least, as long as ``take`` allows it.

    Each offer's damages are replaced by their lower convex hull, along which the next step is always the cheapest.

    Args:
        take: whether to take a step, by the damage after it and the states of all layers before it.
    """
    places = [len(offer.sizes) - 1 for offer in offers]
    states = sum(offer.layers * offer.sizes[-1] for offer in offers)
    damage = sum(offer.damages[-1] for offer in offers)
    queue = [step for index, offer in enumerate(offers) if (step := _next_step(index, offer, places[index]))]
    heapq.heapify(queue)
    while queue:
        _, index, lower = heapq.heappop(queue)
        offer = offers[index]
        for place in range(places[index] - 1, lower - 1, -1):  # take a step of several sizes in part if it must stop
            rise = offer.damages[place] - offer.damages[places[index]]
            if not take(damage + rise, states):
                break
            states -= offer.layers * (offer.sizes[places[index]] - offer.sizes[place])
            damage, places[index] = damage + rise, place
        else:
            if step := _next_step(index, offer, places[index]):
                heapq.heappush(queue, step)
    return [offer.sizes[place] for offer, place in zip(offers, places, strict=True)]


def _next_step(index: int, offer: Offer, place: int) -> tuple[float, int, int] | None:
    """The place of the smaller size with the least damage per removed state, and that damage."""
    if place == 0:
        return None
    slopes = [
        (offer.damages[lower] - offer.damages[place]) / (offer.layers * (offer.sizes[place] - offer.sizes[lower]))
        for lower in range(place)
    ]
    best = min(range(place), key=lambda lower: slopes[lower])
    return slopes[best], index, best


__all__ = ["FLOOR", "Offer", "calibrated", "linear_curve", "within_loss", "within_states"]
