"""Several processes on `torch.distributed`: one decision and the same cut on every rank, and updated DDP wrappers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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


def summed_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, each summed over all ranks; returned on all ranks."""
    if world_size() == 1:
        return dict(tensors)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    moved = {name: value.to(device, copy=True) for name, value in tensors.items()}
    for value in moved.values():
        dist.all_reduce(value)
    return {name: value.cpu() for name, value in moved.items()}


def rebuild_replicas(model: nn.Module) -> int:
    """Rebuild every `DistributedDataParallel` around a model for the model's new shapes, in place.

    DDP's reducer holds buckets of the old sizes, and hooks on gradient accumulators that a cut has replaced. Without a
    rebuild it would average only the gradients of the other parameters, and the ranks would diverge. Unpickling a DDP
    wrapper builds a new reducer; this function does the same to the wrapper object in use. It searches all objects for
    wrappers, since Trainer, Lightning and Accelerate do not expose them.

    Args:
        model: the wrapped model, the wrapper, a model around it, or a part of it.

    Returns:
        how many wrappers were rebuilt.
    """
    if world_size() == 1:
        return 0
    parts = {id(module) for module in model.modules()}
    # type() and not isinstance(): asking some lazy objects for their __class__ has side effects.
    wrappers = [
        o
        for o in gc.get_objects()
        if issubclass(type(o), DistributedDataParallel) and not parts.isdisjoint(id(part) for part in o.modules())
    ]
    for wrapper in wrappers:
        _rebuild(wrapper)
    return len(wrappers)


def _rebuild(wrapper: DistributedDataParallel) -> None:
    state: dict[str, Any] = {k: v for k, v in vars(wrapper).items() if k not in ("reducer", "logger")}
    state["_has_rebuilt_buckets"] = False
    hooks = list(state["_comm_hooks"])
    state["_comm_hooks"].clear()
    # Delete the old reducer first: this removes its hooks from the parameters that were not cut.
    del wrapper.reducer, wrapper.logger
    wrapper.__setstate__(state)
    for hook, hook_state in hooks:
        wrapper.register_comm_hook(hook_state, hook)


__all__ = ["from_first_rank", "gathered", "rank", "rebuild_replicas", "summed_tensors", "world_size"]
