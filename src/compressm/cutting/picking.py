"""Which states selective layers keep where their parameters take no map of the states, decided by trying.

No criterion is best everywhere. The Fisher matrix of a mask on the states (`compressm.theory.fisher`) is of second
order: where predictions are certain, or a removed state changes more than the mask says (the keys of transformers'
delta rule are scaled to norm 1 again), it misjudges large cuts. Second moments do not know the loss. On associative
recall a Mamba-2 cut to an eighth of its states recalls 43 % by the one and 6 % by the other, and a gated DeltaNet cut
to a quarter 70 % by the one and 91 % by the other (results/recall_after_the_cut.json). So each is tried on the data
that the cut is made from, and the one that raises the loss least is taken.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from compressm.adapters import SelectiveAdapter, find_layers
from compressm.cutting.plan import Plan
from compressm.cutting.rise import measured_rises
from compressm.observing.loss_evidence import Loss

HINT = "second moments alone picked these states; given a loss (loss=, --gramians loss) other ways are tried as well"


def hinted(model: nn.Module, plan: Plan) -> Plan:
    """The plan, whose report says so if other ways to pick its states could be tried."""
    layers = find_layers(model)
    open_to_choice = (
        isinstance(adapter, SelectiveAdapter) and adapter.leaves_choice(layer)
        for layer, adapter in (layers[name] for name in plan.changes)
    )
    return replace(plan, report=replace(plan.report, hint=HINT)) if any(open_to_choice) else plan


def best_picked(model: nn.Module, plan: Plan, data: Any, loss: Loss) -> Plan:
    """The plan, or one of its others, whose cut raises the loss least on the data that it is made from.

    Args:
        model: not cut yet.
        plan: with its others.
        data: batches; see `compressm.observing.inputs`.
        loss: see `compressm.cutting.rise.measured_rises`.

    In several processes all of them must call this, each with its share of the data.
    """
    if not plan.others:
        return plan
    plans: dict[str, Plan] = {plan.pick: plan, **plan.others}
    rises = measured_rises(model, [one.changes for one in plans.values()], data, loss)
    nats = {pick: rise.nats for pick, rise in zip(plans, rises, strict=True)}
    in_order = sorted(nats.items(), key=lambda one: (math.isnan(one[1]), one[1]))
    best = plans[in_order[0][0]]
    return replace(best, others={}, report=replace(best.report, picks=tuple(in_order)))


__all__ = ["best_picked", "hinted"]
