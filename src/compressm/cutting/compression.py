"""`compress`: one cut of one model, in place, by a rule or as far as a metric allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from compressm.adapters import find_layers
from compressm.adapters.plain import check_wrappers
from compressm.adapters.registry import check_plain, warn_of_parts
from compressm.cutting.carry import Carry, Together, check_optimizer, unwrap_optimizer
from compressm.cutting.choosing import Which, of_chosen_layers
from compressm.cutting.decisions import must_be_alike
from compressm.cutting.metrics import Better, measure
from compressm.cutting.picking import best_picked, hinted
from compressm.cutting.plan import Plan, plan_reduction
from compressm.cutting.report import Report
from compressm.cutting.rise import measured_rise
from compressm.cutting.serving import Memory, Serving
from compressm.cutting.sizes import checked_sizes, state_dims
from compressm.cutting.spectrum import balancing_of, check_match
from compressm.cutting.within_drop import plan_within_drop
from compressm.errors import InvalidRankRuleError, UnsupportedModelError
from compressm.observing.held_out import gather_halves, joined, twice_readable
from compressm.observing.loss_evidence import Gramians, Loss, LossEvidence, divided, evidence_on
from compressm.runtime.processes import from_first_rank, raised_on_all
from compressm.theory.balancing import Method
from compressm.theory.possible_sizes import check_sizes
from compressm.theory.rank_rule import RankRule, check_choice, largest_reduction
from compressm.theory.recurrence import Moments
from compressm.theory.selection import Selection
from compressm.theory.targets import Target

_CHECKS = 6  # how many plans are measured under `max_loss`
_ABOVE = "the rise of the loss on held-out data was above max_loss for every cut that was tried"


@of_chosen_layers
def compress(
    model: nn.Module,
    *,
    tolerance: float | None = None,
    states: int | None = None,
    fraction: float | None = None,
    max_error: float | None = None,
    total_states: int | None = None,
    max_loss: float | None = None,
    max_drop: float | None = None,
    evaluate: Callable[[nn.Module], Any] | None = None,
    mode: Better = "max",
    multiple_of: int = 1,
    min_reduction: float = 0.0,
    max_reduction: float | None = None,
    per_layer: bool = False,
    target: Target | None = None,
    layers: Which | None = None,
    exclude: Which | None = None,
    method: Method = "real",
    selection: Selection = "hankel",
    data: Any = None,
    loss: Loss | None = None,
    gramians: Gramians | None = None,
    optimizer: Any = None,
    carry: Carry = "transform",
    match_steps: int = 0,
) -> Report:
    """Reduce a model once, in place. Exactly one of the first seven arguments says how far; see `RankRule`.

    Args:
        model: any module with layers that compressm knows.
        tolerance: the share of the Hankel energy that may be discarded in each layer.
        states: at most this many states in each layer.
        fraction: at most this fraction of each layer's states.
        max_error: H-infinity error allowed in each layer, in units of output per input.
        total_states: budget over all layers together.
        max_loss: rise of the loss, in nats per prediction, that the cuts of all layers together may cost. It is
            predicted from data, and measured on every fourth batch before anything is written. Needs ``data`` and
            ``loss``.
        max_drop: cut with the largest tolerance at which ``evaluate``, right after the cut, drops by at most this. The
            tolerance is found by bisection, in about ten evaluations.
        evaluate: ``evaluate(model)`` returns the metric: a number, or one score per example, whose mean counts.
        mode: ``"max"`` if a higher metric is better, ``"min"`` if a lower one is.
        multiple_of: prefer state dimensions that are a multiple of this: the next larger one under a rule about
            quality, the next smaller one under an upper limit; see `RankRule`.
        min_reduction: leave a layer alone unless this share of its states goes.
        max_reduction: remove at most this share of a layer's states. By default half under ``tolerance``,
            ``max_error``, ``max_loss`` and ``max_drop``, and no limit under ``states``, ``fraction`` and
            ``total_states``.
        per_layer: let the layers of a Hugging Face model differ in their state dimension; see `RankRule`.
        target: cut to sizes only that these kernels or this server take; see `compressm.theory.targets`.
        layers: cut these layers only: a name, a glob, a list of these, or a function of a layer's name and the layer.
        exclude: leave these layers as they are, and ask nothing of them; as ``layers``.
        method: ``"real"`` or ``"complex"``, for linear time-invariant layers.
        selection: how the states of selective layers are picked; see `compressm.theory.selection`.
        data: a batch of the model's inputs, or an iterable of batches, which selective layers need; see
            `compressm.observing.inputs` for the forms. All tokens count. The data are read twice, the second time to
            measure `LayerReport.error_on_data` and `error_held_out`. If the model has selective layers, batches whose
            order may change, as from a `DataLoader` that shuffles, are kept in memory between the two readings.
        loss: the loss of the model's predictions: ``"classification"`` or ``"regression"``, which need no labels since
            they measure by how much the predictions move; or ``loss(output, batch)``, which returns the loss of every
            sequence, shape ``(batch,)``. With it states are measured by their effect on the loss.
        gramians: ``"white"`` balances time-invariant layers under white noise; ``"loss"`` by their states on the data
            and the gradients of the loss, see `compressm.theory.covariance`, and picks the states of selective layers
            by their effect on the loss where that does less damage. By default ``"loss"`` if a loss is given.
        optimizer: if given, its state is carried over to the new parameters. A list of optimizers is allowed.
        carry: how the optimizer's state is carried over; see `compressm.cutting.carry`.
        match_steps: steps in which cut time-invariant layers learn the old ones' outputs on ``data``, for ``loss``; see
            `compressm.cutting.matching`.

    Returns:
        a report of each layer, with its certificate. A layer whose certificate fails is not changed.

    Raises:
        InvalidRankRuleError: contradicting or impossible arguments.
        UnsupportedModelError: nothing in the model can be reduced, or a selective layer without data.
        UnsupportedOptimizerError: the optimizer's state cannot be carried over.
        InvalidSystemError: parameters or data that are not finite.
        EvaluationError: ``evaluate`` raised, or returned no finite number.
        ConfigError: data that the model cannot take.

    After an error the model is unchanged.
    """
    del layers, exclude  # see `of_chosen_layers`
    check_choice("carry", carry, Carry)
    check_choice("mode", mode, Better)
    check_choice("method", method, Method)
    check_choice("selection", selection, Selection)
    sizes = {"tolerance": tolerance, "states": states, "fraction": fraction, "max_error": max_error}
    rule = RankRule(
        **_searched(max_drop, evaluate, {**sizes, "total_states": total_states, "max_loss": max_loss}),
        multiple_of=multiple_of,
        min_reduction=min_reduction,
        max_reduction=largest_reduction(max_reduction, size=(states, fraction, total_states) != (None, None, None)),
        per_layer=per_layer,
        target=target,
    )
    gramians = balancing_of(gramians, loss, data, method, selection)
    check_rule(rule, gramians)
    check_match(match_steps, gramians)
    optimizer = None if optimizer is None else unwrap_optimizer(optimizer)
    _check_before(model, rule, optimizer, carry)
    if gramians == "loss":
        (seen, held_out), by_loss = raised_on_all(lambda: divided(model, data)), loss
    else:
        seen, held_out, by_loss = None if data is None else twice_readable(model, data), None, None

    planned = partial(_planned, model, rule, method=method, selection=selection, match_steps=match_steps)
    if max_drop is not None and evaluate is not None:
        metric_of = partial(measure, evaluate=evaluate)
        planned = partial(plan_within_drop, model, rule, max_drop, metric_of, mode, **planned.keywords)
    plan = plan_on(model, rule, seen, held_out, by_loss, selection, planned, match_steps)
    before = _memory(model)
    report = plan.apply(model, optimizer, carry)
    after = None if before is None else _memory(model)
    return report if before is None or after is None else replace(report, serving=Serving(before, after))


def _memory(model: nn.Module) -> Memory | None:
    """The bytes of a model; None if the width of one of its layers is not known."""
    try:
        return Memory.of(model)
    except UnsupportedModelError:
        return None


def plan_on(
    model: nn.Module,
    rule: RankRule,
    seen: Any,
    held_out: Any = None,
    loss: Loss | None = None,
    selection: Selection = "hankel",
    planned: Callable[[Mapping[str, Moments] | None, LossEvidence | None], Plan] | None = None,
    match_steps: int = 0,
) -> Plan:
    """A plan made from data and checked on them. Nothing is written.

    Args:
        model: not cut yet.
        rule: of the plan.
        seen: data to cut by, which give the same batches every time they are read; None for none.
        held_out: data on which the rise of the loss is measured.
        loss: balances by the loss; None for white noise.
        selection: how the states of selective layers are picked.
        planned: makes the plan from the moments and the evidence; by default by ``rule`` alone.
        match_steps: see `compress`.
    """
    halves = None if seen is None else gather_halves(model, seen)
    moments = None if halves is None else joined(halves)
    evidence = None if loss is None else evidence_on(model, seen, loss)
    plan = _planned(model, rule, moments, evidence) if planned is None else planned(moments, evidence)
    if evidence is not None and loss is not None:
        plan = _checked(model, plan, rule, moments, evidence, seen, held_out, loss, match_steps)
    elif selection == "hankel":
        plan = hinted(model, plan)
    if seen is not None:
        plan = plan.measured(model, seen, halves, selection, None if evidence is None else evidence.fishers)
    return plan


def check_rule(
    rule: RankRule,
    gramians: Gramians,
    remedy: str = "pass data= and loss='classification' (or 'regression', or a function)",
) -> None:
    """Refuse a rule that what balances the layers cannot keep.

    Args:
        rule: how far cuts are to go.
        gramians: what balances the layers.
        remedy: what has the caller's layers balanced by the loss.

    Raises:
        InvalidRankRuleError: the rule, and what to choose instead.
    """
    if gramians == "white" and rule.max_loss is not None:
        raise InvalidRankRuleError(
            f"max_loss={rule.max_loss:g} is a rise of the loss, which white noise does not tell: {remedy}, "
            "or choose another rule"
        )
    if gramians == "loss" and rule.max_error is not None:
        raise InvalidRankRuleError(
            f"max_error={rule.max_error:g} is a bound under white noise, and cuts by data and loss have none: use "
            "max_loss, or gramians='white'"
        )


def _checked(
    model: nn.Module,
    plan: Plan,
    rule: RankRule,
    moments: Mapping[str, Moments] | None,
    evidence: LossEvidence,
    seen: Any,
    held_out: Any,
    loss: Loss,
    match_steps: int,
) -> Plan:
    """The plan with the states that do least damage on the data that were seen, and the rise of the loss on held-out
    data. Under ``max_loss`` the allowance of the prediction is lowered until the measured rise is within it, or nothing
    is cut."""
    asked = rule
    for _ in range(_CHECKS):
        plan = best_picked(model, plan, seen, loss)
        rise = measured_rise(model, plan.changes, held_out, loss)
        if rule.max_loss is None or asked.max_loss is None or rise.nats <= rule.max_loss or not plan.changes:
            return plan.with_rise(rise)
        asked = replace(asked, max_loss=asked.max_loss * min(0.5, rule.max_loss / rise.nats))
        plan = _planned(model, asked, moments, evidence, match_steps=match_steps)
    return plan.withdrawn(_ABOVE)


def _planned(
    model: nn.Module,
    rule: RankRule,
    moments: Mapping[str, Moments] | None,
    evidence: LossEvidence | None,
    method: Method = "real",
    selection: Selection = "hankel",
    match_steps: int = 0,
) -> Plan:
    """The plan by a rule, the same in all processes, whose samples for predictions are different ones."""
    plan = partial(plan_reduction, model, rule, method, moments=moments, selection=selection)
    if evidence is None:
        return plan()
    return from_first_rank(lambda: plan(loss=evidence, match_steps=match_steps, others=True).cpu())


def _searched(max_drop: float | None, evaluate: object, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The user's sizes or errors; under ``max_drop`` the tolerance at which the search begins.

    Raises:
        InvalidRankRuleError: ``max_drop`` without ``evaluate``, together with a size or error, or no number of at least
            0: no cut would ever keep it.
    """
    if (max_drop is None) != (evaluate is None):
        raise InvalidRankRuleError(
            "max_drop and evaluate go together: the loss allowed, and the function that measures it"
        )
    if max_drop is None:
        return sizes
    if any(value is not None for value in sizes.values()):
        raise InvalidRankRuleError("give either max_drop or a size or error rule, not both")
    if isinstance(max_drop, bool) or not max_drop >= 0:
        raise InvalidRankRuleError(f"max_drop must be a number of at least 0, in the metric's units; got {max_drop!r}")
    return {**sizes, "tolerance": 0.0}


def _check_before(model: nn.Module, rule: RankRule, optimizer: Optimizer | Together | None, carry: Carry) -> None:
    """Before any computation, refuse impossible sizes, and layers or state that cannot be written or carried over."""
    found = find_layers(model)
    layers = {name: layer for name, (layer, _) in found.items()}
    check_wrappers(model, layers, [name for name, (_, adapter) in found.items() if adapter.needs_data])
    warn_of_parts(model)
    check_plain(layers)
    check_model_sizes(model, rule)
    if optimizer is not None:
        check_optimizer(optimizer, layers, carry)


def check_model_sizes(model: nn.Module, rule: RankRule) -> None:
    """Refuse a rule whose sizes this model cannot have.

    Raises:
        InvalidRankRuleError: the limit or the target, and what to ask for instead.
    """
    check_sizes(rule, state_dims(model), must_be_alike(find_layers(model), rule), checked_sizes(model, rule))


__all__ = ["check_model_sizes", "check_rule", "compress", "plan_on"]
