"""The plan of a cut: decided and certified for every layer, then written completely or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.adapters import LayerAdapter, LayerChange, find_layers, layer_values, layers_that_need_data
from compressm.adapters.changes import write
from compressm.adapters.cuts import PICKS, Pick
from compressm.adapters.registry import tell_written
from compressm.cutting.carry import Carry, Together, check_optimizer, prepare_carry
from compressm.cutting.decisions import (
    Decision,
    Layers,
    all_or_none,
    decide,
    must_be_alike,
    refused,
    repicked,
    shared_parameters,
    unless_shared,
)
from compressm.cutting.held_base import hold_cut_base
from compressm.cutting.made_cuts import MadeCuts
from compressm.cutting.matching import matched
from compressm.cutting.nats import damage_curves, predicted_rises
from compressm.cutting.replay import Errors, errors_on_data
from compressm.cutting.report import LayerReport, Report
from compressm.cutting.rise import Rise
from compressm.cutting.sizes import sizes_for
from compressm.cutting.spectrum import balance_layers
from compressm.errors import InvalidSystemError
from compressm.observing.damage import changes_of, divergence
from compressm.observing.held_out import Halves, halved
from compressm.observing.loss_evidence import LossEvidence
from compressm.runtime.paging import layer_done
from compressm.theory.balanced import Balanced
from compressm.theory.balancing import Method, Reduction
from compressm.theory.fisher import MaskFisher
from compressm.theory.possible_sizes import above_limit
from compressm.theory.rank_rule import RankRule, check_choice
from compressm.theory.ranks import choose_ranks
from compressm.theory.recurrence import Moments
from compressm.theory.selection import Selection

# How often the allowance of a cut is halved if the prediction for the cut as made is above it.
_HALVINGS = 6
# What the report of a layer holds about its cut, where the cut is not made after all.
_NOT_CUT: dict[str, Any] = {"poles_before": (), "poles_after": (), "predicted_loss": None, "matched": None}


@dataclass(frozen=True)
class Plan:
    """A cut of a model that is computed and certified, but not written yet.

    Attributes:
        report: what it does.
        changes: by layer name.
        pick: how the states were picked in layers that leave a choice: a `Pick`, or ``"mixed"``; empty without such
            layers, and where it was not asked for.
        others: plans of the same sizes with states picked otherwise; see `compressm.cutting.picking`.
    """

    report: Report
    changes: Mapping[str, LayerChange]
    pick: str = ""
    others: Mapping[Pick, Plan] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        return f"<div>A plan; nothing is written yet.</div>{self.report._repr_html_()}"  # pyright: ignore[reportPrivateUsage]

    def cpu(self) -> Plan:
        """The same plan with all tensors on the CPU, for other processes."""
        changes = {name: change.cpu() for name, change in self.changes.items()}
        return replace(self, changes=changes, others={by: one.cpu() for by, one in self.others.items()})

    def measured(
        self,
        model: nn.Module,
        data: Any,
        halves: Halves | None = None,
        selection: Selection = "hankel",
        fishers: Mapping[str, MaskFisher] | None = None,
    ) -> Plan:
        """The same plan, with the error of every layer on some data in its report; see `compressm.cutting.replay`.

        Args:
            model: the model of this plan, not cut yet.
            data: the data of this plan.
            halves: moments of both halves of these data, for the error on held-out data.
            selection, fishers: how states were picked. The Fisher matrices are those of all data.
        """
        started = time.perf_counter()
        by_halves = {} if halves is None else self._by_halves(model, halves, selection, fishers or {})
        errors = errors_on_data(model, self.changes, data, by_halves)
        return self.with_errors(errors, time.perf_counter() - started)

    def with_errors(self, errors: Mapping[str, Errors], seconds: float = 0.0) -> Plan:
        """The same plan, with errors on data by layer name, and the seconds that the measurement took."""
        layers = tuple(
            replace(layer, error_on_data=errors[layer.name].on_data, error_held_out=errors[layer.name].held_out)
            if layer.name in errors
            else layer
            for layer in self.report.layers
        )
        return replace(self, report=replace(self.report, layers=layers, seconds=self.report.seconds + seconds))

    def with_rise(self, rise: Rise) -> Plan:
        """The same plan, with the measured rise of the loss in its report."""
        report = replace(self.report, measured_loss=rise.nats, measured_loss_error=rise.standard_error)
        return replace(self, report=report)

    def with_metrics(self, before: float, after: float) -> Plan:
        """The same plan, with the metric before and after its cut in its report."""
        return replace(self, report=replace(self.report, metric_before=before, metric_after=after))

    def withdrawn(self, reason: str) -> Plan:
        """A plan that cuts nothing, with the reason in the reports of the layers that this one would cut."""
        layers = tuple(
            replace(refused(one, reason), outcome="kept", **_NOT_CUT) if one.outcome == "cut" else one
            for one in self.report.layers
        )
        predicted = None if self.report.predicted_loss is None else 0.0
        return Plan(replace(self.report, layers=layers, predicted_loss=predicted), {})

    def apply(
        self, model: nn.Module, optimizer: Optimizer | Together | None = None, carry: Carry = "transform"
    ) -> Report:
        """Write the plan into its model, and carry the optimizer's state over.

        Raises:
            UnsupportedOptimizerError: the optimizer's state cannot be carried over. Nothing is written then.
        """
        started = time.perf_counter()
        layers = {name: model.get_submodule(name) for name in self.changes}
        stores: dict[str, Callable[[], None]] = {}
        if optimizer is not None:
            check_optimizer(optimizer, layers, carry)
            stores = {
                name: prepare_carry(optimizer, dict(layers[name].named_parameters()), change, carry, name)
                for name, change in self.changes.items()
            }
        for name, change in self.changes.items():
            write(layers[name], change)
            if name in stores:
                stores[name]()
        tell_written(model)
        hold_cut_base(model)
        return replace(self.report, seconds=self.report.seconds + time.perf_counter() - started)

    def _by_halves(
        self, model: nn.Module, halves: Halves, selection: Selection, fishers: Mapping[str, MaskFisher]
    ) -> dict[str, tuple[LayerChange, LayerChange]]:
        """For layers whose cuts are computed from data: the changes computed from each half of the data alone, to the
        same number of states."""
        states = self.report.state_dims
        found: dict[str, tuple[LayerChange, LayerChange]] = {}
        for name, (layer, adapter) in layers_that_need_data(model).items():
            if name not in self.changes or not halved(halves, name):
                continue
            rule = RankRule(states=states[name])
            cuts = [
                adapter.cuts(layer, adapter.balance(layer, half[name]), selection, fishers.get(name)) for half in halves
            ]
            first, second = (
                (one.picked(states[name], self.pick) if self.pick in PICKS else None)
                or one.proposal(states[name], rule)
                for one in cuts
            )
            if first and second and first.change and second.change:
                found[name] = first.change, second.change
        return found


def plan_reduction(
    model: nn.Module,
    rule: RankRule,
    method: Method = "real",
    *,
    moments: Mapping[str, Moments] | None = None,
    selection: Selection = "hankel",
    balancings: Mapping[str, Balanced] | None = None,
    cuts: MadeCuts | None = None,
    loss: LossEvidence | None = None,
    match_steps: int = 0,
    others: bool = False,
) -> Plan:
    """Balance every layer, choose the ranks, truncate, certify. Nothing is written.

    Args:
        model: the model.
        rule: decides the state dimensions.
        method: real-part aware or complex truncation of linear time-invariant layers.
        moments: of the selective layers.
        selection: how states of selective layers are picked, see `selection`. Linear time-invariant layers keep the
            largest Hankel singular values, with exceptions for comparison: ``"smallest"`` and ``"random"``; and
            ``"modal"``, ``"hinf"``, ``"energy"`` and ``"random_modes"``, which remove states without a change of basis,
            see `pruning`.
        balancings: from `balance_layers` on the present model, if available, instead of ``moments``.
        cuts: of these balancings, to share them between several plans.
        loss: evidence from data and the loss. It balances the linear layers in place of white noise, picks the states
            of selective layers, and predicts the rise of the loss, which ``max_loss`` and ``total_states`` use.
        match_steps: steps in which cut linear layers learn the outputs of the old ones on the samples of ``loss``; see
            `compressm.cutting.matching`.
        others: also plan cuts to the same sizes whose states are picked otherwise.

    Raises:
        InvalidRankRuleError: an unknown method or selection, or a budget that is too small.
        InvalidSystemError: a layer's parameters or moments are not finite.
    """
    started = time.perf_counter()
    check_choice("method", method, Method)
    check_choice("selection", selection, Selection)
    layers = find_layers(model)
    _check_finite(layers)
    if balancings is None:
        balancings = balance_layers(model, method, moments, None if loss is None else loss.covariances)
    cuts = MadeCuts(layers, balancings, selection, None if loss is None else loss.fishers) if cuts is None else cuts
    damages = None
    if loss is not None and (rule.max_loss is not None or rule.total_states is not None):
        damages = damage_curves(layers, balancings, cuts, loss)
    decided_by = partial(_decided, model, layers, balancings, cuts, damages, loss, match_steps)
    decided = decided_by(rule)
    plan, allowed, within = _of(decided, layers, loss), rule, rule.max_loss
    for _ in range(_HALVINGS):
        if within is None or allowed.max_loss is None or (plan.report.predicted_loss or 0.0) <= within:
            break
        allowed = replace(allowed, max_loss=allowed.max_loss / 2)
        decided = decided_by(allowed)
        plan = _of(decided, layers, loss)
    if within is not None and not (plan.report.predicted_loss or 0.0) <= within:
        plan = plan.withdrawn("the predicted rise of the loss was above max_loss for every cut that was tried")
    elif others:
        pick, otherwise = repicked(decided, cuts, {name: one.energy for name, one in balancings.items()}, rule)
        plan = replace(plan, pick=pick, others={by: _of(one, layers, loss, by) for by, one in otherwise.items()})
    return replace(plan, report=replace(plan.report, seconds=time.perf_counter() - started))


def _decided(
    model: nn.Module,
    layers: Layers,
    balancings: Mapping[str, Balanced],
    cuts: MadeCuts,
    damages: Mapping[str, Tensor] | None,
    loss: LossEvidence | None,
    match_steps: int,
    rule: RankRule,
) -> dict[str, Decision]:
    """What one rule decides about every layer."""
    alike = must_be_alike(layers, rule)
    energies = {name: balancing.energy for name, balancing in balancings.items()}
    legal = sizes_for(model, rule)
    ranks = choose_ranks(energies, rule, discards=cuts.discards(), alike=alike, damages=damages, legal=legal)
    held = above_limit(rule, {name: energy.shape[-1] for name, energy in energies.items()}, ranks)
    shared = shared_parameters(model)
    decided: dict[str, Decision] = {}
    for name, (layer, adapter) in layers.items():
        present, hsv = adapter.state_dim(layer), tuple(balancings[name].mean_hsv().tolist())
        kept = LayerReport(name, present, present, "kept", "", None, hsv)
        decided[name] = unless_shared(decide(kept, cuts, ranks[name], rule, name in held), layer, shared)
    decided = all_or_none(decided, alike)
    if loss is not None and match_steps:
        decided = {name: _matched(one, *layers[name], cuts, loss, match_steps) for name, one in decided.items()}
    return decided


def _of(decided: Mapping[str, Decision], layers: Layers, loss: LossEvidence | None, pick: str = "") -> Plan:
    """The plan of some decisions."""
    changes = {name: one.change for name, one in decided.items() if one.change is not None}
    return Plan(_reported(decided, layers, loss), changes, pick)


def _reported(decided: Mapping[str, Decision], layers: Layers, loss: LossEvidence | None) -> Report:
    """The report of some decisions, with the predicted rise of the loss."""
    reports = {name: one.report for name, one in decided.items()}
    if loss is None:
        return Report(tuple(reports.values()), 0.0)
    reductions = {name: one.reduction for name, one in decided.items() if one.change and one.reduction is not None}
    together, alone = predicted_rises(layers, reductions, loss)
    for name, rise in alone.items():
        reports[name] = replace(reports[name], predicted_loss=rise)
    return Report(tuple(reports.values()), 0.0, together)


def _check_finite(layers: Layers) -> None:
    """Refuse a model that has diverged."""
    for name, (layer, _) in layers.items():
        for parameter, value in layer_values(layer).items():
            if not bool(value.isfinite().all()):
                raise InvalidSystemError(
                    f"{name}.{parameter} is not finite: the model has diverged, or was trained on data that are not "
                    "finite; look at the data first, then go back to a checkpoint from before that, or lower the "
                    "learning rate"
                )
        layer_done()


def _matched(
    decision: Decision, layer: nn.Module, adapter: LayerAdapter, cuts: MadeCuts, loss: LossEvidence, steps: int
) -> Decision:
    """The decision, with the change of a linear layer that has learnt the old one's outputs. It stays as it was if the
    loss is predicted to rise more by that."""
    name, states, change = decision.report.name, decision.report.states_after, decision.change
    passes = loss.samples.get(name, ())
    calls = [call for one in passes if not isinstance(one, Tensor) for call in one]
    if change is None or not isinstance(decision.reduction, Reduction) or not calls:
        return decision
    found = cuts.matched(name, states, lambda: matched(layer, adapter, change, calls, steps))
    if found is None:
        return decision
    reduction = replace(decision.reduction, system=found.system)
    rise, rise_matched = (
        divergence([changes_of(layer, adapter.system(layer), one, passes)]) for one in (decision.reduction, reduction)
    )
    if rise_matched > rise:
        return decision
    poles = tuple(found.system.lam.flatten().tolist())
    report = replace(decision.report, matched=(found.before, found.after), poles_after=poles)
    return Decision(report, found.change, reduction)


__all__ = ["Plan", "plan_reduction"]
