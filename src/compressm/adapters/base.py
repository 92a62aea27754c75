"""What an adapter is, and the registry of adapters.

A linear time-invariant layer is a system that can be read off its parameters; what a selective layer does depends on
the data. The two bases, `Adapter` and `SelectiveAdapter`, answer the same questions in these two ways, so that nobody
else has to ask which of them a layer has.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compressm.adapters.changes import LayerChange, ParameterChange, layer_values, write
from compressm.adapters.cuts import Cuts, LinearCuts, SelectiveCuts
from compressm.adapters.plain import computed_tensors
from compressm.errors import InvalidSystemError, UnsupportedModelError
from compressm.theory.balanced import Balanced
from compressm.theory.balancing import Balancing, Method, Reduction, balance
from compressm.theory.recurrence import Moments, SelectiveBalancing, SelectiveReduction, Signals, balance_selective
from compressm.theory.selection import Selection
from compressm.theory.systems import DiagonalSystem


class LayerAdapter(ABC):
    """What the library needs to know of one kind of layer; use `Adapter` or `SelectiveAdapter`.

    Attributes:
        layer_type: the layer's class, or its full name, such as ``"package.module.Class"``, where the package is not to
            be imported.
        uniform: whether all such layers of a model must have the same state dimension, because its config and
            checkpoints hold only one.
        needs_data: whether `balance` needs moments of data.
    """

    layer_type: type[nn.Module] | str
    uniform: bool = False
    needs_data: bool = False

    @abstractmethod
    def state_dim(self, layer: nn.Module) -> int:
        """Number of states of the layer (complex ones, where they are complex)."""

    @abstractmethod
    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        """Parameters of the right shapes for a state dimension, values to be loaded over them; nothing is written."""

    @abstractmethod
    def balance(self, layer: nn.Module, evidence: Moments | None = None, method: Method = "real") -> Balanced:
        """Hankel singular values of a layer as it is now.

        Args:
            layer: only read.
            evidence: moments of the data, where the adapter `needs_data`.
            method: for linear time-invariant layers, see `compressm.theory.balancing`.

        Raises:
            InvalidSystemError: parameters or moments that are not finite, or an unstable layer.
            UnsupportedModelError: moments are needed, and there are none.
        """

    @abstractmethod
    def cuts(self, layer: nn.Module, balanced: Balanced, selection: Selection = "hankel") -> Cuts:
        """The cuts that the layer can be given.

        Args:
            layer: only read.
            balanced: the same layer, from `balance`.
            selection: how states are picked, see `compressm.cutting.plan.plan_reduction`.
        """

    def system(self, layer: nn.Module) -> DiagonalSystem | None:
        """The system that the layer computes; None where what it computes depends on the data."""
        del layer
        return None

    def run(self, layer: nn.Module, hidden: Tensor) -> Any:
        """What the layer returns for its own input alone; override it where the layer needs more arguments."""
        return layer(hidden)

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

    def system(self, layer: nn.Module) -> DiagonalSystem:
        """The system that the layer computes."""
        return self.read(layer_values(layer))

    def balance(self, layer: nn.Module, evidence: Moments | None = None, method: Method = "real") -> Balancing:
        """Balance the system that the layer computes. No data are needed."""
        del evidence
        return balance(self.system(layer), method)

    def cuts(self, layer: nn.Module, balanced: Balanced, selection: Selection = "hankel") -> Cuts:
        """Truncations of the balanced system; see `LinearCuts`."""
        if not isinstance(balanced, Balancing):
            raise InvalidSystemError(_balanced_otherwise(layer, balanced, "Balancing"))
        return LinearCuts(layer_values(layer), balanced, selection, self.read, self.plan)


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
        entrance: a part of the layer that it calls once, with its own input, by which the layer is observed where its
            ``forward`` is called and not the layer. None where there is none; such calls are then refused.
    """

    needs_data = True
    folds_into: bool = False
    folds_out: bool = False
    rotates: bool = False
    entrance: str | None = None

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

    def carried(self, layer: nn.Module, arguments: Mapping[str, Any]) -> Any:
        """What a call of the layer goes on from, for `signals_after`; None where its states start at zero.

        Args:
            layer: the layer, about to be called.
            arguments: of the call, by name.

        Raises:
            UnsupportedModelError: a state is carried over that the adapter cannot read.
        """
        for name in _CARRIERS:
            if not _is_fresh(arguments.get(name)):
                raise UnsupportedModelError(
                    f"a call goes on from the state in {name}, which cannot be read for {type(layer).__name__}; gather "
                    "moments from whole sequences, without it"
                )
        return None

    def signals_after(self, layer: nn.Module, hidden: Tensor, carried: Any) -> Signals:
        """As `signals`, for a call that goes on from what `carried` returned."""
        raise NotImplementedError(f"{type(self).__name__}.carried reads states, and signals_after is not there")

    @abstractmethod
    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        """What to write so that the recurrence gets ``into B`` and ``out C``, and the kept states' rates. Nothing is
        written yet."""

    def balance(self, layer: nn.Module, evidence: Moments | None = None, method: Method = "real") -> SelectiveBalancing:
        """Balance what the data did in the recurrence; see `compressm.theory.recurrence`."""
        del method
        if evidence is None:
            raise UnsupportedModelError(f"{type(layer).__name__} is balanced with moments of data, and there are none")
        return balance_selective(evidence)

    def cuts(self, layer: nn.Module, balanced: Balanced, selection: Selection = "hankel") -> Cuts:
        """Selections or maps of the states; see `SelectiveCuts`."""
        if not isinstance(balanced, SelectiveBalancing):
            raise InvalidSystemError(_balanced_otherwise(layer, balanced, "SelectiveBalancing"))
        return SelectiveCuts(layer_values(layer), balanced, selection, self.maps(layer), self.plan)


