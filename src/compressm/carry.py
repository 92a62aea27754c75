"""The optimizer's state across a change of basis.

Momentum and Adam's first moments are averages of gradients, and gradients are covectors: under ``old = W new`` the
gradient with respect to the new parameters is ``W^T`` times the old one. Second moments are averages of squared
entries; without the covariances between entries, the squared magnitudes ``(W^T)^2`` carry them over as if entries
were uncorrelated.

Two other ways exist for comparison: ``"slice"`` keeps the first r entries as the CompreSSM paper's code does, which
pairs moments with states that they do not belong to; ``"reset"`` starts from zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.adapters import LayerAdapter, find_layers
from compressm.adapters.base import LayerChange, ParameterChange, tell_written, write
from compressm.errors import UnsupportedModelError, UnsupportedOptimizerError

Carry = Literal["transform", "slice", "reset"]

# What each state tensor of torch's optimizers is: an average of gradients, or of their squares.
_GRADIENT_LIKE = {"momentum_buffer", "exp_avg"}
_SQUARED = {"exp_avg_sq", "max_exp_avg_sq"}


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's.

    Raises:
        UnsupportedOptimizerError: not a torch optimizer.
    """
    inner = optimizer
    while not isinstance(inner, Optimizer) or type(inner).__name__ == "AcceleratedOptimizer":
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise UnsupportedOptimizerError(
                "optimizer must be a torch.optim.Optimizer or a wrapper with one in .optimizer; "
                f"got {type(optimizer).__name__}"
            )
    return inner


def check_optimizer(optimizer: Optimizer, layers: Mapping[str, nn.Module]) -> None:
    """Refuse, before any cut, optimizers whose state for these layers could not be carried over.

    One of torch's own that has made no step yet is asked what it will keep.

    Raises:
        UnsupportedOptimizerError: a state tensor of a parameter's own shape whose meaning is not known.
    """
    kept = {
        f"{layer_name}.{name}".lstrip("."): optimizer.state.get(parameter, {})
        for layer_name, layer in layers.items()
        for name, parameter in layer.named_parameters()
    }
    if not any(kept.values()) and type(optimizer).__module__.startswith("torch.optim."):
        kept = dict.fromkeys(list(kept)[:1], _state_after_a_step(optimizer))
    for name, state in kept.items():
        for key, value in state.items():
            known = key in _GRADIENT_LIKE or key in _SQUARED or not isinstance(value, Tensor) or value.ndim == 0
            if not known:
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__name__} keeps '{key}' for {name}, and how that changes with the state basis "
                    "is not known; use SGD, Adam or AdamW, or pass carry='reset'"
                )


def _state_after_a_step(optimizer: Optimizer) -> Mapping[str, Any]:
    """What an optimizer of this kind and these settings keeps for a parameter; nothing where that can't be tried."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.zeros_like(parameter)
    try:
        one = type(optimizer)([parameter], **optimizer.defaults)
        one.step()
    except Exception:  # settings for a GPU, for example: it is looked at before the cut then
        return {}
    return one.state[parameter]


def check_trained(optimizer: Optimizer, layers: Mapping[str, tuple[nn.Module, LayerAdapter]]) -> None:
    """Refuse, before any cut, an optimizer that trains not all parameters that a cut would change.

    A second optimizer would be left with state of the old shapes.

    Raises:
        UnsupportedOptimizerError: a parameter with ``requires_grad`` is in none of its groups.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer_name, (layer, adapter) in layers.items():
        for name in adapter.resized(layer, adapter.state_dim(layer)).values():
            parameter = layer.get_parameter(name)
            if parameter.requires_grad and id(parameter) not in trained:
                full_name = f"{layer_name}.{name}".lstrip(".")
                raise UnsupportedOptimizerError(
                    f"{full_name} is a parameter that a cut changes, and is not in the optimizer: put all such "
                    "parameters into one optimizer, in groups with their own settings if need be, or set "
                    "requires_grad=False for those that are not trained"
                )


