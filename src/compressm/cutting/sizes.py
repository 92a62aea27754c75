"""State dimensions of a model's layers: read, and given."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compressm.adapters import find_layers
from compressm.adapters.base import cut_parameters, resized, tell_written, write
from compressm.errors import CheckpointError


def state_dims(model: nn.Module) -> dict[str, int]:
    """State dimension of every layer that has a reducible state, by layer name."""
    return {name: adapter.state_dim(layer) for name, (layer, adapter) in find_layers(model).items()}


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


__all__ = ["resize_states", "resized_parameters", "state_dims"]
