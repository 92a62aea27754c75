"""The optimizer's state through one cut: computed before the cut is written, and stored after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.adapters.changes import LayerChange, ParameterChange
from compressm.cutting.moves import Carry, PartStates, State, sliced
from compressm.cutting.optimizer_state import kinds_of, unknown_state
from compressm.cutting.optimizers import Together, forget_sizes, members_of
from compressm.cutting.twins import another, state_for


@torch.no_grad()
def prepare_carry(
    optimizer: Optimizer | Together,
    parameters: Mapping[str, nn.Parameter],
    change: LayerChange,
    mode: Carry,
    layer: str = "",
) -> Callable[[], None]:
    """Compute the optimizer's state of a layer after a change. Nothing is written yet.

    Args:
        optimizer: is only read.
        parameters: the layer's, by name, with their values before the change.
        change: of the layer.
        mode: see `compressm.cutting.carry`.
        layer: the layer's name, for messages.

    Returns:
        a function without arguments that stores the new state. Call it once the change is written.

    Raises:
        UnsupportedOptimizerError: a part of the state is of unknown kind.
    """
    written = [parameters[name] for name in change.values()]
    if mode == "reset":
        return lambda: begin_anew(optimizer, written)
    found = [(member, _states_after(member, parameters, change, mode, layer)) for member in members_of(optimizer)]

    def store() -> None:
        for member, states in found:
            for name, state in states.items():
                held = member.state[parameters[name]]
                held.clear()
                held.update(state)

    return store


def _states_after(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], change: LayerChange, mode: Carry, layer: str
) -> dict[str, State]:
    """The state of each parameter of a change that has some. Several parts may change one parameter in turn."""
    states: dict[str, State] = {}
    values: dict[str, Tensor] = {}
    for part in change.parameters:
        olds = [values.get(name, parameters[name].detach()) for name in part.names]
        before: list[State] = [states.get(name) or optimizer.state.get(parameters[name]) or {} for name in part.names]
        if any(before):
            after = _part_states(optimizer, parameters, part, olds, before, mode, layer).carried()
            states.update({name: new for name, new in zip(part.names, after, strict=True) if new})
        values.update(zip(part.names, part.values, strict=True))
    return states


def _part_states(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    part: ParameterChange,
    olds: Sequence[Tensor],
    states: Sequence[State],
    mode: Carry,
    layer: str,
) -> PartStates:
    def fresh(i: int) -> State:
        return state_for(optimizer, parameters[part.names[i]], part.values[i].to(olds[i]))

    def unknown(key: str, i: int) -> Exception:
        return unknown_state(optimizer, key, f"{layer}.{part.names[i]}".lstrip("."))

    part = sliced(part, olds) if mode == "slice" else part
    return PartStates(part, olds, states, kinds_of(optimizer), fresh, unknown)


def begin_anew(optimizer: Optimizer | Together, parameters: Sequence[Tensor]) -> None:
    """Reset an optimizer's state for some parameters to that of a newly built optimizer, in place.

    Most optimizers have no state before their first step, and make it at the next one: averages of zero, and copies of
    the parameter's present values. Adagrad starts with sums. L-BFGS keeps one state for all its parameters together,
    which is dropped as a whole.
    """
    wanted = {id(parameter) for parameter in parameters}
    for member in members_of(optimizer):
        if isinstance(member, torch.optim.LBFGS):
            member.state.clear()
        for group in member.param_groups:
            for parameter in group["params"]:
                if id(parameter) in wanted:
                    member.state.pop(parameter, None)
                    fresh = another(member, parameter, group)
                    if fresh is not None and fresh.state.get(parameter):
                        member.state[parameter] = fresh.state[parameter]
    forget_sizes(optimizer)


__all__ = ["begin_anew", "prepare_carry"]
