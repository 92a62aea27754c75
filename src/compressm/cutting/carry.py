"""The optimizer's state across a change of basis.

Momentum and Adam's first moments are averages of gradients. Gradients are covectors: under ``old = W new`` the gradient
with respect to the new parameters is ``W^T`` times the old one. Second moments are averages of squared entries. The
optimizer does not store covariances between entries, so the squared magnitudes ``(W^T)^2`` carry the second moments
over as if entries were uncorrelated.

Two other modes exist. ``"slice"`` keeps the first r entries, as the CompreSSM paper's code does; it pairs moments with
states to which they do not belong, and is there for comparison. ``"reset"`` gives the cut parameters the state of a
newly built optimizer; use it for optimizers whose state is not made of such averages.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.adapters import LayerAdapter, find_layers
from compressm.adapters.base import LayerChange, ParameterChange, resized, tell_written, write
from compressm.errors import UnsupportedModelError, UnsupportedOptimizerError

Carry = Literal["transform", "slice", "reset"]

# The meaning of each state tensor of torch's optimizers: an average of gradients, or of their squares.
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


def check_optimizer(optimizer: Optimizer, layers: Mapping[str, nn.Module], mode: Carry = "transform") -> None:
    """Refuse, before any cut, optimizers whose state for these layers could not be carried over.

    If the optimizer has made no step yet, one of the same kind and settings is built for a small matrix, to see what
    state it will keep. With ``"reset"`` this trial also shows whether it can step after a cut. An optimizer that cannot
    be built in this way is not tried.

    Raises:
        UnsupportedOptimizerError: the meaning of a state tensor is not known, or a step after a cut fails.
    """
    if mode == "reset":
        _check_reset(optimizer)
        return
    kept = {
        f"{layer_name}.{name}".lstrip("."): optimizer.state.get(parameter, {})
        for layer_name, layer in layers.items()
        for name, parameter in layer.named_parameters()
    }
    if not any(kept.values()):
        kept = dict.fromkeys(list(kept)[:1], _state_after_a_step(optimizer))
    for name, state in kept.items():
        for key, value in state.items():
            if not _is_known(key, value):
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__name__} keeps '{key}' for {name}, and how that changes with the state basis "
                    "is not known; use SGD, Adam or AdamW, or pass carry='reset'"
                )


def _is_known(key: str, value: Any) -> bool:
    """Whether an entry of an optimizer's state is an average that can be carried over, or one number for all."""
    return key in _GRADIENT_LIKE or key in _SQUARED or not isinstance(value, Tensor) or value.ndim == 0


def _check_reset(optimizer: Optimizer) -> None:
    """Try the next step after a cut, on a small matrix."""
    parameter = _small_matrix(optimizer)
    one = _stepped(optimizer, parameter)
    if one is None:
        return
    try:
        with torch.no_grad():
            parameter.data = parameter.data[:2].clone()
        parameter.grad = None
        begin_anew(one, [parameter])
        _step(one, parameter)
    except Exception as error:
        raise _makes_no_step(optimizer, "after a cut", error) from error


def _state_after_a_step(optimizer: Optimizer) -> Mapping[str, Any]:
    """The state that an optimizer of this kind and settings keeps for a parameter; empty if it cannot be tried."""
    parameter = _small_matrix(optimizer)
    one = _stepped(optimizer, parameter)
    return {} if one is None else one.state[parameter]


def _stepped(optimizer: Optimizer, parameter: nn.Parameter) -> Optimizer | None:
    """An optimizer of the same kind and settings after one step; None if it cannot be tried.

    Raises:
        UnsupportedOptimizerError: torch's own `SparseAdam`, which updates no parameter that cuts change.
    """
    one = _another(optimizer, parameter)
    try:
        if one is not None:
            _step(one, parameter)
    except Exception as error:
        if type(optimizer).__module__.startswith("torch.optim"):
            raise _makes_no_step(optimizer, "with the dense gradients of state space layers", error) from error
        return None  # it may need more than gradients, as second-order optimizers do
    return one


def _makes_no_step(optimizer: Optimizer, when: str, error: Exception) -> UnsupportedOptimizerError:
    reason = (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")
    return UnsupportedOptimizerError(
        f"{type(optimizer).__name__} makes no step {when} ({reason}); use SGD, Adam or AdamW for these layers"
    )


def _small_matrix(optimizer: Optimizer) -> nn.Parameter:
    """A parameter on the device of the optimizer's own, since some settings are for GPUs only."""
    first = next((p for group in optimizer.param_groups for p in group["params"]), torch.zeros(()))
    return nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 1.5]], dtype=first.dtype, device=first.device))


