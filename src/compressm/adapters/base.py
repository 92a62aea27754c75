"""What an adapter is, what it returns when it writes, and the registry of adapters."""

from __future__ import annotations

import warnings
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
            concatenation; dense or sparse. Or ``(*before, new, old)``, one such matrix for each index of the dimensions
            before ``axis``, where every channel has states of its own.
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


class LayerAdapter(ABC):
    """What the library needs to know of one kind of layer; use `Adapter` or `SelectiveAdapter`.

    Attributes:
        layer_type: the layer's class, or its full name, such as ``"package.module.Class"``, where the package is not to
            be imported.
        uniform: whether all such layers of a model must have the same state dimension, because its config and
            checkpoints hold only one.
    """

    layer_type: type[nn.Module] | str
    uniform: bool = False

    @abstractmethod
    def state_dim(self, layer: nn.Module) -> int:
        """Number of states of the layer (complex ones, where they are complex)."""

    @abstractmethod
    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        """Parameters of the right shapes for a state dimension, values to be loaded over them; nothing is written."""

    def written(self, model: nn.Module) -> None:
        """Called after layers of a model were written: keep true what it stores beside them, such as a config."""
        del model  # nothing, by default


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
        rotates: whether the recurrence allows rotations of the states and no other change of basis: the delta rule.
            B is then projected by an orthonormal basis, and so is C unless ``folds_out`` allows any map of it.
    """

    folds_into: bool = False
    folds_out: bool = False
    rotates: bool = False

    def maps(self, layer: nn.Module) -> tuple[bool, bool, bool]:
        """``folds_into``, ``folds_out`` and ``rotates`` of one layer, where they depend on its options."""
        del layer
        return self.folds_into, self.folds_out, self.rotates

    @abstractmethod
    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        """What goes through the recurrence when the layer reads ``hidden``, its own input.

        Args:
            layer: the layer, which must not be changed; autograd is off.
            hidden: some sequences of a batch that the layer was called with, shape ``(batch, length, d_model)``.
        """

    def run(self, layer: nn.Module, hidden: Tensor) -> Any:
        """What the layer returns for its own input alone; override it where the layer needs more arguments."""
        return layer(hidden)

    @abstractmethod
    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        """What to write so that the recurrence gets ``into B`` and ``out C``, and the kept states' rates. Nothing is
        written yet."""


_REGISTRY: dict[type[nn.Module] | str, LayerAdapter] = {}

# Parameters by which state space layers are recognised that no adapter is registered for.
_TELLTALES = ("A_log", "log_A_real", "Lambda_re", "nu_log")


class UnknownLayerWarning(UserWarning):
    """A model has, beside layers that compressm knows, one that looks like a state space layer and is left alone."""


def register(adapter: LayerAdapter) -> None:
    """Make a layer type known to `analyze`, `compress` and `Compressor`. A later adapter for the same type wins."""
    _REGISTRY[adapter.layer_type] = adapter


def find_layers(model: nn.Module) -> dict[str, tuple[nn.Module, LayerAdapter]]:
    """Every layer of a model that has a reducible state, by its name in the model, with its adapter.

    Layers that look like state space layers and have no adapter are named in an `UnknownLayerWarning`.

    Raises:
        UnsupportedModelError: the model has none.
    """
    found: dict[str, tuple[nn.Module, LayerAdapter]] = {}
    unknown: list[str] = []
    for name, module in model.named_modules():
        adapter = _adapter(type(module))
        if adapter is not None:
            found[name] = (module, adapter)
        elif any(telltale in module._parameters for telltale in _TELLTALES):  # pyright: ignore[reportPrivateUsage]
            unknown.append(f"{name or 'the model itself'} ({type(module).__name__})")
    advice = "register an adapter for its class with compressm.adapters.register; docs/adapters.md shows how"
    some = f"{', '.join(unknown[:3])}{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}"
    if not found and unknown:
        raise UnsupportedModelError(f"no adapter is known for {some}, which look like state space layers: {advice}")
    if not found:
        known = ", ".join(sorted(_short_name(kind) for kind in _REGISTRY))
        raise UnsupportedModelError(
            f"{type(model).__name__} has no state space layer (known: {known}); if it has one that is not recognised, "
            + advice
        )
    if unknown:
        message = f"no adapter is known for {some}, which look like state space layers and are left as they are: "
        warnings.warn(message + advice, UnknownLayerWarning, stacklevel=2)
    return found


def _adapter(kind: type[nn.Module]) -> LayerAdapter | None:
    for base in kind.__mro__:
        for key in (base, f"{base.__module__}.{base.__qualname__}"):
            if key in _REGISTRY:
                return _REGISTRY[key]
    return None


def _short_name(kind: type[nn.Module] | str) -> str:
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def layer_values(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's parameters and buffers, detached."""
    return {name: value.detach() for name, value in (*layer.named_parameters(), *layer.named_buffers())}


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
        prefix, _, name = path.rpartition(".")
        owner = layer.get_submodule(prefix)
        if isinstance(value, Tensor):  # a buffer
            value = value.to(getattr(owner, name).device, copy=True)
        setattr(owner, name, value)


def tell_written(model: nn.Module) -> None:
    """Let every adapter know, once, that layers of the model were written: see `LayerAdapter.written`."""
    for adapter in {id(adapter): adapter for _, adapter in find_layers(model).values()}.values():
        adapter.written(model)
