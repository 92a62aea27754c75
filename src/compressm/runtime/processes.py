"""Several processes on `torch.distributed`: one decision, the same cut on every rank, and replicas that notice it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")


_alone = False  # rank 0 is deciding, see from_first_rank: whoever waited for the others then would wait for ever


def world_size() -> int:
    """Number of processes that work together; 1 where `torch.distributed` is not set up, or rank 0 decides alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def from_first_rank(decide: Callable[[], Value]) -> Value:
    """What rank 0 decides, on all ranks; the others do not even compute it.

    Equal weights need not give equal decisions: a different CPU or BLAS moves the last digit, and the last digit may
    decide about a state. An error on rank 0 is raised on all ranks, so that none is left waiting.

    Args:
        decide: called without arguments, on rank 0 only, where it is as if there were no other process; returns
            anything that can be pickled, tensors on the CPU.
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
    """The values of all ranks, on all ranks, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def summed_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, each summed over all ranks, on all ranks."""
    if world_size() == 1:
        return dict(tensors)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    moved = {name: value.to(device, copy=True) for name, value in tensors.items()}
    for value in moved.values():
        dist.all_reduce(value)
    return {name: value.cpu() for name, value in moved.items()}


def rebuild_replicas(model: nn.Module) -> int:
    """Let every `DistributedDataParallel` around a model take notice of its new shapes, in place.

    DDP's reducer holds buckets of the old sizes and hooks on gradient accumulators that a cut has replaced: left
    alone it would go on averaging the gradients of the other parameters only, and the ranks would drift apart. DDP can
    be unpickled, and then builds its reducer anew; the same is done here to the object that hosts hold on to. Wrappers
    are found wherever they are, since Trainer, Lightning and Accelerate keep them to themselves.

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
    # The old reducer goes first: its end takes its hooks off the parameters that were not cut.
    del wrapper.reducer, wrapper.logger
    wrapper.__setstate__(state)
    for hook, hook_state in hooks:
        wrapper.register_comm_hook(hook_state, hook)


__all__ = ["from_first_rank", "gathered", "rank", "rebuild_replicas", "summed_tensors", "world_size"]
