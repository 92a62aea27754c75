"""The examination of an optimizer before any cut: can its state follow one?

For one layer of each kind the optimizer's own code makes a step on a copy, the copy is cut by selecting its first
entries, its state is carried over, and the next step is made. The training is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.adapters import LayerAdapter, find_layers
from compressm.adapters.changes import LayerChange, ParameterChange, selection_change
from compressm.adapters.registry import cut_parameters, resized
from compressm.cutting.carried import prepare_carry
from compressm.cutting.moves import Carry
from compressm.cutting.optimizer_state import SECOND_MOMENTS, is_number, kinds_of, refuse_known, unknown_state
from compressm.cutting.optimizers import Together, forget_sizes, members_of, refuse_sharded
from compressm.cutting.twins import state_for, step_twin, twin, undisturbed
from compressm.errors import UnsupportedOptimizerError

# Settings that do not decide what an optimizer keeps. Groups may differ in them for every layer.
_HARMLESS = {"params", "lr", "initial_lr", "weight_decay"}


def check_optimizer(
    optimizer: Optimizer | Together, layers: Mapping[str, nn.Module], mode: Carry = "transform"
) -> None:
    """Refuse, before any cut, an optimizer whose state for these layers could not be carried over.

    Args:
        optimizer: is only read.
        layers: by their names in the model.
        mode: see `compressm.cutting.carry`.

    Raises:
        UnsupportedOptimizerError: the meaning of a state tensor is not known, or a step after a cut fails.
    """
    for member in members_of(optimizer):
        refuse_sharded(member)
        if mode != "reset":
            refuse_known(member)
        seen: set[Any] = set()
        for name, layer in layers.items():
            trained = _trained(member, layer)
            if not trained:
                continue
            if mode != "reset":
                _check_present(member, trained, name)
            signature = (type(layer), *_signature(member, trained))
            if signature not in seen:
                seen.add(signature)
                _try_a_cut(member, layer, trained, mode, name)


def check_trained(optimizer: Optimizer | Together, layers: Mapping[str, tuple[nn.Module, LayerAdapter]]) -> None:
    """Refuse, before any cut, an optimizer that does not train all parameters that a cut would change.

    Otherwise a second optimizer would keep state of the old shapes.

    Raises:
        UnsupportedOptimizerError: a parameter with ``requires_grad`` is in none of its groups.
    """
    trained = {id(p) for member in members_of(optimizer) for group in member.param_groups for p in group["params"]}
    for layer_name, (layer, adapter) in layers.items():
        for name, parameter in cut_parameters(layer, adapter).items():
            if parameter.requires_grad and id(parameter) not in trained:
                full_name = f"{layer_name}.{name}".lstrip(".")
                raise UnsupportedOptimizerError(
                    f"{full_name} is a parameter that a cut changes, and is not in the optimizer: put all such "
                    "parameters into one optimizer, in groups with their own settings if need be, pass a list of all "
                    "optimizers, or set requires_grad=False for those that are not trained"
                )


def _trained(optimizer: Optimizer, layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a cut of a layer changes and this optimizer trains."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = cut_parameters(layer, find_layers(layer)[""][1])
    return {name: p for name, p in found.items() if p.requires_grad and id(p) in held}


def _signature(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> list[Any]:
    """What may let the examination of two layers end differently."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found: list[Any] = []
    for name, p in trained.items():
        settings = {key: value for key, value in group_of[id(p)].items() if key not in _HARMLESS}
        found.append((name, p.dtype, p.device, p.numel() < 4096, re.sub(r"\d+", "#", repr(settings.get("name", ""))),
                      repr({key: value for key, value in settings.items() if key != "name"})))  # fmt: skip
    return found


def _check_present(optimizer: Optimizer, trained: Mapping[str, nn.Parameter], layer: str) -> None:
    """Refuse state of unknown kind that the optimizer has already."""
    kinds = kinds_of(optimizer)
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in kinds and not is_number(value):
                raise unknown_state(optimizer, key, f"{layer}.{name}".lstrip("."))


