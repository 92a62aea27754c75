"""Several processes on `torch.distributed`: one decision and the same cut on every rank, and updated DDP wrappers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressm.errors import CompressmError, UnsupportedModelError

Value = TypeVar("Value")


_alone = False  # True while rank 0 decides, see from_first_rank: collective calls would then wait for ever


def world_size() -> int:
    """Number of cooperating processes; 1 if `torch.distributed` is not set up, or while rank 0 decides alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def from_first_rank(decide: Callable[[], Value]) -> Value:
    """Call a function on rank 0 only, and return its result on all ranks.

    Equal weights need not give equal decisions: a different CPU or BLAS changes the last digit of a result, and that
    may change the rank. An error on rank 0 is raised on all ranks, so that none waits for ever.

    Args:
        decide: called without arguments on rank 0, which meanwhile behaves as the only process. It returns anything
            that can be pickled, with tensors on the CPU.
    """
    global _alone
    if world_size() == 1:
        return decide()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        _alone = True
        try:
            outcome[0] = decide()
        except Exception as error:
            outcome[1] = error
        finally:
            _alone = False
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gathered(value: Value) -> list[Value]:
    """The values of all ranks in rank order, returned on all ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def raised_on_all(act: Callable[[], Value]) -> Value:
    """Call a function on all ranks. An error of compressm's own on one rank is raised on all, so that none waits for
    ever.

    Args:
        act: called without arguments. If it communicates itself, an error in it must not leave other ranks waiting.
    """
    found: list[Value] = []
    unfit = None
    try:
        found.append(act())
    except CompressmError as error:
        unfit = error
    if errors := [error for error in gathered(unfit) if error is not None]:
        raise unfit or errors[0]
    return found[0]


def summed_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, each summed over all ranks; returned on all ranks."""
    if world_size() == 1:
        return dict(tensors)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    moved = {name: value.to(device, copy=True) for name, value in tensors.items()}
    for value in moved.values():
        dist.all_reduce(value)
    return {name: value.cpu() for name, value in moved.items()}


def check_replicas(model: nn.Module) -> None:
    """Refuse, before a cut, settings of `DistributedDataParallel` wrappers that store the old shapes of parameters.

    Raises:
        UnsupportedModelError: such a setting, and the remedy.
    """
    for wrapper in _wrappers_of(model):
        state = vars(wrapper)
        if state["mixed_precision"] is not None:
            raise UnsupportedModelError(
                "DistributedDataParallel(mixed_precision=...) keeps copies of the parameters in their first shapes, "
                "which cuts change: leave it out, and use torch.autocast"
            )
        if state["_delay_all_reduce_params"]:
            raise UnsupportedModelError(
                "DistributedDataParallel(delay_all_reduce_named_params=...) keeps a buffer of the parameters' first "
                "sizes, which cuts change: leave it out"
            )
        for hook, hook_state in state["_comm_hooks"]:
            _check_hook(hook, hook_state)


def _check_hook(hook: Callable[..., Any], state: object) -> None:
    known = state is None or isinstance(state, dist.ProcessGroup) or _is_power_sgd(state)
    if type(state).__name__ == "PostLocalSGDState":
        raise UnsupportedModelError(
            "DistributedDataParallel's communication hook is post_localSGD: weights then differ between processes, and "
            "a cut writes the same into all; use another hook until the last cut"
        )
    if not known and not callable(getattr(state, "reset", None)):
        raise UnsupportedModelError(
            f"DistributedDataParallel's communication hook {getattr(hook, '__qualname__', hook)} has a state of type "
            f"{type(state).__name__}, and what it stores for each bucket does not fit after a cut: give that type a "
            "method reset(), which is called after every cut and drops it"
        )


def _is_power_sgd(state: object) -> bool:
    return type(state).__name__ == "PowerSGDState"  # by name, since importing its module takes time


