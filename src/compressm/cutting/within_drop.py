"""The largest cut after which a metric has dropped by at most what was allowed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from compressm.adapters import find_layers
from compressm.cutting.made_cuts import MadeCuts
from compressm.cutting.metrics import Better, sign_of
from compressm.cutting.plan import Plan, plan_reduction
from compressm.cutting.sizes import resize_states, state_dims
from compressm.cutting.spectrum import balance_layers
from compressm.errors import EvaluationError
from compressm.observing.loss_evidence import LossEvidence
from compressm.theory.balancing import Method
from compressm.theory.rank_rule import RankRule
from compressm.theory.recurrence import Moments
from compressm.theory.selection import Selection

# The number of cuts to try, and the range of their tolerances.
_TRIALS, _LEAST, _LARGEST = 10, 1e-5, 0.99
_DROPS = "the metric dropped by more than max_drop after every cut that was tried"


def plan_within_drop(
    model: nn.Module,
    rule: RankRule,
    max_drop: float,
    metric_of: Callable[[nn.Module], float],
    mode: Better,
    moments: Mapping[str, Moments] | None,
    evidence: LossEvidence | None,
    method: Method = "real",
    selection: Selection = "hankel",
    match_steps: int = 0,
) -> Plan:
    """The plan with the largest tolerance at which the metric drops by at most ``max_drop``; the model is unchanged.

    Args:
        model: to be cut.
        rule: of the plan, whose tolerance is searched for.
        max_drop: see `compress`.
        metric_of: the metric of a model.
        mode: see `compress`.
        moments, evidence: what the layers are balanced by; see `plan_on`.
        method, selection, match_steps: see `compress`.

    Raises:
        EvaluationError: the metric of the uncut model is not finite.
    """
    reference = metric_of(model)
    if not math.isfinite(reference):
        raise EvaluationError(
            f"evaluate returned {reference} before anything was cut, and no loss can be held against that; expected a "
            "finite number: see that weights, data and the metric itself are finite"
        )
    balancings = balance_layers(model, method, moments, None if evidence is None else evidence.covariances)
    fishers = None if evidence is None else evidence.fishers
    cuts = MadeCuts(find_layers(model), balancings, selection, fishers)

    def planned(tolerance: float) -> Plan:
        wanted = replace(rule, tolerance=tolerance)
        return plan_reduction(
            model, wanted, balancings=balancings, selection=selection, cuts=cuts, loss=evidence, match_steps=match_steps
        )

    def within(metric: float) -> bool:
        return math.isfinite(metric) and sign_of(mode) * (metric - reference) >= -max_drop

    saved = state_dims(model), copy.deepcopy(model.state_dict())
    best, kept = planned(0.0), None  # removes only states without energy
    low, high = _LEAST, _LARGEST
    for _ in range(_TRIALS):
        middle = (low * high) ** 0.5
        plan = planned(middle)
        metric = _metric_after(model, plan, metric_of, *saved)
        if within(metric):
            low, best, kept = middle, plan, metric
        else:
            high = middle
    if kept is None:
        kept = _metric_after(model, best, metric_of, *saved) if best.changes else reference
        if not within(kept):  # states without energy on the data may have some where the metric is measured
            best, kept = best.withdrawn(_DROPS), reference
    return best.with_metrics(reference, kept)


def _metric_after(
    model: nn.Module,
    plan: Plan,
    metric_of: Callable[[nn.Module], float],
    dims: Mapping[str, int],
    weights: Mapping[str, Any],
) -> float:
    """The metric of the model after a plan's cut.

    Args:
        model: gets its present ``dims`` and ``weights`` back.
    """
    plan.apply(model)
    try:
        return metric_of(model)
    finally:
        resize_states(model, dims)
        model.load_state_dict(weights)


__all__ = ["plan_within_drop"]
