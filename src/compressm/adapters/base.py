"""What an adapter is, what it returns when it writes, and the registry of adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressm.balancing import Reduction
from compressm.errors import UnsupportedModelError
from compressm.selective import SelectiveReduction, Signals
from compressm.systems import DiagonalSystem


@dataclass(frozen=True)
class ParameterChange:
    """New values for parameters that share one state axis, and how gradients on the old ones map to the new.

    The parameters ``names`` (for example real and imaginary part) are concatenated along ``axis``, their state axis.
    Where the old values are, on the kept subspace, ``old = pullback^T new``, a gradient with respect to the new ones is
    ``pullback @ gradient``: gradients are covectors.

    Attributes:
        names: parameter names, relative to the layer.
        values: new values in the same order, of the parameters' dtype and device.
        axis: the state axis of each parameter.
        pullback: maps gradient-like optimizer state (momentum, first moments), shape ``(new, old)`` of the
            concatenation.
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
        return replace(self, parameters=tuple(parameters))


class LayerAdapter(ABC):
    """What the library needs to know of one kind of layer; use `Adapter` or `SelectiveAdapter`."""

    layer_type: type[nn.Module]

    @abstractmethod
    def state_dim(self, layer: nn.Module) -> int:
        """Number of states of the layer (complex ones, where they are complex)."""

    @abstractmethod
    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        """Parameters of the right shapes for a state dimension, values to be loaded over them; nothing is written."""


class Adapter(LayerAdapter):
    """Reads a linear time-invariant system out of one kind of layer, and plans how to write a smaller one back.

    Subclass it, set `layer_type`, implement the four methods, and `register` an instance.
    """

    @abstractmethod
    def read(self, values: Mapping[str, Tensor]) -> DiagonalSystem:
        """The system that a layer with these parameter values computes."""

    @abstractmethod
    def plan(self, values: Mapping[str, Tensor], reduction: Reduction) -> LayerChange:
        """What to write so that the layer computes the reduced system. Nothing is written yet."""


class SelectiveAdapter(LayerAdapter):
    """Shows what goes through a selective layer's recurrence, and plans how to write a smaller one back.

    Subclass it, set `layer_type`, implement the four methods, and `register` an instance.

    Attributes:
        folds_into: whether any linear map of B can be folded into the layer's parameters, and all states decay alike.
            Where not, states are selected.
        folds_out: whether any linear map of C can be folded in. Where a non-linearity stands between projection and
            recurrence it cannot, and C is selected like B.
    """

    folds_into: bool = False
    folds_out: bool = False

    @abstractmethod
    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        """What goes through the recurrence when the layer reads ``hidden``, its own input.

        Args:
            layer: the layer, which must not be changed; autograd is off.
            hidden: some sequences of a batch that the layer was called with, shape ``(batch, length, d_model)``.
        """

    @abstractmethod
    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        """What to write so that the recurrence gets ``into B`` and ``out C``, and the kept states' rates. Nothing is
        written yet."""


_REGISTRY: dict[type[nn.Module], LayerAdapter] = {}


def register(adapter: LayerAdapter) -> None:
    """Make a layer type known to `analyze`, `compress` and `Compressor`. A later adapter for the same type wins."""
    _REGISTRY[adapter.layer_type] = adapter


def find_layers(model: nn.Module) -> dict[str, tuple[nn.Module, LayerAdapter]]:
    """Every layer of a model that has a reducible state, by its name in the model, with its adapter.

    Raises:
        UnsupportedModelError: the model has none.
    """
    found: dict[str, tuple[nn.Module, LayerAdapter]] = {}
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind in _REGISTRY:
                found[name] = (module, _REGISTRY[kind])
                break
    if not found:
        known = ", ".join(sorted(kind.__name__ for kind in _REGISTRY))
        raise UnsupportedModelError(
            f"{type(model).__name__} has no state space layer that compressm knows (known: {known}); "
            "register an adapter for its layer type with compressm.adapters.register"
        )
    return found


def layer_values(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's parameters, detached."""
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


@torch.no_grad()
def write(layer: nn.Module, change: LayerChange) -> None:
    """Write a planned change into a layer, keeping every Parameter the object that it was.

    Optimizers, exponential averages and clipping hold on to Parameter objects; one that was replaced would silently
    never be updated again. Gradients are dropped, since they belong to the old values.
    """
    for name, value in change.values().items():
        parameter = layer.get_parameter(name)
        device = parameter.device
        if parameter.shape != value.shape:
            # Setting data of another type first makes autograd drop the parameter's gradient accumulator, which
            # otherwise lives on with the old shape for as long as anyone holds the last loss.
            other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
            parameter.data = torch.empty(0, dtype=other, device=device)
        # A copy: the same change may be written into several models, such as averaged copies.
        parameter.data = value.to(device=device, copy=True, memory_format=torch.contiguous_format)
        parameter.grad = None
    for path, value in change.attributes.items():
        owner, _, name = path.rpartition(".")
        setattr(layer.get_submodule(owner), name, value)
