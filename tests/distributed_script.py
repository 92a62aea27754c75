"""What each process of tests/test_distributed.py runs: train, maybe stop half-way or resume, write down how it went.

torchrun --nproc-per-node 2 tests/distributed_script.py OUT [key=value ...]
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from compressm import Compressor
from compressm.cutting import state_dims
from compressm.layers import SequenceClassifier, parameter_groups
from compressm.training.snapshot import Training

STEPS = 24


def batch(step: int) -> tuple[Tensor, Tensor]:
    u = torch.randn(8, 40, 1, generator=torch.Generator().manual_seed(step))
    return u, (u.sum((1, 2)) > 0).long()


class Lines(logging.Handler):
    """Keeps what the library says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(out: Path, options: dict[str, str]) -> None:
    said = Lines()
    logging.getLogger("compressm").addHandler(said)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    layer, dropout = options.get("layer", "lru"), float(options.get("dropout", 0))
    special = {"r_min": 0.9} if layer == "lru" else {}
    model = SequenceClassifier(1, 2, 4, 16, n_layers=2, dropout=dropout, norm="layer", layer=layer, **special)
    torch.manual_seed(100 + rank)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2))
    network: nn.Module = model
    if world > 1:
        network = DistributedDataParallel(model, gradient_as_bucket_view="views" in options)
        if "hook" in options:
            network.register_comm_hook(None, allreduce_hook)
    arguments: dict[str, Any] = {"states": 4, "window": 0.5, "cuts": 3}  # cuts at 4, 8, 12
    if "harm" in options:  # every rank has an opinion of its own, and rank 0's counts
        arguments = {
            "states": 8,
            "max_drop": 0.1,
            "window": 0.5,
            "cuts": 1,
            "check_after": 3,
            "on_setback": "stop",
            "evaluate": lambda m: float(rank == 1 or set(state_dims(m).values()) == {16}),
        }
    if "gramians" in options:
        arguments["gramians"] = options["gramians"]
    compressor = Compressor(model if "inner" in options else network, optimizer, STEPS, **arguments)
    if "loads" in options:  # the compressor knows the wrapper, and the wrapped model is what weights are loaded into
        torch.manual_seed(1)
        model.load_state_dict(SequenceClassifier(1, 2, 4, 12, n_layers=2, norm="layer").state_dict())
    training = Training(model, optimizer)
    start = 0
    if "resume" in options:
        saved = torch.load(options["resume"].format(rank=rank), weights_only=True)
        start = saved["step"]
        compressor.load_state_dict(saved["compressor"])
        training.restore(saved["training"])
    losses: list[float] = []
    rng: dict[int, Tensor] = {}
    step = start
    while step < STEPS:
        u, y = batch(step)
        share = slice(rank * 8 // world, (rank + 1) * 8 // world)
        loss = F.cross_entropy(network(u[share]), y[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step == 12:
            rng[0] = torch.get_rng_state()
        event = compressor.step()
        if event is not None and event.kind == "rolled_back":
            rng[1] = torch.get_rng_state()
            step = event.restored_step or 0
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
        if step == int(options.get("stop", 0)):
            snapshot = training.snapshot()
            saved = {"step": step, "compressor": compressor.state_dict(), "training": snapshot}
            torch.save(saved, out / f"ckpt{rank}.pt")
            if rank == 0:  # as most programs do
                torch.save(saved, out / "ckpt.pt")
            break
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict()["state"],
            "losses": losses,
            "rng": rng,
            "log": said.lines,
            "history": [(event.kind, event.step) for event in compressor.history],
        },
        out / f"rank{rank}.pt",
    )
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    main(folder, dict(argument.split("=", 1) for argument in sys.argv[2:]))
