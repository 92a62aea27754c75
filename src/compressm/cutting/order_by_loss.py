"""The order of states by what the loss says, decided by trying: see `compressm.cutting.picking` for why.

A slice keeps the first states of every layer and compensates for the others by nothing. So wherever states can only be
permuted, each criterion gives an order, and the model is run with its slices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from compressm.adapters import LayerChange
from compressm.adapters.changes import layer_values
from compressm.adapters.registry import layers_that_need_data
from compressm.cutting.rise import measured_rises
from compressm.observing.loss_evidence import Loss, evidence_on
from compressm.theory.fisher import MaskFisher
from compressm.theory.ordering import order_by_fisher, order_states, prefix
from compressm.theory.recurrence import SelectiveBalancing, SelectiveReduction

SHARES = (2, 4, 8)  # of the states that are kept in the slices that are tried: one in so many
_LEAST = 1e-9  # nats; a smaller rise is rounding

Orders = Mapping[str, SelectiveReduction]


def best_orders(
    model: nn.Module, balancings: Mapping[str, SelectiveBalancing], by_moments: Orders, data: Any, loss: Loss
) -> tuple[dict[str, SelectiveReduction], dict[str, tuple[float, ...]]]:
    """The orders of all layers by the criterion whose slices raise the loss least.

    Args:
        model: not sorted yet.
        balancings: moments of its layers.
        by_moments: their orders by second moments. Those that mix states, and those of layers whose effect on the loss
            cannot be observed, are kept.
        data: batches that can be read several times.
        loss: see `compressm.observing.loss_evidence.gather_evidence`.

    Returns:
        the orders; and the criteria, the best first, with the rises by slices to one in so many of `SHARES`.
    """
    fishers = evidence_on(model, data, loss).fishers
    open_to_choice = {
        name: fishers[name] for name, one in by_moments.items() if name in fishers and one.kept is not None
    }
    ways = _ways(balancings, by_moments, open_to_choice)
    slices = [
        {name: _sliced(model, name, balancings[name], one, share) for name, one in orders.items()}
        for orders in ways.values()
        for share in SHARES
    ]
    nats = iter([rise.nats for rise in measured_rises(model, slices, data, loss)])
    rises = {way: tuple(next(nats) for _ in SHARES) for way in ways}
    in_order = sorted(rises, key=lambda way: _mean_of_logarithms(rises[way]))
    return dict(ways[in_order[0]]), {way: rises[way] for way in in_order}


def _ways(
    balancings: Mapping[str, SelectiveBalancing], by_moments: Orders, fishers: Mapping[str, MaskFisher]
) -> dict[str, Orders]:
    """The orders of all layers by every criterion."""
    ways: dict[str, Orders] = {"moments": by_moments}
    if fishers:
        by_powers = {name: order_states(balancings[name], selection="gramians") for name in fishers}
        by_fisher = {name: order_by_fisher(balancings[name], one) for name, one in fishers.items()}
        saliency = {name: order_by_fisher(balancings[name], one.diagonal()) for name, one in fishers.items()}
        named = {"fisher": by_fisher, "saliency": saliency, "powers": by_powers}
        ways |= {way: {**by_moments, **orders} for way, orders in named.items()}
    return ways


def _sliced(
    model: nn.Module, name: str, balancing: SelectiveBalancing, order: SelectiveReduction, share: int
) -> LayerChange:
    layer, adapter = layers_that_need_data(model)[name]
    states = max(1, order.states // share)
    return adapter.planned(layer)(layer_values(layer), prefix(balancing, order, states)).in_files()


def _mean_of_logarithms(rises: tuple[float, ...]) -> float:
    """Infinity if one is not known."""
    if any(math.isnan(rise) for rise in rises):
        return math.inf
    return sum(math.log(max(rise, _LEAST)) for rise in rises)


__all__ = ["SHARES", "best_orders"]