def _balanced_otherwise(layer: nn.Module, balanced: Balanced, expected: str) -> str:
    return f"{type(layer).__name__} was balanced as {type(balanced).__name__}; expected {expected}, from its adapter"


# Arguments by which layers are given the state that they go on from.
_CARRIERS = ("cache_params", "past_key_values", "past_key_value", "inference_params", "initial_state", "initial_states")


def _is_fresh(carrier: Any) -> bool:
    """Whether nothing has been stored yet in what a layer is given to store its state in."""
    if carrier is None:
        return True
    length = getattr(carrier, "get_seq_length", None) or getattr(carrier, "__len__", None)
    if length is None:
        return getattr(carrier, "seqlen_offset", 1) == 0
    return not isinstance(carrier, Tensor) and int(length()) == 0


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


def layers_that_need_data(model: nn.Module) -> dict[str, tuple[nn.Module, SelectiveAdapter]]:
    """Those of `find_layers` whose states must be seen at work before they can be balanced, with how to see them.

    Raises:
        UnsupportedModelError: the model has no layer that compressm knows.
    """
    found = find_layers(model).items()
    return {name: (layer, adapter) for name, (layer, adapter) in found if isinstance(adapter, SelectiveAdapter)}


def _adapter(kind: type[nn.Module]) -> LayerAdapter | None:
    for base in kind.__mro__:
        for key in (base, f"{base.__module__}.{base.__qualname__}"):
            if key in _REGISTRY:
                return _REGISTRY[key]
    return None


def _short_name(kind: type[nn.Module] | str) -> str:
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def check_plain(layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers of which a parameter that a cut reads or writes is computed from others at every call.

    Such are weights under `torch.nn.utils.parametrize` (``weight_norm``, ``spectral_norm``), under the older hooks of
    the same names, pruned ones, and those that an adapter such as LoRA wraps.

    Args:
        layers: by their names in the model.

    Raises:
        UnsupportedModelError: names the parameter, and how to make it a plain one again.
    """
    for layer_name, layer in layers.items():
        adapter = _adapter(type(layer))
        assert adapter is not None
        computed = dict(computed_tensors(layer))
        try:
            names = set(adapter.resized(layer, adapter.state_dim(layer)).values())
            adapter.system(layer)
        except (KeyError, AttributeError) as error:
            # The error names the parameter; get_parameter's own message has the last part of it only.
            text = str(error.args[0]) if error.args else ""
            names = {name for name in computed if name == text or f"`{name.rpartition('.')[2]}`" in text} or {text}
        except InvalidSystemError:  # values, which others look at
            names = set(layer_values(layer)) if not computed else set(computed)
        for name in sorted(names):
            full = f"{layer_name}.{name}".lstrip(".")
            if name in computed:
                raise UnsupportedModelError(
                    f"{full} is computed from other parameters at every call ({computed[name][0]}), and a cut has to "
                    f"write it: {computed[name][1]} first, and build the optimizer after that"
                )
            if name not in layer_values(layer):
                raise UnsupportedModelError(
                    f"{full} is not a parameter of {type(layer).__name__} any more, and a cut has to write it: undo "
                    "what has replaced it (merge and unload adapters, dequantize), or leave this layer as it is built"
                )


def tell_written(model: nn.Module) -> None:
    """Let every adapter know, once, that layers of the model were written: see `LayerAdapter.written`."""
    for adapter in {id(adapter): adapter for _, adapter in find_layers(model).values()}.values():
        adapter.written(model)


__all__ = [
    "Adapter",
    "LayerAdapter",
    "LayerChange",
    "ParameterChange",
    "SelectiveAdapter",
    "UnknownLayerWarning",
    "check_plain",
    "find_layers",
    "layer_values",
    "layers_that_need_data",
    "register",
    "tell_written",
    "write",
]
