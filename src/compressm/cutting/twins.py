"""A twin of an optimizer: the same code and settings, for copies of some of its parameters."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import warnings
from collections import OrderedDict
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.cutting.copies import copied_state
from compressm.runtime.random_state import rng_state, set_rng_state


def twin(optimizer: Optimizer, copies: Mapping[nn.Parameter, nn.Parameter], *, state: bool = True) -> Optimizer:
    """An optimizer of the same class, settings and attributes that trains copies of parameters.

    Nothing is shared that its steps would change, and only what belongs to these parameters is copied. Its constructor
    is not called, since settings that a constructor took need not be found in it any more.

    Args:
        optimizer: is only read.
        copies: the twin's parameters, by the optimizer's own.
        state: copy these parameters' state. Otherwise the twin has none.
    """
    one: Optimizer = object.__new__(type(optimizer))
    held = vars(optimizer)
    memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    memo |= {id(parameter): new for parameter, new in copies.items()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        ours = [copies[parameter] for parameter in group["params"] if parameter in copies]
        memo[id(group["params"])] = ours  # attributes may refer to this list
        if ours:
            settings = {key: value for key, value in group.items() if key != "params"}
            groups.append({"params": ours, **copied_state(settings, memo)})
    memo[id(optimizer.param_groups)] = groups
    kept = {parameter: values for parameter, values in optimizer.state.items() if state and parameter in copies}
    memo[id(optimizer.state)] = one_state = copy.copy(optimizer.state)
    one_state.clear()
    one_state.update({memo[id(parameter)]: copied_state(values, memo) for parameter, values in kept.items()})
    for key, value in held.items():
        if "_hooks" in key and isinstance(value, dict):
            vars(one)[key] = OrderedDict()  # a user's hooks count real steps only
        elif not (callable(value) and hasattr(type(optimizer), key)):  # a scheduler replaces `step` on the instance
            vars(one)[key] = copied_state(value, memo)
    one.param_groups, one.state = groups, one_state
    return one


def step_twin(one: Optimizer) -> None:
    """Make one step of a twin, with random gradients. Call it in `undisturbed`."""
    parameters = [parameter for group in one.param_groups for parameter in group["params"]]

    # A prime number of values, repeated, since random numbers take longer than all else. None of them is so small that
    # its square vanishes in float16.
    noise = torch.randn(1009)
    noise += noise.sign() / 2

    def closure() -> float:
        for parameter in parameters:
            repeated = noise.repeat(-(-parameter.numel() // noise.numel()))[: parameter.numel()]
            parameter.grad = repeated.view(parameter.shape).to(parameter)
        return 1.0

    if callable(train := getattr(one, "train", None)):  # schedule-free optimizers refuse steps in evaluation mode
        train()
    closure()
    first = next(iter(inspect.signature(one.step).parameters.values()), None)
    if first is not None and first.default is first.empty and first.kind is first.POSITIONAL_OR_KEYWORD:
        one.step(closure)  # type: ignore[arg-type]  # L-BFGS needs it
    else:
        one.step()


@contextlib.contextmanager
def undisturbed() -> Generator[None, None, None]:
    """Run a twin without a trace: random generators go back, warnings are dropped, and nothing is compiled."""
    random_state = rng_state()
    stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        with warnings.catch_warnings(), stance, torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        set_rng_state(random_state)


def state_for(optimizer: Optimizer, parameter: nn.Parameter, new: Tensor) -> Mapping[str, Any]:
    """The state that an optimizer makes by itself for a parameter of another shape, after one step.

    Args:
        optimizer: is only read.
        parameter: one of its parameters.
        new: the value of the other shape.
    """
    other = nn.Parameter(new.detach().clone())
    with undisturbed():
        step_twin(one := twin(optimizer, {parameter: other}, state=False))
    return one.state[other]


def another(optimizer: Optimizer, parameter: nn.Parameter, group: Mapping[str, Any]) -> Optimizer | None:
    """A new optimizer of the same class for one parameter, by its constructor.

    Args:
        optimizer: the optimizer.
        parameter: the parameter.
        group: settings.

    Returns:
        None if it cannot be built from its settings alone.
    """
    settings = {key: value for key, value in group.items() if key != "params"}
    names = inspect.signature(type(optimizer).__init__).parameters
    given = {key: value for key, value in {**optimizer.defaults, **settings}.items() if key in names}
    try:
        return type(optimizer)([{**settings, "params": [parameter]}], **given)
    except Exception:
        return None


__all__ = ["another", "state_for", "step_twin", "twin", "undisturbed"]
