"""State dimensions of a model's layers: read, and given."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compressm.adapters import find_layers
from compressm.adapters.changes import write
from compressm.adapters.registry import candidates, cut_parameters, resized, tell_written
from compressm.errors import CheckpointError
from compressm.runtime.paging import layer_done
from compressm.theory.geometry import Geometry
from compressm.theory.rank_rule import RankRule
from compressm.theory.targets import check_target, legal_sizes


def state_dims(model: nn.Module) -> dict[str, int]:
    """State dimension of every layer that has a reducible state, by layer name."""
    return {name: adapter.state_dim(layer) for name, (layer, adapter) in find_layers(model).items()}


def geometries(model: nn.Module, every: bool = False) -> dict[str, Geometry]:
    """The geometry of every layer that has a reducible state, by layer name.

    Args:
        model: only read.
        every: also of layers that are left out, see `compressm.adapters.left_out`: they have their states too.
    """
    layers = find_layers(model)
    if every:
        layers = {name: (layer, adapter) for name, (layer, adapter) in candidates(model).items() if adapter is not None}
    found: dict[str, Geometry] = {}
    for name, (layer, adapter) in layers.items():
        found[name] = adapter.geometry(layer)
        layer_done()
    return found


def checked_sizes(
    model: nn.Module, rule: RankRule, dims: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]] | None:
    """The sizes that layers can have: multiples of their units, which the rule's target takes, if it has one.

    Args:
        model: only read.
        rule: with a target, or without.
        dims: state dimensions before the first cut; by default the present ones.

    Returns:
        by layer name; None if every layer can have any size.

    Raises:
        InvalidRankRuleError: a layer has no smaller size that the target takes.
    """
    if rule.target is None:
        return _in_units(model, None, dims)
    found = geometries(model)
    taken = check_target(
        rule.target, {name: one.resized((dims or {}).get(name, one.states)) for name, one in found.items()}
    )
    return _in_units(model, taken, dims)


def sizes_for(model: nn.Module, rule: RankRule) -> dict[str, tuple[int, ...]] | None:
    """As `checked_sizes`, for layers that may have been cut to their smallest size already."""
    if rule.target is None:
        return _in_units(model, None)
    target = rule.target
    return _in_units(model, {name: legal_sizes(target, geometry) for name, geometry in geometries(model).items()})


def _in_units(
    model: nn.Module, taken: Mapping[str, tuple[int, ...]] | None, dims: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]] | None:
    """The sizes that a target takes, as far as they are multiples of the layers' units; None if there is no limit."""
    possible = dict[str, tuple[int, ...]]() if taken is None else dict(taken)
    for name, (layer, adapter) in find_layers(model).items():
        if (unit := adapter.unit(layer)) > 1:
            top = (dims or {}).get(name, adapter.state_dim(layer))
            possible[name] = tuple(size for size in possible.get(name, range(unit, top + 1)) if size % unit == 0)
    return possible or None


def resized_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters whose shapes a cut changes."""
    return [p for layer, adapter in find_layers(model).values() for p in cut_parameters(layer, adapter).values()]


def resize_states(model: nn.Module, dims: Mapping[str, int]) -> None:
    """Resize layers to other state dimensions, so that a state dict of a compressed model fits. Load values afterwards.

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
            write(layer, resized(layer, adapter, states))
    tell_written(model)


__all__ = ["checked_sizes", "geometries", "resize_states", "resized_parameters", "sizes_for", "state_dims"]