def _try_a_cut(
    optimizer: Optimizer, layer: nn.Module, trained: Mapping[str, nn.Parameter], mode: Carry, name: str
) -> None:
    """Step, cut and step again, on copies of one layer's parameters.

    Raises:
        UnsupportedOptimizerError: names the optimizer, and what it cannot do.
    """
    copies = {parameter: nn.Parameter(parameter.detach().clone()) for parameter in trained.values()}
    by_name = {key: copies[parameter] for key, parameter in trained.items()}
    one = twin(optimizer, copies, state=not isinstance(optimizer, torch.optim.LBFGS))  # its state is of all parameters
    forget_sizes(one)
    counts = _numbers(one)
    with undisturbed():
        try:
            step_twin(one)
        except Exception as error:
            raise _makes_no_step(optimizer, "with the dense gradients of state space layers", error) from error
        finite = _not_finite(by_name, one) is None  # otherwise the training has the same trouble without cuts
        if mode == "reset":
            _check_counts(optimizer, one, counts)
        else:
            _check_present(one, by_name, name)
        change = _first_entries(layer, by_name)
        if mode != "reset":
            _check_numbers(one, by_name, change, name)
        store = prepare_carry(one, by_name, change, mode, name)
        for key, value in change.values().items():
            by_name[key].data, by_name[key].grad = value.clone(), None
        store()
        try:
            step_twin(one)
        except Exception as error:
            raise _makes_no_step(optimizer, "after a cut", error) from error
    if finite and (what := _not_finite(by_name, one)):
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__}: after a cut and a step {what} is not finite, on a copy of a layer; use AdamW "
            "for these layers"
        )


def _check_numbers(one: Optimizer, parameters: Mapping[str, nn.Parameter], change: LayerChange, layer: str) -> None:
    """Refuse numbers of unknown kind that follow from a parameter's shape, such as a count of its rows."""
    for name, new in change.values().items():
        numbers = {key: value for key, value in one.state.get(parameters[name], {}).items() if type(value) is int}
        suspects = [key for key, value in numbers.items() if value > 1 and key not in kinds_of(one)]
        if suspects:  # after their first step, counters are 1
            old_state, new_state = (state_for(one, parameters[name], x) for x in (parameters[name], new))
            for key in suspects:
                if old_state.get(key) != new_state.get(key):
                    raise unknown_state(one, key, f"{layer}.{name}".lstrip("."))


def _first_entries(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> LayerChange:
    """The cut that keeps the first entries of every parameter."""
    adapter = find_layers(layer)[""][1]
    unit = adapter.unit(layer)
    smaller = resized(layer, adapter, max(1, adapter.state_dim(layer) // (2 * unit)) * unit)
    values: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    parts: list[ParameterChange] = []
    for part in smaller.parameters:
        for name, value in zip(part.names, part.values, strict=True):
            if name not in values:
                continue
            old, states = values[name], value.shape[part.axis]
            parts.append(selection_change(name, old, part.axis, torch.arange(states)))
            values[name] = parts[-1].values[0]
    return LayerChange(tuple(parts), {})


def _numbers(optimizer: Optimizer) -> dict[tuple[int, str], float]:
    """The numbers in an optimizer's groups."""
    return {
        (i, key): float(value)
        for i, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if is_number(value) and isinstance(value, (int, float, Tensor))
    }


def _check_counts(optimizer: Optimizer, one: Optimizer, before: Mapping[tuple[int, str], float]) -> None:
    """Refuse to begin anew where second moments would get no bias correction.

    Args:
        optimizer: for the message.
        one: its twin, after a step.
        before: the numbers in the twin's groups before it.
    """
    counts = [key for (i, key), value in _numbers(one).items() if value == before.get((i, key), 0.0) + 1]
    kinds = kinds_of(optimizer)
    keys = {key for state in one.state.values() for key, value in state.items() if not is_number(value)}
    divides = any(kinds.get(key, "quadratic").partition(" ")[0] in SECOND_MOMENTS for key in keys)
    if counts and divides:
        advice = "use carry='transform'" if kinds else "use AdamW for these layers"
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} counts the steps of all parameters together ('{counts[0]}' of its groups), so "
            f"second moments that begin anew get no bias correction, and steps are many times too long: {advice}"
        )


def _not_finite(parameters: Mapping[str, nn.Parameter], one: Optimizer) -> str | None:
    """The name of a parameter or of a part of its state that is not finite, if there is one."""
    for name, parameter in parameters.items():
        if not _is_finite(parameter):
            return name
        for key, value in one.state.get(parameter, {}).items():
            plain = isinstance(value, Tensor) and type(value) is Tensor and value.is_floating_point()
            if plain and not _is_finite(value):
                return f"'{key}' of {name}"
    return None


def _is_finite(value: Tensor) -> bool:
    return value.numel() == 0 or bool(torch.stack(torch.aminmax(value.detach())).isfinite().all())


def _makes_no_step(optimizer: Optimizer, when: str, error: Exception) -> UnsupportedOptimizerError:
    reason = (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")
    return UnsupportedOptimizerError(
        f"{type(optimizer).__name__} makes no step {when} ({reason}); use SGD, Adam or AdamW for these layers"
    )


__all__ = ["check_optimizer", "check_trained"]
