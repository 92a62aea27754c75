"""The change that a cut makes to a layer, as a value, and the function that writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterChange:
    """New values for parameters that share one state axis, and how gradients on the old ones map to the new.

    The parameters ``names`` (for example real and imaginary part) are concatenated along ``axis``, their state axis. On
    the kept subspace the old values are ``old = pullback^T new``. Gradients are covectors, so a gradient with respect
    to the new values is ``pullback @ gradient``.

    Attributes:
        names: parameter names, relative to the layer.
        values: new values in the same order, of the parameters' dtype and device.
        axis: the state axis of each parameter.
        pullback: maps gradient-like optimizer state (momentum, first moments), shape ``(new, old)`` of the
            concatenation; dense or sparse. If every channel has states of its own, shape ``(*before, new, old)``, one
            matrix for each index of the dimensions before ``axis``.
        pullback_squared: maps squared-gradient state (second moments), non-negative, same shape.
    """

    names: tuple[str, ...]
    values: tuple[Tensor, ...]
    axis: int
    pullback: Tensor
    pullback_squared: Tensor


@dataclass(frozen=True)
class LayerChange:
    """Everything that a cut writes into one layer: parameters, and plain attributes such as a stored state dimension.

    Names are relative to the layer and may reach into its submodules: ``"x_proj.weight"``, ``"x_proj.out_features"``.
    """

    parameters: tuple[ParameterChange, ...]
    attributes: Mapping[str, Any]

    def values(self) -> dict[str, Tensor]:
        """New values by parameter name."""
        return {
            name: value for change in self.parameters for name, value in zip(change.names, change.values, strict=True)
        }

    def cpu(self) -> LayerChange:
        """The same change with all tensors on the CPU."""
        parameters = (replace(part, values=tuple(value.cpu() for value in part.values)) for part in self.parameters)
        attributes = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in self.attributes.items()}
        return replace(self, parameters=tuple(parameters), attributes=attributes)


def layer_values(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's parameters and buffers, detached."""
    return {name: value.detach() for name, value in (*layer.named_parameters(), *layer.named_buffers())}


@torch.no_grad()
def write(layer: nn.Module, change: LayerChange) -> None:
    """Write a planned change into a layer. Every Parameter stays the same object and gets new data.

    Optimizers, exponential averages and clipping refer to Parameter objects; they would silently never update a
    replacement. Gradients are dropped, since they belong to the old values.
    """
    for name, value in change.values().items():
        parameter = layer.get_parameter(name)
        device = parameter.device
        if parameter.shape != value.shape:
            # Setting data of another type first makes autograd drop the parameter's gradient accumulator. Otherwise it
            # keeps the old shape for as long as a reference to the last loss exists.
            other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
            parameter.data = torch.empty(0, dtype=other, device=device)
        # Copy the values: the same change may be written into several models, such as averaged copies.
        parameter.data = value.to(device=device, copy=True, memory_format=torch.contiguous_format)
        parameter.grad = None
    for path, value in change.attributes.items():
        prefix, _, name = path.rpartition(".")
        owner = layer.get_submodule(prefix)
        if isinstance(value, Tensor):  # a buffer
            value = value.to(getattr(owner, name).device, copy=True)
        setattr(owner, name, value)


__all__ = ["LayerChange", "ParameterChange", "layer_values", "write"]
