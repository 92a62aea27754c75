"""What each process of tests/test_sharding.py runs: FSDP2 through two cuts, maybe resumed from its own checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim import Optimizer

from compressm import compress
from compressm.cutting import state_dims
from compressm.integrations.sharding import compress_sharded, fit_to_checkpoint
from compressm.layers import SequenceClassifier
from distributed_script import batch

STEPS, CUTS = 14, {4: 10, 8: 5}


LAYER = os.environ.get("LAYER", "lru")
CARRY = os.environ.get("CARRY", "transform")


def build() -> SequenceClassifier:
    torch.manual_seed(0)
    options = {"r_min": 0.9} if LAYER == "lru" else {}
    return SequenceClassifier(1, 2, 4, 16, n_layers=2, dropout=0.0, norm="layer", layer=LAYER, **options)


def shard(model: nn.Module) -> None:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def build_optimizer(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def main(out: Path, resume: Path | None) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    model, start = build(), 0
    if world > 1:
        dist.init_process_group("gloo")
        if resume is not None:
            fit_to_checkpoint(model, resume)
        shard(model)
    optimizer = build_optimizer(model)
    if resume is not None:
        weights, states = get_state_dict(model, optimizer)
        tree = {"model": weights, "optimizer": states, "step": 0}
        dcp.load(tree, checkpoint_id=resume)
        set_state_dict(model, optimizer, model_state_dict=tree["model"], optim_state_dict=tree["optimizer"])
        start = tree["step"]
    losses = []
    for step in range(start, STEPS):
        u, y = batch(step)
        share = slice(rank * 8 // world, (rank + 1) * 8 // world)
        loss = F.cross_entropy(model(u[share]), y[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if states_wanted := CUTS.get(step + 1):
            rule = {"states": states_wanted, "data": None if LAYER == "lru" else [u], "carry": CARRY}
            if world > 1:
                model, optimizer, _ = compress_sharded(
                    model, optimizer, build=build, shard=shard, build_optimizer=build_optimizer, **rule
                )
            else:
                compress(model, optimizer=optimizer, **rule)
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
        if step + 1 == 10 and world > 1 and resume is None:
            weights, states = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": states, "step": step + 1}, checkpoint_id=out / "checkpoint")
    torch.save({"losses": losses, "dims": list(state_dims(model).values())}, out / f"rank{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    main(folder, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
