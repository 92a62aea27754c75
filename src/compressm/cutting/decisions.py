"""What is decided about every layer of a model before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from compressm.adapters import LayerAdapter, LayerChange
from compressm.adapters.cuts import PICKS, Pick
from compressm.cutting.made_cuts import MadeCuts
from compressm.cutting.report import LayerReport
from compressm.errors import UnsupportedModelError
from compressm.theory.balancing import Reduction
from compressm.theory.fisher import MaskEstimate
from compressm.theory.rank_rule import RankRule
from compressm.theory.ranks import keeps_promise, passes_gate
from compressm.theory.recurrence import SelectiveReduction

Layers = Mapping[str, tuple[nn.Module, LayerAdapter]]


class Decision(NamedTuple):
    """A layer's report, what is to be written, and the reduction behind it."""

    report: LayerReport
    change: LayerChange | None = None
    reduction: Reduction | SelectiveReduction | None = None


# Parameters that several modules share, by `id`: these modules, and their names in them.
_Owners = Mapping[int, list[tuple[nn.Module, str]]]


def decide(kept: LayerReport, cuts: MadeCuts, states: int, rule: RankRule, held: bool) -> Decision:
    """The decision about a layer for which a rule chose ``states`` states.

    Args:
        kept: the layer's report if it is not cut.
        held: whether these are more states than the rule asks for, as ``max_reduction`` allows no fewer.
    """
    present = kept.states_before
    proposal = cuts.proposal(kept.name, states, rule) if passes_gate(present, states, rule) else None
    if proposal is None:
        return Decision(replace(kept, reason=_why_kept(present, states, rule)))
    known = replace(kept, certificate=proposal.certificate)
    if proposal.change is None:
        return Decision(replace(known, outcome="refused", reason=proposal.reason))
    reason = f"a cut removes at most {rule.max_reduction:.0%} of a layer's states (max_reduction)" if held else ""
    report = replace(
        known, outcome="cut", reason=reason, states_after=proposal.states, energy_kept=proposal.energy_kept
    )
    report = replace(report, poles_before=proposal.poles_before, poles_after=proposal.poles_after)
    return Decision(report, proposal.change, proposal.reduction)


def repicked(
    decided: Mapping[str, Decision], cuts: MadeCuts, energies: Mapping[str, Tensor], rule: RankRule
) -> tuple[str, dict[Pick, dict[str, Decision]]]:
    """How the states of selective layers were picked, and the same sizes with states picked by every other criterion.

    Args:
        decided: by layer name.
        cuts: of these layers.
        energies: as for `choose_ranks`, by layer name.
        rule: a criterion that breaks its promise in some layer is left out. The size was found for the first criterion,
            and another one may discard more energy at it.

    Returns:
        a `Pick`, or ``"mixed"`` if layers differ; and decisions by criterion. Both are empty where no layer leaves a
        choice.
    """
    own: set[Pick] = set()
    broken: set[Pick] = set()
    others: dict[Pick, dict[str, Decision]] = {by: dict(decided) for by in PICKS}
    for name, one in decided.items():
        for by in PICKS:
            proposal = None if one.change is None else cuts.picked(name, one.report.states_after, by)
            if proposal is None or proposal.change is None or not isinstance(one.reduction, SelectiveReduction):
                continue
            own.add("fisher" if isinstance(one.reduction.estimate, MaskEstimate) else "moments")
            report = replace(one.report, certificate=proposal.certificate, energy_kept=proposal.energy_kept)
            others[by][name] = Decision(report, proposal.change, proposal.reduction)
            discarded = None if proposal.reduction is None else proposal.reduction.discarded
            if rule.guarantees_error and discarded is not None and not keeps_promise(discarded, energies[name], rule):
                broken.add(by)
    if not own:
        return "", {}
    (first, *more) = own
    left: dict[Pick, dict[str, Decision]] = {
        by: other for by, other in others.items() if own != {by} and by not in broken
    }
    return "mixed" if more else first, left


def _why_kept(present: int, states: int, rule: RankRule) -> str:
    """Why a layer is not cut: no cut of its ``present`` states, of which a rule chose ``states``, passes the gate."""
    least = max(1, math.ceil(rule.min_reduction * present))
    if states == present or least == 1:
        return f"the rule keeps all {present} states"
    return f"fewer than {least} of {present} states would go (min_reduction={rule.min_reduction:g})"


def unless_shared(decision: Decision, layer: nn.Module, shared: _Owners) -> Decision:
    """The decision, refused if it writes a parameter that is shared with a module outside the layer."""
    other = None if decision.change is None else _also_used(shared, layer, decision.change)
    if other is None:
        return decision
    return Decision(refused(decision.report, f"{other[0]} is also {other[1]}, which would change with it"))


def unshared(model: nn.Module, name: str, change: LayerChange) -> LayerChange:
    """A change of a layer, unless it writes a parameter that is shared with a module outside the layer.

    Raises:
        UnsupportedModelError: the parameter and its other name.
    """
    other = _also_used(shared_parameters(model), model.get_submodule(name), change)
    if other is not None:
        raise UnsupportedModelError(
            f"{name}.{other[0]} is also {other[1]}, which would change with it: give both a parameter of their own"
        )
    return change


def all_or_none(decided: Mapping[str, Decision], alike: Sequence[str]) -> dict[str, Decision]:
    """The decisions, with no cut in layers that must share one state dimension if one of them cannot be cut."""
    failed = [name for name in decided if name in alike and decided[name].report.outcome == "refused"]
    if not failed:
        return dict(decided)
    reason = f"{failed[0]} was refused, and the layers of this model share one state dimension"
    return {
        name: Decision(refused(one.report, reason)) if name in alike and one.change is not None else one
        for name, one in decided.items()
    }


def refused(report: LayerReport, reason: str) -> LayerReport:
    return replace(report, states_after=report.states_before, outcome="refused", reason=reason, energy_kept=None)


def must_be_alike(layers: Layers, rule: RankRule) -> list[str]:
    """The layers that must share one state dimension."""
    return [] if rule.per_layer else [name for name, (_, adapter) in layers.items() if adapter.uniform]


def shared_parameters(model: nn.Module) -> _Owners:
    """Parameters that several modules share, by ``id``: these modules, and the parameter's full names in them."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    return {key: found for key, found in owners.items() if len(found) > 1}


def _also_used(shared: _Owners, layer: nn.Module, change: LayerChange) -> tuple[str, str] | None:
    """The two names of a parameter that a change writes and that is shared with a module outside the layer."""
    inside = set(layer.modules())
    for name in change.values():
        for module, other in shared.get(id(layer.get_parameter(name)), ()):
            if module not in inside:
                return name, other
    return None


__all__ = [
    "Decision",
    "Layers",
    "all_or_none",
    "decide",
    "must_be_alike",
    "refused",
    "repicked",
    "shared_parameters",
    "unless_shared",
    "unshared",
]
