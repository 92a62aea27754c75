"""One reduction of one model: first a plan that can be printed, then a write, whole or not at all."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.adapters import Adapter, LayerAdapter, LayerChange, SelectiveAdapter, find_layers
from compressm.adapters.base import check_plain, layer_values, tell_written, write
from compressm.cutting.carry import Carry, carry_state, check_optimizer
from compressm.cutting.made_cuts import MadeCuts, linear_cut
from compressm.cutting.metrics import measure
from compressm.cutting.replay import Errors, errors_on_data
from compressm.cutting.spectrum import AnyBalancing, balance_layers, mean_hsv
from compressm.errors import CheckpointError, EvaluationError, InvalidRankRuleError, InvalidSystemError
from compressm.observing.held_out import Halves, gather_halves, halved, joined, twice_readable
from compressm.theory.balancing import Balancing, Method, Reduction
from compressm.theory.certificate import Certificate
from compressm.theory.pruning import SCORES, Score, prune
from compressm.theory.ranks import RankRule, check_choice, check_sizes, choose_ranks, passes_gate
from compressm.theory.recurrence import ErrorEstimate, Moments, SelectiveReduction, balance_selective
from compressm.theory.selection import Selection, reduce_selective


@dataclass(frozen=True)
class LayerReport:
    """What a reduction does to one layer.

    Attributes:
        name: the layer's name in the model.
        states_before, states_after: state dimension; equal where nothing is cut.
        outcome: ``"cut"``, ``"kept"`` (the rule asks for no cut worth making) or ``"refused"`` (the certificate
            failed).
        reason: why, in words, unless cut.
        certificate: of the truncation, or for a selective layer the error to expect of its recurrence; None where none
            was computed.
        hsv: Hankel singular values before the cut, decreasing; the mean over the systems of a layer that has several.
        energy_kept: share of the layer's Hankel energy that the cut which was made keeps, all its systems together;
            `RankRule.tolerance` promises it. See `SelectiveReduction.discarded` for selective layers. None without a
            cut, and where states were taken out as they are.
        error_on_data: relative error of the layer's output on the data that the cut was made from, measured by running
            the layer before and after on the same inputs, see `compressm.cutting.replay`. In training on the sequence
            that was observed last, and for selective layers only. None without a cut or without data.
        error_held_out: the same on data that the cut was not made from, what to expect on others: measured with cuts to
            as many states, made from half of the sequences each, on the other half. None where the cut does not depend
            on the data (time-invariant layers), or there is only one sequence, or in training.
        poles_before, poles_after: eigenvalues of a linear time-invariant layer that was cut; empty otherwise.
    """

    name: str
    states_before: int
    states_after: int
    outcome: str
    reason: str
    certificate: Certificate | ErrorEstimate | None
    hsv: tuple[float, ...]
    energy_kept: float | None = None
    error_on_data: float | None = None
    error_held_out: float | None = None
    poles_before: tuple[complex, ...] = ()
    poles_after: tuple[complex, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **self.__dict__,
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
            "hsv": [float(f"{value:.6g}") for value in self.hsv],
            "poles_before": _pairs(self.poles_before),
            "poles_after": _pairs(self.poles_after),
        }


def _pairs(values: tuple[complex, ...]) -> list[list[float]]:
    """Real and imaginary parts, to four places."""
    return [[round(value.real, 4), round(value.imag, 4)] for value in values]


@dataclass(frozen=True)
class Report:
    """What a reduction did to a model, layer by layer, and how long it took in seconds.

    ``print`` shows for every layer the error measured at its output on the data, and on held-out data; the error
    expected: of a linear
    time-invariant layer the relative H2 error, which is that under white noise, of a selective one the error of its
    recurrence, before the norm and the projection that follow; the H-infinity error and its bound.
    """

    layers: tuple[LayerReport, ...]
    seconds: float

    @property
    def cut(self) -> bool:
        """Whether any layer was cut."""
        return any(layer.outcome == "cut" for layer in self.layers)

    @property
    def state_dims(self) -> dict[str, int]:
        """State dimension of every layer afterwards."""
        return {layer.name: layer.states_after for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"seconds": self.seconds, "layers": [layer.to_dict() for layer in self.layers]}

    def __str__(self) -> str:
        titles = f"{'on data':>9} {'held out':>9} {'expected':>9} {'H∞ error':>10} {'bound':>10}"
        rows = [f"{'layer':32} {'states':>14} {titles}  outcome"]
        for layer in self.layers:
            dims, c = f"{layer.states_before} → {layer.states_after}", layer.certificate
            if isinstance(c, Certificate):
                numbers = f"{c.relative_h2_error:9.2e} {c.hinf_error:10.3e} {c.bound:10.3e}"
            else:
                numbers = f"{c.relative_error:9.2e} {'':21}" if c else f"{'':31}"
            measured = " ".join(
                f"{'' if value is None else f'{value:.2e}':>9}" for value in (layer.error_on_data, layer.error_held_out)
            )
            outcome = f"{layer.outcome}{': ' + layer.reason if layer.reason else ''}"
            rows.append(f"{layer.name:32} {dims:>14} {measured} {numbers}  {outcome}")
        return "\n".join(rows)


@dataclass(frozen=True)
class Plan:
    """A reduction that has been computed and certified, and not yet written."""

    report: Report
    changes: Mapping[str, LayerChange]

    def cpu(self) -> Plan:
        """The same plan with all tensors on the CPU, to be sent to other processes."""
        return replace(self, changes={name: change.cpu() for name, change in self.changes.items()})

    def measured(
        self,
        model: nn.Module,
        data: Any,
        halves: Halves | None = None,
        selection: Selection = "hankel",
    ) -> Plan:
        """The same plan, with the error of every layer on some data in its report; see `compressm.cutting.replay`.

        Args:
            model: that it was made for, not cut yet.
            data: what it was made from.
            halves: moments of both halves of these data, to measure on what is held out.
            selection: how states were picked.
        """
        started = time.perf_counter()
        by_halves = {} if halves is None else _changes_by_halves(model, self.changes, halves, selection)
        errors = errors_on_data(model, self.changes, data, by_halves)
        return self.with_errors(errors, time.perf_counter() - started)

    def with_errors(self, errors: Mapping[str, Errors], seconds: float = 0.0) -> Plan:
        """The same plan, with errors on data by layer name, and the time that it took to measure them."""
        layers = tuple(
            replace(layer, error_on_data=errors[layer.name].on_data, error_held_out=errors[layer.name].held_out)
            if layer.name in errors
            else layer
            for layer in self.report.layers
        )
        return replace(self, report=Report(layers, self.report.seconds + seconds))

    def apply(self, model: nn.Module, optimizer: Optimizer | None = None, carry: Carry = "transform") -> Report:
        """Write it into the model that it was planned for, and carry the optimizer's state over.

        Raises:
            UnsupportedOptimizerError: before anything is written, if the optimizer's state cannot be carried.
        """
        started = time.perf_counter()
        layers = {name: model.get_submodule(name) for name in self.changes}
        if optimizer is not None:
            check_optimizer(optimizer, layers, carry)
        for name, change in self.changes.items():
            write(layers[name], change)
            if optimizer is not None:
                carry_state(optimizer, layers[name], change, carry)
        tell_written(model)
        return replace(self.report, seconds=self.report.seconds + time.perf_counter() - started)


def plan_reduction(
    model: nn.Module,
    rule: RankRule,
    method: Method = "real",
    *,
    moments: Mapping[str, Moments] | None = None,
    selection: Selection = "hankel",
    balancings: Mapping[str, AnyBalancing] | None = None,
    cuts: MadeCuts | None = None,
) -> Plan:
    """Balance every layer, choose the ranks, truncate, certify. Nothing is written.

    Args:
        model: the model.
        rule: what decides the state dimensions.
        method: real-part aware or complex truncation of linear time-invariant layers.
        moments: of the selective layers.
        selection: how their states are picked, see `selection`. In linear time-invariant layers the largest Hankel
            singular values are kept, but for ``"smallest"`` and ``"random"``; ``"modal"``, ``"hinf"``, ``"energy"``
            and ``"random_modes"`` leave out states as they are, see `pruning`. All of these are there for comparison.
        balancings: from `balance_layers` on the model as it is now, if at hand, instead of ``moments``.
        cuts: of these balancings, where several plans are made from them.

    Raises:
        InvalidRankRuleError: an unknown method or selection, or a budget that is too small.
        InvalidSystemError: a layer's parameters or moments are not finite.
    """
    started = time.perf_counter()
    check_choice("method", method, Method)
    check_choice("selection", selection, Selection)
    layers = find_layers(model)
    for name, (layer, _) in layers.items():
        for parameter, value in layer_values(layer).items():
            if not bool(value.isfinite().all()):
                raise InvalidSystemError(
                    f"{name}.{parameter} is not finite: the model has diverged, or was trained on data that are not "
                    "finite; look at the data first, then go back to a checkpoint from before that, or lower the "
                    "learning rate"
                )
    balancings = balance_layers(model, method, moments) if balancings is None else balancings
    cuts = MadeCuts(layers, balancings, selection) if cuts is None else cuts
    energies = {name: balancing.energy for name, balancing in balancings.items()}
    alike = _alike(layers, rule)
    ranks = choose_ranks(energies, rule, discards=cuts.discards(), alike=alike)
    shared = _shared_parameters(model)
    reports: list[LayerReport] = []
    changes: dict[str, LayerChange] = {}
    for name, (layer, adapter) in layers.items():
        balancing, present = balancings[name], adapter.state_dim(layer)
        report = LayerReport(name, present, present, "kept", "", None, tuple(mean_hsv(balancing).tolist()))
        change = None
        if not passes_gate(present, ranks[name], rule):
            report = replace(report, reason=_gate(present, rule))
        elif isinstance(adapter, Adapter) and isinstance(balancing, Balancing):
            report, change = _plan_linear(report, layer_values(layer), adapter, balancing, ranks[name], rule, selection)
        elif isinstance(adapter, SelectiveAdapter):
            report, change = _plan_selective(report, layer, adapter, cuts.reduction(name, ranks[name]))
        if change is not None and (other := _also_used(shared, layer, change)):
            reason = f"{other[0]} is also {other[1]}, which would change with it"
            report = replace(report, states_after=present, outcome="refused", reason=reason, energy_kept=None)
            change = None
        if change is not None:
            changes[name] = change
        reports.append(report)
    refused = [report.name for report in reports if report.outcome == "refused" and report.name in alike]
    if refused:  # one stays, so all stay
        reason = f"{refused[0]} was refused, and the layers of this model share one state dimension"
        for index, report in enumerate(reports):
            if changes.keys() & {report.name} & set(alike):
                del changes[report.name]
                reports[index] = replace(
                    report, states_after=report.states_before, outcome="refused", reason=reason, energy_kept=None
                )
    return Plan(Report(tuple(reports), time.perf_counter() - started), changes)


def _alike(layers: Mapping[str, tuple[nn.Module, LayerAdapter]], rule: RankRule) -> list[str]:
    """The layers that must share one state dimension."""
    return [] if rule.per_layer else [name for name, (_, adapter) in layers.items() if adapter.uniform]


def _shared_parameters(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The parameters that several modules have, by their ``id``: those modules, and the full names in them."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    return {key: found for key, found in owners.items() if len(found) > 1}


def _also_used(
    shared: Mapping[int, list[tuple[nn.Module, str]]], layer: nn.Module, change: LayerChange
) -> tuple[str, str] | None:
    """A parameter that a change writes and that a module outside of the layer has too: its two names."""
    inside = set(layer.modules())
    for name in change.values():
        for module, other in shared.get(id(layer.get_parameter(name)), ()):
            if module not in inside:
                return name, other
    return None


def _gate(present: int, rule: RankRule) -> str:
    return f"less than {rule.min_reduction:.0%} of {present} states would go"


def _plan_selective(
    report: LayerReport, layer: nn.Module, adapter: SelectiveAdapter, reduction: SelectiveReduction
) -> tuple[LayerReport, LayerChange | None]:
    estimate = reduction.estimate
    if not estimate.valid:
        return replace(report, outcome="refused", reason="; ".join(estimate.failures), certificate=estimate), None
    change = adapter.plan(layer_values(layer), reduction)
    report = replace(report, states_after=reduction.states, outcome="cut", certificate=estimate)
    return replace(report, energy_kept=estimate.energy_kept), change


def _changes_by_halves(
    model: nn.Module, changes: Mapping[str, LayerChange], halves: Halves, selection: Selection
) -> dict[str, tuple[LayerChange, LayerChange]]:
    """Of the selective layers among those that are cut: what each half of the data alone would write, with as many
    states."""
    found: dict[str, tuple[LayerChange, LayerChange]] = {}
    for name, (layer, adapter) in find_layers(model).items():
        if name in changes and isinstance(adapter, SelectiveAdapter) and halved(halves, name):
            smaller = copy.deepcopy(layer)
            write(smaller, changes[name])
            states, (into, out, rotates) = adapter.state_dim(smaller), adapter.maps(layer)
            first, second = (
                reduce_selective(balance_selective(half[name]), states, into, out, selection, rotates=rotates)
                for half in halves
            )
            values = layer_values(layer)
            found[name] = (adapter.plan(values, first), adapter.plan(values, second))
    return found


def _plan_linear(
    report: LayerReport,
    values: Mapping[str, Tensor],
    adapter: Adapter,
    balancing: Balancing,
    states: int,
    rule: RankRule,
    selection: Selection,
) -> tuple[LayerReport, LayerChange | None]:
    present = report.states_before
    pruned = selection in SCORES
    if pruned:
        reduction = prune(balancing.system, states, cast("Score", selection))
    else:
        ordered = balancing.rearranged(selection) if selection in ("smallest", "random") else balancing
        reduction = linear_cut(ordered, states, rule, promises=ordered is balancing)
    if reduction is None or not passes_gate(present, reduction.system.n, rule):
        return replace(report, reason=_gate(present, rule)), None
    certificate = reduction.certificate
    if not certificate.valid:
        return replace(report, outcome="refused", reason="; ".join(certificate.failures), certificate=certificate), None
    change = adapter.plan(values, reduction)
    # What the layer will really compute, after rounding to its dtype and parametrisation, must be the certified system.
    try:
        written = adapter.read({**values, **change.values()})
        roundings = reduction.system.minus(written).h2_norm()
    except InvalidSystemError as error:
        return replace(report, outcome="refused", reason=f"after rounding: {error}", certificate=certificate), None
    certificate = replace(certificate, rounding_error=float(roundings.max()))
    if (excess := _rounds_too_much(roundings, reduction, values)) is not None:
        reason = f"rounding to the layer's dtype adds an H2 error of {excess:.3g}, more than the truncation's own"
        return replace(report, outcome="refused", reason=reason, certificate=certificate), None
    before, reduced = (tuple(system.lam.flatten().tolist()) for system in (balancing.system, reduction.system))
    energy = float(balancing.hsv.sum())
    share = float(reduction.discarded.sum()) / energy if energy > 0 else 0.0  # of nothing, nothing goes
    kept = None if pruned else max(0.0, 1 - share)
    report = replace(report, states_after=reduction.system.n, outcome="cut", certificate=certificate, energy_kept=kept)
    return replace(report, poles_before=before, poles_after=reduced), change


def _rounds_too_much(roundings: Tensor, reduction: Reduction, values: Mapping[str, Tensor]) -> float | None:
    """The first H2 error by rounding, shape ``(*batch,)``, that is more than its own system's cut and than a thousandth
    of that system, and than what rounding does to the largest system of the layer; None where there is none."""
    eps = max(torch.finfo(value.dtype).eps for value in values.values() if value.is_floating_point())
    least = eps * max(one.h2_norm for one in reduction.certificates)
    for rounding, one in zip(roundings.reshape(-1).tolist(), reduction.certificates, strict=True):
        if rounding > max(1e-3 * one.h2_norm, one.h2_error, least):
            return rounding
    return None


def compress(
    model: nn.Module,
    *,
    tolerance: float | None = None,
    states: int | None = None,
    fraction: float | None = None,
    max_error: float | None = None,
    total_states: int | None = None,
    max_drop: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    multiple_of: int = 1,
    min_reduction: float = 0.0,
    per_layer: bool = False,
    method: Method = "real",
    selection: Selection = "hankel",
    data: Any = None,
    optimizer: Optimizer | None = None,
    carry: Carry = "transform",
) -> Report:
    """Reduce a model once, in place. Exactly one of the first six arguments says how far; see `RankRule`.

    Args:
        model: any module with layers that compressm knows.
        tolerance: the share of the Hankel energy that may be discarded in each layer.
        states: at most this many states in each layer.
        fraction: at most this fraction of each layer's states.
        max_error: H-infinity error allowed in each layer, in units of output per input.
        total_states: budget over all layers together.
        max_drop: as far as ``evaluate`` loses no more than this, right after the cut; the largest tolerance that does
            is found by bisection, in about ten evaluations.
        evaluate: ``evaluate(model)`` returns the metric, higher is better.
        multiple_of: prefer state dimensions that are a multiple of this: the next larger one under a rule about
            quality, the next smaller one under an upper limit; see `RankRule`.
        min_reduction: leave a layer alone unless this share of its states goes.
        per_layer: let the layers of a Hugging Face model differ in their state dimension; see `RankRule`.
        method: ``"real"`` or ``"complex"``, for linear time-invariant layers.
        selection: how the states of selective layers are picked; see `compressm.theory.selection`.
        data: a batch of the model's inputs, or an iterable of batches, which selective layers need; see
            `compressm.observing.inputs` for the forms. All of their tokens count. They are read twice, the second time
            to measure `LayerReport.error_on_data` and `error_held_out`; batches that might come in another order then,
            as from a `DataLoader` that shuffles, are kept in memory meanwhile where the model has selective layers.
        optimizer: if given, its state is carried over to the new parameters.
        carry: how; see `compressm.cutting.carry`.

    Returns:
        what happened to each layer, with its certificate. A layer whose certificate fails stays as it was.

    Raises:
        InvalidRankRuleError, UnsupportedModelError, UnsupportedOptimizerError, InvalidSystemError, EvaluationError,
            ConfigError (data that the model cannot take): the model is as it was.
    """
    if (max_drop is None) != (evaluate is None):
        raise InvalidRankRuleError(
            "max_drop and evaluate go together: the loss allowed, and the function that measures it"
        )
    check_choice("carry", carry, Carry)
    check_choice("method", method, Method)
    check_choice("selection", selection, Selection)
    searching = max_drop is not None
    if searching and any(value is not None for value in (tolerance, states, fraction, max_error, total_states)):
        raise InvalidRankRuleError("give either max_drop or a size or error rule, not both")
    rule = RankRule(
        tolerance=0.0 if searching else tolerance,
        states=states,
        fraction=fraction,
        max_error=max_error,
        total_states=total_states,
        multiple_of=multiple_of,
        min_reduction=min_reduction,
        per_layer=per_layer,
    )
    layers = find_layers(model)
    check_sizes(rule, state_dims(model), _alike(layers, rule))
    plain = {name: layer for name, (layer, _) in layers.items()}
    check_plain(plain)
    if optimizer is not None:
        check_optimizer(optimizer, plain, carry)
    batches = None if data is None else twice_readable(model, data)
    halves = None if batches is None else gather_halves(model, batches)
    moments = None if halves is None else joined(halves)
    if max_drop is not None and evaluate is not None:
        balancings = balance_layers(model, method, moments)
        plan = _largest_harmless(model, rule, balancings, selection, max_drop, evaluate)
    else:
        plan = plan_reduction(model, rule, method, moments=moments, selection=selection)
    if batches is not None:
        plan = plan.measured(model, batches, halves, selection)
    return plan.apply(model, optimizer, carry)


def _largest_harmless(
    model: nn.Module,
    rule: RankRule,
    balancings: Mapping[str, AnyBalancing],
    selection: Selection,
    max_drop: float,
    evaluate: Callable[[nn.Module], float],
) -> Plan:
    """The plan with the largest tolerance at which the metric loses at most ``max_drop``; the model stays as it was."""
    dims, saved = state_dims(model), copy.deepcopy(model.state_dict())
    reference = measure(model, evaluate)
    if not math.isfinite(reference):
        raise EvaluationError(
            f"evaluate returned {reference} before anything was cut, and no loss can be held against that; expected a "
            "finite number: see that weights, data and the metric itself are finite"
        )
    cuts = MadeCuts(find_layers(model), balancings, selection)

    def planned(tolerance: float) -> Plan:
        wanted = replace(rule, tolerance=tolerance)
        return plan_reduction(model, wanted, balancings=balancings, selection=selection, cuts=cuts)

    best = planned(0.0)  # only states that carry nothing
    low, high = 1e-5, 0.99
    for _ in range(10):
        middle = (low * high) ** 0.5
        plan = planned(middle)
        plan.apply(model)
        try:
            metric = measure(model, evaluate)
            harmless = math.isfinite(metric) and metric >= reference - max_drop
        finally:
            resize_states(model, dims)
            model.load_state_dict(saved)
        if harmless:
            low, best = middle, plan
        else:
            high = middle
    return best


def state_dims(model: nn.Module) -> dict[str, int]:
    """State dimension of every layer that has a reducible state, by layer name."""
    return {name: adapter.state_dim(layer) for name, (layer, adapter) in find_layers(model).items()}


def resize_states(model: nn.Module, dims: Mapping[str, int]) -> None:
    """Give layers other state dimensions, so that a state dict of a compressed model fits. Values are to be loaded
    next.

    Raises:
        CheckpointError: the names are not those of the model's layers.
    """
    layers = find_layers(model)
    if set(dims) != set(layers):
        raise CheckpointError(
            f"the checkpoint's layers {sorted(dims)} are not the model's {sorted(layers)}: "
            "build the model it was saved from"
        )
    for name, states in dims.items():
        layer, adapter = layers[name]
        if adapter.state_dim(layer) != states:
            write(layer, adapter.resized(layer, states))
    tell_written(model)
