"""Which layers are known: the registry of adapters, the layers of a model that have one, and what cannot be cut."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compressm.adapters.base import LayerAdapter, SelectiveAdapter
from compressm.adapters.changes import (
    LayerChange,
    in_parameters,
    layer_values,
    not_divisible,
)
from compressm.adapters.composed import composed_tensors
from compressm.adapters.left_out import is_left_out
from compressm.adapters.plain import check_readable, computed_tensors
from compressm.adapters.refused import reason_refused
from compressm.errors import InvalidSystemError, UnsupportedModelError
from compressm.runtime.warned import warn

_REGISTRY: dict[type[nn.Module] | str, LayerAdapter] = {}

# Parameter names that identify state space layers without a registered adapter.
_TELLTALES = ("A_log", "log_A_real", "Lambda_re", "nu_log")


class UnknownLayerWarning(UserWarning):
    """A model has a layer that looks like a state space layer and has no adapter, so it will not be reduced."""


def register(adapter: LayerAdapter) -> None:
    """Make a layer type known to `analyze`, `compress` and `Compressor`. A later adapter for the same type wins."""
    _REGISTRY[adapter.layer_type] = adapter


def candidates(model: nn.Module) -> dict[str, tuple[nn.Module, LayerAdapter | None]]:
    """The layers of a model that are known, with their adapters, or look like state space layers, by name."""
    found: dict[str, tuple[nn.Module, LayerAdapter | None]] = {}
    for name, module in model.named_modules():
        adapter = _adapter(type(module))
        looks = any(telltale in module._parameters for telltale in _TELLTALES)  # pyright: ignore[reportPrivateUsage]
        if adapter is not None or looks or reason_refused(module) is not None:
            found[name] = (module, adapter)
    return found


def find_layers(model: nn.Module) -> dict[str, tuple[nn.Module, LayerAdapter]]:
    """Every layer of a model that has a reducible state, by its name in the model, with its adapter.

    Layers that look like state space layers and have no adapter are named in an `UnknownLayerWarning`. Layers that are
    left out, see `compressm.adapters.left_out`, are not found.

    Raises:
        UnsupportedModelError: the model has none.
    """
    every = {name: both for name, both in candidates(model).items() if not is_left_out(both[0])}
    found = {name: (module, adapter) for name, (module, adapter) in every.items() if adapter is not None}
    unknown = {name: module for name, (module, adapter) in every.items() if adapter is None}
    if not found and unknown:
        raise UnsupportedModelError(_why_unknown(unknown))
    if not found:
        known = ", ".join(sorted({_short_name(kind) for kind in _REGISTRY}))
        raise UnsupportedModelError(
            f"{type(model).__name__} has no state space layer (known: {known}); if it has one that is not recognised, "
            + _ADVICE
        )
    if unknown:
        warn(_why_unknown(unknown, " and are left as they are"), UnknownLayerWarning)
    return found


_ADVICE = "register an adapter for its class with compressm.adapters.register; docs/adapters.md shows how"


def _why_unknown(layers: Mapping[str, nn.Module], what_becomes: str = "") -> str:
    """A message about layers without adapters: the reason for those that are known not to be possible, else advice."""
    layer = next(iter(layers.values()))
    alike = {name: one for name, one in layers.items() if reason_refused(one) == reason_refused(layer)}
    names = [f"{name or 'the model itself'} ({type(one).__name__})" for name, one in alike.items()]
    some = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    if (reason := reason_refused(layer)) is not None:
        return f"{some} cannot be cut{what_becomes}: {reason}"
    return f"no adapter is known for {some}, which look like state space layers{what_becomes}: {_ADVICE}"


def resized(layer: nn.Module, adapter: LayerAdapter, states: int) -> LayerChange:
    """A change to a layer's parameters of the shapes for a state dimension; load values afterwards.

    This is the adapter's `LayerAdapter.resized`, translated to the parameters that the layer's weights are computed
    from; see `compressm.adapters.composed`. Nothing is written.
    """
    return in_parameters(layer, adapter.resized(layer, states))


def cut_parameters(layer: nn.Module, adapter: LayerAdapter) -> dict[str, nn.Parameter]:
    """The parameters whose shapes a cut of a layer changes, by name in the layer."""
    return {name: layer.get_parameter(name) for name in resized(layer, adapter, adapter.state_dim(layer)).values()}


def layers_that_need_data(model: nn.Module) -> dict[str, tuple[nn.Module, SelectiveAdapter]]:
    """The selective layers of a model, whose `balance` needs moments of data, by name, with their adapters.

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


def has_adapter(kind: type[nn.Module]) -> bool:
    """Whether an adapter is registered for a class, or for one that it is derived from."""
    return _adapter(kind) is not None


def _short_name(kind: type[nn.Module] | str) -> str:
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def check_plain(layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers in which a tensor that a cut reads or writes is computed at every call, and cannot be cut.

    Examples are weights under `torch.nn.utils.parametrize` (``spectral_norm``) or under the older hooks of the same
    names, pruned weights, and weights wrapped by adapters other than LoRA. The weights of `compressm.adapters.composed`
    can be cut.

    Args:
        layers: by their names in the model.

    Raises:
        UnsupportedModelError: names the parameter, and how to make it a plain one again; or a layer without readable
            values, see `check_readable`.
    """
    check_readable(layers)
    for layer_name, layer in layers.items():
        adapter = _adapter(type(layer))
        assert adapter is not None
        computed, composed = dict(computed_tensors(layer)), composed_tensors(layer)
        try:
            change = adapter.resized(layer, adapter.state_dim(layer))
            names = set(change.values())
            for bad in filter(None, (not_divisible(part, composed) for part in change.parameters)):
                computed[bad] = composed[bad].kind, composed[bad].undo
            adapter.system(layer)
        except (KeyError, AttributeError) as error:
            # The error names the parameter in full; get_parameter's own message has only the last part of the name.
            text = str(error.args[0]) if error.args else ""
            names = {name for name in computed if name == text or f"`{name.rpartition('.')[2]}`" in text} or {text}
        except InvalidSystemError:  # the values are invalid; other functions check them
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


class PartOfModelWarning(UserWarning):
    """Layers are cut that are parts of a larger model, whose config does not learn of it."""


def warn_of_parts(model: nn.Module) -> None:
    """Warn, before a cut, of layers that belong to a larger model with a config that will not be updated."""
    for adapter in {id(adapter): adapter for _, adapter in find_layers(model).values()}.values():
        if (message := adapter.untold(model)) is not None:
            warn(message, PartOfModelWarning)


def tell_written(model: nn.Module) -> None:
    """Call `LayerAdapter.written` once for every adapter of the model's layers."""
    for adapter in {id(adapter): adapter for _, adapter in find_layers(model).values()}.values():
        adapter.written(model)
