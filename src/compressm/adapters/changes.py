"""The change that a cut makes to a layer, as a value, and the function that writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.composed import Composed, composed_tensors
from compressm.errors import UnsupportedModelError
from compressm.runtime.paging import is_paging, layer_done, stored


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
        map: the matrix by which the new values of a single parameter are ``map @ old`` along the axis, shape ``(new,
            old)``, dense or sparse. None if the new values are no linear function of the old. Weights that are computed
            from several parameters (see `composed`) can be cut only if it is given.
        kept: if the new values are some of the old entries along the axis, their indices, shape ``(new,)``.
    """

    names: tuple[str, ...]
    values: tuple[Tensor, ...]
    axis: int
    pullback: Tensor
    pullback_squared: Tensor
    map: Tensor | None = None
    kept: Tensor | None = None

    def of(self, name: str, value: Tensor, axis: int) -> ParameterChange:
        """The same change of another parameter, whose entries along an axis belong to the same states.

        Args:
            name: the parameter's name.
            value: the parameter.
            axis: its axis.
        """
        if value.is_meta:  # a placeholder, into which weights are about to be loaded
            shape = (*value.shape[:axis], self.pullback.shape[0], *value.shape[axis + 1 :])
            new = value.new_empty(shape)
        elif self.kept is not None:
            new = value.detach().index_select(axis, self.kept.to(value.device))
        else:
            assert self.map is not None
            along = value.detach().to("cpu", torch.float64).movedim(axis, 0)
            moved = self.map @ along.reshape(along.shape[0], -1)
            new = moved.view(-1, *along.shape[1:]).movedim(0, axis).to(value)
        return replace(self, names=(name,), values=(new.contiguous(),), axis=axis)


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

    def in_files(self) -> LayerChange:
        """The same change; its values are in files if those of the model are, see `compressm.runtime.paging`."""
        if not is_paging():
            return self
        parameters = tuple(replace(one, values=tuple(map(stored, one.values))) for one in self.parameters)
        layer_done()
        return replace(self, parameters=parameters)

    def cpu(self) -> LayerChange:
        """The same change with all tensors on the CPU."""
        parameters = (replace(part, values=tuple(value.cpu() for value in part.values)) for part in self.parameters)
        attributes = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in self.attributes.items()}
        return replace(self, parameters=tuple(parameters), attributes=attributes)


def selection_change(name: str, value: Tensor, axis: int, kept: Tensor) -> ParameterChange:
    """The change of a parameter whose entries along an axis belong to one state each.

    Args:
        name: the parameter's name.
        value: the parameter.
        axis: the axis.
        kept: the indices that stay, shape ``(kept,)``.
    """
    places = torch.stack([torch.arange(kept.shape[0]), kept])  # sparse: a projection can have 10^4 rows
    ones = torch.ones(kept.shape[0], dtype=torch.float64)
    pullback = torch.sparse_coo_tensor(
        places, ones, (kept.shape[0], value.shape[axis]), is_coalesced=True, check_invariants=False
    )
    new = value.detach().index_select(axis, kept.to(value.device))
    return ParameterChange((name,), (new,), axis, pullback, pullback, pullback, kept)


def layer_values(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's parameters and buffers, detached; and the weights that are computed from several parameters, under
    the names that they have in a layer without that."""
    return {**stored_values(layer), **{name: one.value for name, one in composed_tensors(layer).items()}}


def stored_values(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's parameters and buffers, detached, under the names by which they are stored."""
    return {name: value.detach() for name, value in (*layer.named_parameters(), *layer.named_buffers())}


def in_parameters(layer: nn.Module, change: LayerChange) -> LayerChange:
    """The change of the layer's parameters that makes a change of its weights.

    The two differ where weights are computed from several parameters; see `compressm.adapters.composed`.

    Raises:
        UnsupportedModelError: a weight whose parameters do not allow it.
    """
    composed = composed_tensors(layer)
    if not composed:
        return change
    values = stored_values(layer)
    parameters: list[ParameterChange] = []
    for part in change.parameters:
        if not any(name in composed for name in part.names):
            parameters.append(part)
            continue
        if (bad := not_divisible(part, composed)) is not None:
            raise UnsupportedModelError(f"{bad} is computed by {composed[bad].kind}: {composed[bad].undo} first")
        (name,) = part.names
        places = composed[name].along(part.axis)
        parameters += [part.of(one, values[one], axis) for one, axis in places.items()]
    attributes: dict[str, Any] = {}
    for path, value in change.attributes.items():
        owner, _, size = path.rpartition(".")
        weight = composed.get(f"{owner}.weight")
        places = weight.sizes.get(size, (path,)) if weight is not None else (path,)
        attributes |= dict.fromkeys(places, value)
    return LayerChange(tuple(parameters), attributes)


def not_divisible(part: ParameterChange, composed: Mapping[str, Composed]) -> str | None:
    """The name of a weight in a change that is computed from parameters in which the change cannot be made."""
    for name in part.names:
        one = composed.get(name)
        possible = part.kept is not None or (one is not None and one.linear and part.map is not None)
        if one is not None and not (possible and len(part.names) == 1 and one.along(part.axis)):
            return name
    return None


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
        # Copy the values: the same change may be written into several models, such as averaged copies. In a model that
        # lives in files they do too, and nobody trains it.
        copy = not is_paging()
        parameter.data = value.to(device=device, copy=copy, memory_format=torch.contiguous_format)
        parameter.grad = None
    for path, value in change.attributes.items():
        prefix, _, name = path.rpartition(".")
        owner = layer.get_submodule(prefix)
        if isinstance(value, Tensor):  # a buffer
            value = value.to(getattr(owner, name).device, copy=True)
        setattr(owner, name, value)


__all__ = [
    "LayerChange",
    "ParameterChange",
    "in_parameters",
    "layer_values",
    "not_divisible",
    "selection_change",
    "stored_values",
    "write",
]