def _step(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    def closure() -> float:
        parameter.grad = parameter.detach().clone()
        return float(parameter.detach().square().sum()) / 2

    closure()
    optimizer.step(closure)  # type: ignore[arg-type]


def _another(optimizer: Optimizer, parameter: nn.Parameter, group: Mapping[str, Any] | None = None) -> Optimizer | None:
    """A new optimizer of the same kind for one parameter.

    Args:
        optimizer: the optimizer.
        parameter: the parameter.
        group: settings; by default those of the optimizer's first group.

    Returns:
        None if it cannot be built from its settings alone.
    """
    settings = {key: value for key, value in (group or optimizer.param_groups[0]).items() if key != "params"}
    names = inspect.signature(type(optimizer).__init__).parameters
    given = {key: value for key, value in {**optimizer.defaults, **settings}.items() if key in names}
    try:
        return type(optimizer)([{**settings, "params": [parameter]}], **given)
    except Exception:
        return None


def begin_anew(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Reset an optimizer's state for some parameters to that of a newly built optimizer, in place.

    Most optimizers have no state before their first step; Adagrad starts with sums. L-BFGS keeps one state for all its
    parameters together, which is dropped as a whole.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()
    wanted = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in wanted:
                optimizer.state.pop(parameter, None)
                fresh = _another(optimizer, parameter, group)
                if fresh is not None and fresh.state.get(parameter):
                    optimizer.state[parameter] = fresh.state[parameter]
    forget_sizes(optimizer)


def forget_sizes(optimizer: Optimizer) -> None:
    """Let L-BFGS count its parameters' entries again, which it does only once by itself."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer._numel_cache = None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def check_trained(optimizer: Optimizer, layers: Mapping[str, tuple[nn.Module, LayerAdapter]]) -> None:
    """Refuse, before any cut, an optimizer that does not train all parameters that a cut would change.

    Otherwise a second optimizer would keep state of the old shapes.

    Raises:
        UnsupportedOptimizerError: a parameter with ``requires_grad`` is in none of its groups.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer_name, (layer, adapter) in layers.items():
        for name in resized(layer, adapter, adapter.state_dim(layer)).values():
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

    Call it after the change was written. The Parameter objects are still the keys of the optimizer's state.
    """
    if mode == "reset":
        begin_anew(optimizer, [layer.get_parameter(name) for name in change.values()])
        return
    for part in change.parameters:
        parameters = [layer.get_parameter(name) for name in part.names]
        states: list[dict[str, Any]] = [optimizer.state.get(parameter, {}) for parameter in parameters]
        for key in sorted({key for state in states for key in state}):
            old = [state.get(key) for state in states]
            tensors = [value for value in old if isinstance(value, Tensor) and value.ndim > 0]
            if not tensors:
                continue  # step counters
            # One parameter of a pair may have no state, since it is frozen or had no gradient. Its averages are zero.
            whole = [value if isinstance(value, Tensor) else torch.zeros_like(tensors[0]) for value in old]
            new = _carried(whole, part, key, mode)
            for state, before, value in zip(states, old, new, strict=True):
                if before is not None:
                    state[key] = value


def _carried(old: list[Tensor], part: ParameterChange, key: str, mode: Carry) -> list[Tensor]:
    if not _is_known(key, old[0]):
        raise UnsupportedOptimizerError(f"the optimizer's '{key}' is no average that can be carried over")
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
    """Apply a cut of a model to an averaged copy of it, in place.

    A cut changes the basis of the states, so averages over values from before and after it have no meaning. Parameters
    that the cut changed are set to the model's new values, from which averaging restarts. All others keep their
    averages. An average that counts its steps (``n_averaged``) has one count for all parameters; the count restarts, so
    these averages then weigh as much as one step.

    Args:
        follower: a copy of the model, or a wrapper of one, such as `torch.optim.swa_utils.AveragedModel`.
        model: the model.
        changes: what was written into the model's layers, by their names in it.
    """
    layers = paired_layers(follower, model)
    for name, change in changes.items():
        write(layers[name], change)
    tell_written(follower)
    # With the old count, the first new value would get the weight of all steps before the cut.
    count = getattr(follower, "n_averaged", None)
    if isinstance(count, Tensor):
        count.clamp_(max=1)