def rebuild_replicas(model: nn.Module) -> int:
    """Rebuild every `DistributedDataParallel` around a model for the model's new shapes, in place.

    DDP's reducer holds buckets of the old sizes, and hooks on gradient accumulators that a cut has replaced. Without a
    rebuild it would average only the gradients of the other parameters, and the ranks would diverge. Unpickling a DDP
    wrapper builds a new reducer; this function does the same to the wrapper object in use.

    Args:
        model: the wrapped model, the wrapper, a model around it, or a part of it.

    Returns:
        how many wrappers were rebuilt.
    """
    wrappers = _wrappers_of(model)
    for wrapper in wrappers:
        _rebuild(wrapper)
    return len(wrappers)


def _wrappers_of(model: nn.Module) -> list[DistributedDataParallel]:
    """The wrappers around a model, found among all objects, since Trainer, Lightning and Accelerate do not expose
    them. There is one in a group of a single process too. They are known by the parameters, since torch's ``replicate``
    wraps a list of these instead of the model."""
    if _alone or not (dist.is_available() and dist.is_initialized()):
        return []
    parts = {id(parameter) for parameter in model.parameters()}
    # type() and not isinstance(): asking some lazy objects for their __class__ has side effects.
    return [
        o
        for o in gc.get_objects()
        if issubclass(type(o), DistributedDataParallel) and not parts.isdisjoint(id(one) for one in o.parameters())
    ]


def _rebuild(wrapper: Any) -> None:
    state: dict[str, Any] = {k: v for k, v in vars(wrapper).items() if k not in ("reducer", "logger")}
    state["_has_rebuilt_buckets"] = False
    # A static graph is learnt in the reducer's first backward pass, at the end of which DDP must start the averaging.
    state["_static_graph_delay_allreduce_enqueued"] = False
    hooks = list(state["_comm_hooks"])
    built_in = "" if hooks else str(wrapper._get_ddp_logging_data().get("comm_hook", "")).rpartition(".")[2]
    state["_comm_hooks"].clear()
    # Delete the old reducer first: this removes its hooks from the parameters that were not cut.
    del wrapper.reducer, wrapper.logger
    wrapper.__setstate__(state)
    for hook, hook_state in hooks:
        _forget_buckets(hook_state)
        wrapper.register_comm_hook(hook_state, hook)
    kinds: dict[str, Any] = vars(dist)["BuiltinCommHookType"].__members__
    if built_in in kinds:
        wrapper._register_builtin_comm_hook(kinds[built_in])
    if wrapper.static_graph:
        _synchronise_once(wrapper)


def _synchronise_once(wrapper: DistributedDataParallel) -> None:
    """Average the gradients of the next pass even under ``no_sync``, since DDP fails if it learns a static graph there.

    The result is the same: what is averaged already does not change when the sum over all batches is averaged.
    """
    wanted: list[bool] = []

    def before(module: DistributedDataParallel, _: Any) -> None:
        if torch.is_grad_enabled():
            wanted.append(module.require_backward_grad_sync)
            module.require_backward_grad_sync = True

    def after(module: DistributedDataParallel, *_: Any) -> None:
        if wanted:
            module.require_backward_grad_sync = wanted.pop()
            for handle in handles:
                handle.remove()

    handles = [wrapper.register_forward_pre_hook(before), wrapper.register_forward_hook(after, always_call=True)]


def _forget_buckets(state: Any) -> None:
    """Drop what a communication hook stores for each bucket."""
    if _is_power_sgd(state):
        for stored in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            stored.clear()
        # DDP forms its buckets anew after the first iteration, as at the beginning.
        state.start_powerSGD_iter = max(state.start_powerSGD_iter, state.iter + 2)
    elif callable(reset := getattr(state, "reset", None)) and not isinstance(state, dist.ProcessGroup):
        reset()


__all__ = [
    "check_replicas",
    "from_first_rank",
    "gathered",
    "raised_on_all",
    "rank",
    "rebuild_replicas",
    "summed_tensors",
    "world_size",
]
