"""Models sharded by FSDP2 (`torch.distributed.fsdp.fully_shard`).

A sharded parameter cannot be resized in place, since FSDP2 fixes padding, all-gather buffers and the layout of shards
when it wraps a parameter. A cut therefore gathers the model and its optimizer's state on rank 0, cuts it there, and
shards the smaller model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from compressm.adapters.composed import is_kind
from compressm.cutting import Report, compress, resize_states
from compressm.cutting.carry import begin_anew
from compressm.cutting.fitting import fit
from compressm.errors import CheckpointError, UnsupportedModelError
from compressm.runtime.processes import from_first_rank, rank

_WRAPPERS = (
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "torch.nn.parallel.distributed.DistributedDataParallel",
)


def compress_sharded(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    build: Callable[[], nn.Module],
    shard: Callable[[nn.Module], Any],
    build_optimizer: Callable[[nn.Module], Optimizer],
    **rule: Any,
) -> tuple[nn.Module, Optimizer, Report]:
    """Reduce a sharded model once, with its optimizer's state. All ranks call it, between two steps.

        model, optimizer, report = compress_sharded(
            model, optimizer, build=build, shard=shard, build_optimizer=build_optimizer, tolerance=0.02
        )

    Afterwards give a scheduler the new optimizer (``scheduler.optimizer = optimizer``). The learning rates are part of
    the optimizer's state.

    Args:
        model: sharded by ``shard``. Do not use it any more.
        optimizer: the optimizer of its parameters. Do not use it any more either.
        build: returns the model as it was built at first, unsharded.
        shard: calls `fully_shard` on a model from ``build``, in place.
        build_optimizer: returns the optimizer of a model.
        **rule: size and method of the cut, see `compressm.compress`.

    Returns:
        the smaller model, sharded; its optimizer; and a report.

    Raises:
        InvalidRankRuleError, UnsupportedModelError, UnsupportedOptimizerError, InvalidSystemError: on all ranks.
    """
    _refuse_wrappers(model)
    on_first = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, states = get_state_dict(model, optimizer, options=on_first)  # empty on the other ranks

    def cut() -> tuple[Report, list[str]]:
        whole = fit(build(), cast("dict[str, Tensor]", weights))
        whole.load_state_dict(weights)
        its_optimizer = build_optimizer(whole)
        set_optimizer_state_dict(whole, its_optimizer, states)
        report = compress(whole, optimizer=its_optimizer, **rule)
        smaller = get_state_dict(whole, its_optimizer)
        weights.update(smaller[0])
        states.update(smaller[1])
        kept = {id(parameter) for parameter in its_optimizer.state}
        return report, [name for name, one in whole.named_parameters() if kept and id(one) not in kept]

    report, begun_anew = from_first_rank(cut)
    smaller = build()
    resize_states(smaller, report.state_dims)
    shard(smaller)
    optimizer = build_optimizer(smaller)
    # set_state_dict would take the empty dict of the other ranks for "no model", and rank 0 would wait forever.
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=not begun_anew)
    set_model_state_dict(smaller, weights if rank() == 0 else {}, options=from_first)
    set_optimizer_state_dict(smaller, optimizer, states if rank() == 0 else {}, options=from_first)
    if begun_anew:  # torch has given these parameters a state as if a step had been made
        begin_anew(optimizer, [one for name, one in smaller.named_parameters() if name in begun_anew])
    return smaller, optimizer, report


def _refuse_wrappers(model: nn.Module) -> None:
    """Refuse wrappers of other kinds.

    Raises:
        UnsupportedModelError: names the wrapper, and what to do.
    """
    for name, module in model.named_modules():
        kind = next((kind for kind in _WRAPPERS if is_kind(module, kind)), "")
        if kind:
            raise UnsupportedModelError(
                f"{name or 'the model'} is a {kind.rpartition('.')[2]}, and compress_sharded cuts models of "
                "fully_shard (FSDP2) alone: shard with it; a model in DistributedDataParallel is cut by Compressor or "
                "compress"
            )


def fit_to_checkpoint(model: nn.Module, folder: str | os.PathLike[str], key: str = "model") -> nn.Module:
    """Give an unsharded model the state dimensions of a `torch.distributed.checkpoint`, in place.

    `torch.distributed.checkpoint` reads into existing tensors of the right shapes, so call this before `fully_shard`.

    Args:
        model: the model as it was built at first.
        folder: the checkpoint.
        key: the key of the model's state dict in the checkpoint, as in ``dcp.save({"model": ..., "optimizer": ...})``.

    Returns:
        the same model.

    Raises:
        CheckpointError: there is no such checkpoint, or it is of another model.
    """
    try:
        entries = FileSystemReader(Path(folder)).read_metadata().state_dict_metadata
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no distributed checkpoint there ({error.strerror}); check the path"
        ) from error
    prefix = f"{key}."
    shapes = {
        name.removeprefix(prefix): tuple(entry.size)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
    }
    if not shapes:
        raise CheckpointError(f"{folder} holds nothing under {key!r}; give the key that the model was saved under")
    return fit(model, shapes)


__all__ = ["compress_sharded", "fit_to_checkpoint"]