@torch.no_grad()
def carry_state(optimizer: Optimizer, layer: nn.Module, change: LayerChange, mode: Carry) -> None:
    """Carry the optimizer's state of one layer's parameters over to the new shapes, in place.

    Call it after the change was written: state keeps the Parameter objects as keys.
    """
    for part in change.parameters:
        parameters = [layer.get_parameter(name) for name in part.names]
        if mode == "reset":
            for parameter, value in zip(parameters, part.values, strict=True):
                _forget_factors(optimizer, parameter, value, part.axis)
        states: list[dict[str, Any]] = [optimizer.state.get(parameter, {}) for parameter in parameters]
        for key in sorted({key for state in states for key in state}):
            old = [state.get(key) for state in states]
            tensors = [value for value in old if isinstance(value, Tensor) and value.ndim > 0]
            if not tensors:
                continue  # step counters
            # One half of a pair may have no state, being frozen or without a gradient so far: its averages are zero.
            whole = [value if isinstance(value, Tensor) else torch.zeros_like(tensors[0]) for value in old]
            new = _carried(whole, part, key, mode)
            for state, before, value in zip(states, old, new, strict=True):
                if before is not None:
                    state[key] = value


def _forget_factors(optimizer: Optimizer, parameter: nn.Parameter, new: Tensor, axis: int) -> None:
    """Let the optimizer begin anew with a parameter of which it keeps tensors of other shapes, such as Adafactor's."""

    def has_its_shape(value: Any) -> bool:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return True
        return value.ndim == new.ndim and all(
            value.shape[d] == new.shape[d] for d in range(new.ndim) if d != axis % new.ndim
        )

    if not all(has_its_shape(value) for value in optimizer.state.get(parameter, {}).values()):
        del optimizer.state[parameter]


def _carried(old: list[Tensor], part: ParameterChange, key: str, mode: Carry) -> list[Tensor]:
    if mode == "reset" or (mode == "transform" and key not in _GRADIENT_LIKE | _SQUARED):
        return [
            torch.zeros(value.shape, dtype=o.dtype, device=o.device) for o, value in zip(old, part.values, strict=True)
        ]
    if mode == "slice":
        return [o.narrow(part.axis, 0, v.shape[part.axis]).clone() for o, v in zip(old, part.values, strict=True)]
    matrix = part.pullback_squared if key in _SQUARED else part.pullback
    stacked = torch.cat([o.to("cpu", torch.float64) for o in old], part.axis)
    if matrix.ndim > 2:  # one change of basis for each index before the state axis
        moved = matrix @ stacked.flatten(part.axis + 1) if stacked.ndim > part.axis + 1 else matrix @ stacked[..., None]
        moved = moved.view(*moved.shape[: part.axis + 1], *stacked.shape[part.axis + 1 :])
        return [part_new.to(o).contiguous() for part_new, o in zip(moved.chunk(len(old), part.axis), old, strict=True)]
    by_state = stacked.movedim(part.axis, 0)
    moved = (matrix @ by_state.flatten(1)).view(-1, *by_state.shape[1:]) if by_state.ndim > 1 else matrix @ by_state
    moved = moved.movedim(0, part.axis)
    return [part_new.to(o).contiguous() for part_new, o in zip(moved.chunk(len(old), part.axis), old, strict=True)]


def paired_layers(follower: nn.Module, model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a copy of a model, by their names in the model.

    Raises:
        UnsupportedModelError: it has other layers than the model.
    """
    theirs, ours = find_layers(follower), find_layers(model)
    if [type(layer) for layer, _ in theirs.values()] != [type(layer) for layer, _ in ours.values()]:
        raise UnsupportedModelError(
            f"followers: {type(follower).__name__} has {len(theirs)} state space layers and the model has {len(ours)}, "
            "or of other kinds; pass averaged copies of the same model"
        )
    return {name: layer for name, (layer, _) in zip(ours, theirs.values(), strict=True)}


def follow(follower: nn.Module, model: nn.Module, changes: Mapping[str, LayerChange]) -> None:
    """Let an averaged copy of a model take part in a cut, in place.

    An average of parameters has a meaning only where they mean the same at all times, and after a cut state i is not
    what it was. What the cut changed in the model is set to the model's new values, where averaging starts again. All
    else keeps the value of its average; in an average that counts its steps (``n_averaged``), which has one count for
    all parameters, that value then weighs as much as one step's.

    Args:
        follower: a copy of the model, or a wrapper of one, such as `torch.optim.swa_utils.AveragedModel`.
        model: the model.
        changes: what was written into the model's layers, by their names in it.
    """
    layers = paired_layers(follower, model)
    for name, change in changes.items():
        write(layers[name], change)
    tell_written(follower)
    # An average over all steps would hold on to the first value with the weight of all steps before.
    count = getattr(follower, "n_averaged", None)
    if isinstance(count, Tensor):
        count.clamp_(max=1)
