"""Checkpoints of any size: a model's layers take the state dimensions of the weights that are loaded into them.

Cuts change the shapes of parameters, so that weights from before a cut no longer fit, nor do weights from after one
fit a model that was built at its first size. But the shapes are in the weights: before a layer loads them, it is given
their state dimension. This works in every host, since all of them end in `torch.nn.Module.load_state_dict`: Trainer's
best model, Lightning's ``ckpt_path``, Accelerate's ``load_state``, averaged copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from compressm.adapters import find_layers
from compressm.adapters.base import LayerAdapter, LayerChange, layer_values, write
from compressm.errors import CheckpointError

Model = TypeVar("Model", bound=nn.Module)
_MARK = "_fits_any_size"


def fit_any_size(model: Model) -> Model:
    """Let ``model.load_state_dict`` accept weights of any state dimension, from now on, in place.

    `Compressor` and the integrations call this. Call it yourself where a compressed checkpoint is loaded into a model
    that was built at its first size and no compressor is at hand. Copies of the model inherit it.

    Args:
        model: any model with layers that compressm knows.

    Returns:
        the same model.

    Raises:
        UnsupportedModelError: the model has no layer that compressm knows.
    """
    for layer, _ in find_layers(model).values():
        if not hasattr(layer, _MARK):
            layer.register_load_state_dict_pre_hook(_before_loading)
            setattr(layer, _MARK, True)
    return model


def fit(model: Model, weights: Mapping[str, Tensor | Sequence[int]]) -> Model:
    """Give a model's layers the state dimensions that weights of these names have, in place.

    For checkpoints that are not read by ``load_state_dict``: `torch.distributed.checkpoint`, for example, reads into
    tensors that have their shapes already.

    Args:
        model: any model with layers that compressm knows.
        weights: a state dict of the model, or only the shapes in it. Parameters that it does not name stay as they are.

    Returns:
        the same model; the parameters that were resized hold zeros.

    Raises:
        CheckpointError: shapes that the layer has at no state dimension.
    """
    shapes = {
        name: tuple(value.shape if isinstance(value, Tensor) else value)
        for name, value in weights.items()
        if isinstance(value, Tensor | Sequence)
    }
    for name, (layer, adapter) in find_layers(model).items():
        _fit_layer(layer, adapter, shapes, f"{name}." if name else "")
    return model


def _before_loading(layer: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    (adapter,) = (adapter for found, adapter in find_layers(layer).values() if found is layer)
    shapes = {name: tuple(v.shape) for name, v in state_dict.items() if name.startswith(prefix) and hasattr(v, "shape")}
    _fit_layer(layer, adapter, shapes, prefix)


def _fit_layer(layer: nn.Module, adapter: LayerAdapter, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> None:
    present = {name: tuple(value.shape) for name, value in layer_values(layer).items()}
    wanted = {name: shapes[prefix + name] for name in present if prefix + name in shapes}
    differing = [name for name, shape in wanted.items() if shape != present[name]]
    if not differing:
        return

    def resized(states: int) -> tuple[LayerChange, dict[str, tuple[int, ...]]]:
        change = adapter.resized(layer, states)
        return change, {**present, **{name: tuple(value.shape) for name, value in change.values().items()}}

    # Sizes grow in proportion to the state dimension: one state more tells by how much.
    name, now = differing[0], adapter.state_dim(layer)
    growth = sum(resized(now + 1)[1][name]) - sum(present[name])
    states = now + (sum(wanted[name]) - sum(present[name])) // growth if growth else now
    if states >= 1:
        change, new = resized(states)
        if all(new[name] == shape for name, shape in wanted.items()):
            write(layer, change)
            return
    found = ", ".join(f"{name} {wanted[name]}" for name in differing)
    raise CheckpointError(
        f"{prefix.rstrip('.') or type(layer).__name__}: weights of shapes {found} "
        "belong to no state dimension of this layer; build the model as it was built when saved"
    )


__all__ = ["fit", "fit_any_size"]
