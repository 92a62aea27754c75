"""Checkpoints of any size: a model's layers take the state dimensions of the weights that are loaded into them.

Cuts change the shapes of parameters. So weights saved before a cut do not fit the model after it, and weights saved
after a cut do not fit a model built at its first size. The weights themselves tell the shapes: before a layer loads
them, it is resized to their state dimension. This works in every host, since all of them call
`torch.nn.Module.load_state_dict`: Trainer's best model, Lightning's ``ckpt_path``, Accelerate's ``load_state``,
averaged copies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from compressm.adapters import LayerAdapter, LayerChange, find_layers
from compressm.adapters.changes import stored_values, write
from compressm.adapters.registry import resized, tell_written
from compressm.cutting.held_base import hold_cut_base, is_factor
from compressm.errors import CheckpointError
from compressm.runtime.processes import rebuild_replicas

Model = TypeVar("Model", bound=nn.Module)
# An attribute of every module with hooks: whether `load_state_dict` was called on it, not on a module around it.
_OUTERMOST, _RESIZED = "_outermost_of_a_load", "_resized_for_weights"


def fit_any_size(model: Model) -> Model:
    """Let ``model.load_state_dict`` accept weights of any state dimension, from now on, in place.

    Settings that a model stores beside its weights, such as the state size in a Hugging Face config, are updated too.
    `Compressor` and the integrations call this function. Call it yourself before you load a compressed checkpoint,
    without a compressor, into a model that was built at its first size. Copies of the model inherit the behaviour.

    Args:
        model: any model with layers that compressm knows.

    Returns:
        the same model.

    Raises:
        UnsupportedModelError: the model has no layer that compressm knows.
    """
    layers = {id(layer) for layer, _ in find_layers(model).values()}
    for module in model.modules():
        if hasattr(module, _OUTERMOST) or layers.isdisjoint(id(part) for part in module.modules()):
            continue
        module.register_load_state_dict_pre_hook(_before_loading)
        if id(module) in layers:
            module.register_load_state_dict_pre_hook(_resize_for_weights)
        module.register_load_state_dict_post_hook(_after_loading)
        setattr(module, _OUTERMOST, False)
    hold_cut_base(model)
    return model


def fit(model: Model, weights: Mapping[str, Tensor | Sequence[int]]) -> Model:
    """Resize a model's layers, in place, to the state dimensions of a checkpoint's weights.

    Use it for checkpoints that are not read by ``load_state_dict``. For example, `torch.distributed.checkpoint` reads
    into tensors that must have the right shapes already.

    Args:
        model: any model with layers that compressm knows.
        weights: a state dict of the model, or only its shapes. Parameters that it does not name are not resized.

    Returns:
        the same model; resized parameters hold zeros.

    Raises:
        CheckpointError: the shapes fit the layer at no state dimension.
    """
    shapes = {
        name: tuple(value.shape if isinstance(value, Tensor) else value)
        for name, value in weights.items()
        if isinstance(value, Tensor | Sequence)
    }
    for name, (layer, adapter) in find_layers(model).items():
        _fit_layer(layer, adapter, shapes, f"{name}." if name else "")
    tell_written(model)
    return model


def _before_loading(module: nn.Module, _state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """A hook before loading, on every module, since ``load_state_dict`` may be called on any: a model, a backbone."""
    setattr(module, _OUTERMOST, not prefix)


def _resize_for_weights(layer: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    (adapter,) = (adapter for found, adapter in find_layers(layer).values() if found is layer)
    shapes = {name: tuple(v.shape) for name, v in state_dict.items() if name.startswith(prefix) and hasattr(v, "shape")}
    setattr(layer, _RESIZED, _fit_layer(layer, adapter, shapes, prefix))


def _after_loading(module: nn.Module, _: Any) -> None:
    # Called for every module inside first. The model may be inside of others, such as a PeftModel made later.
    if any(getattr(layer, _RESIZED, False) for layer in module.modules()):
        tell_written(module)
        if getattr(module, _OUTERMOST):
            rebuild_replicas(module)


def _fit_layer(layer: nn.Module, adapter: LayerAdapter, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> bool:
    """Resize a layer to the shapes of its weights; returns whether that was needed."""
    values = stored_values(layer)
    wanted = {name: shapes[prefix + name] for name in values if prefix + name in shapes}
    differing = {name: shape for name, shape in wanted.items() if shape != tuple(values[name].shape)}
    if not differing:
        return False

    def shapes_at(states: int) -> dict[str, tuple[int, ...]]:
        return {n: tuple(v.shape) for n, v in {**values, **resized(layer, adapter, states).values()}.items()}

    # Every size is a linear function of the state dimension, so its values at two dimensions determine the wanted one.
    unit = adapter.unit(layer)
    one, two = shapes_at(unit), shapes_at(2 * unit)
    name, shape = next(iter(differing.items()))
    for size, at_one, at_two in zip(shape, one[name], two[name], strict=False):
        if at_one != at_two:
            states = unit * (1 + (size - at_one) // (at_two - at_one))
            if states >= unit and all(shapes_at(states)[other] == asked for other, asked in wanted.items()):
                change = resized(layer, adapter, states)
                _check_whole(change, differing, wanted, states, prefix)
                write(layer, change)
                return True
            break
    raise CheckpointError(
        f"{prefix.rstrip('.') or type(layer).__name__}: weights of shapes {list(differing.values())} belong to no "
        "state dimension of this layer; build the model as it was built when saved"
    )


def _check_whole(
    change: LayerChange, differing: Iterable[str], wanted: Collection[str], states: int, prefix: str
) -> None:
    """Refuse an adapter that gives a layer another state dimension, without the base that it was trained on.

    The base's values would be placeholders. (Shards of whole models are loaded one by one, and fill in the rest later.)
    """
    missing = next((name for name in change.values() if name not in wanted), None)
    if missing is not None and all(is_factor(name) for name in differing):
        raise CheckpointError(
            f"these adapters belong to a layer of {states} states, and leave out {prefix}{missing}, which depends on "
            "that: load the base that they were trained with first; adapters that are trained through a cut are saved "
            "with what it changed in the base, by their model's save_pretrained or compressm.integrations.peft.save"
        )


__all__ = ["fit", "fit_any_size"]
