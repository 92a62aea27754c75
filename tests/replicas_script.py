"""What each process of tests/training/test_replicas.py runs: every option of DDP, one after the other.

torchrun --nproc-per-node 2 tests/replicas_script.py OUT
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from compressm import Compressor
from compressm.errors import UnsupportedModelError
from compressm.layers import SequenceClassifier

CUTS, AFTER = (3, 6), 50  # steps after the last cut


class Net(nn.Module):
    """A classifier with a part that is never used, or at every second step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SequenceClassifier(1, 2, 4, 16, n_layers=2, norm="layer", r_min=0.9)
        self.idle, self.sometimes = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, u: Tensor, odd: bool = False) -> Tensor:
        y = self.net(u)
        return y + self.sometimes(y) if odd else y


class Counts:
    """The state of a communication hook of one's own: it counts the gradients of each bucket."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.resets = 0

    def reset(self) -> None:
        self.sums.clear()
        self.resets += 1


def counting(state: Any, bucket: Any) -> Any:
    gradients = bucket.buffer()
    state.sums[bucket.index()] = state.sums.get(bucket.index(), torch.zeros_like(gradients)) + gradients
    return default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]


counting.__annotations__.clear()  # DDP compares them with types, and not with their names


def power(**arguments: Any) -> Callable[[DistributedDataParallel], Any]:
    state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.1, **arguments)
    return lambda network: network.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def localised(network: DistributedDataParallel) -> None:
    network.register_comm_hook(PostLocalSGDState(None, None, start_localSGD_iter=2), post_localSGD_hook)


def unknown(network: DistributedDataParallel) -> None:
    network.register_comm_hook({"sums": {}}, lambda state, bucket: default_hooks.allreduce_hook(None, bucket))


UNUSED: dict[str, Any] = {"find_unused_parameters": True}
STATIC: dict[str, Any] = {"static_graph": True}
# By name: arguments of DDP, a communication hook, batches for each step, and whether a part is used now and then.
OPTIONS: dict[str, tuple[dict[str, Any], Callable[[DistributedDataParallel], Any] | None, int, bool]] = {
    "static_graph": (STATIC, None, 1, False),
    "static_graph, views": (STATIC | {"gradient_as_bucket_view": True}, None, 1, False),
    "static_graph, no_sync": (STATIC, None, 3, False),
    "find_unused_parameters": (UNUSED, None, 1, True),
    "find_unused_parameters, views": (UNUSED | {"gradient_as_bucket_view": True}, None, 1, True),
    "find_unused_parameters, no_sync": (UNUSED, None, 3, True),
    "gradient_as_bucket_view, no_sync": (UNUSED | {"gradient_as_bucket_view": True}, None, 3, False),
    "small buckets": (UNUSED | {"bucket_cap_mb": 0.0001}, None, 1, False),
    "no buffers": (UNUSED | {"broadcast_buffers": False}, None, 1, False),
    "hook": (UNUSED, lambda n: n.register_comm_hook(None, default_hooks.allreduce_hook), 1, False),
    "hook, built in": (
        UNUSED,
        lambda n: n._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS),
        1,
        False,
    ),
    "hook, static_graph": (STATIC, lambda n: n.register_comm_hook(None, default_hooks.fp16_compress_hook), 1, False),
    "hook, PowerSGD": (STATIC, power(), 1, False),
    "hook, PowerSGD, no feedback": (STATIC, power(use_error_feedback=False, warm_start=False), 1, False),
    "hook of one's own": (STATIC, lambda n: n.register_comm_hook(Counts(), counting), 1, False),
    "hook, post_localSGD": (STATIC, localised, 1, False),
    "hook of unknown state": (STATIC, unknown, 1, False),
    "mixed_precision": (STATIC | {"mixed_precision": "fp16"}, None, 1, False),
    "own process group": (UNUSED | {"process_group": "new"}, None, 1, False),
    "cuts by the loss": (UNUSED, None, 3, True),
}
COMPRESSION: dict[str, dict[str, Any]] = {"cuts by the loss": {"gramians": "loss"}}  # other options of `Compressor`


def batch(number: int) -> tuple[Tensor, Tensor]:
    u = torch.randn(8, 20, 1, generator=torch.Generator().manual_seed(number))
    return u, (u.sum((1, 2)) > 0).long()


def wrapped(model: nn.Module, arguments: dict[str, Any]) -> DistributedDataParallel:
    given = dict(arguments)
    if "process_group" in given:
        given["process_group"] = dist.new_group()
    if "mixed_precision" in given:
        from torch.nn.parallel.distributed import _MixedPrecision

        network = DistributedDataParallel(model, static_graph=True)
        network.mixed_precision = _MixedPrecision(param_dtype=torch.float16)  # set here, since DDP wants a GPU for it
        return network
    return DistributedDataParallel(model, **given)


def train(
    arguments: dict[str, Any],
    hook: Callable[[DistributedDataParallel], Any] | None,
    batches: int,
    sometimes: bool,
    **compression: Any,
) -> dict[str, Any]:
    """Train with an option, and compare the ranks' weights at the end."""
    model = Net()
    network = wrapped(model, arguments)
    if hook is not None:
        hook(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps = CUTS[-1] + AFTER
    try:
        window = CUTS[-1] / steps
        compressor = Compressor(network, optimizer, steps, states=4, window=window, cuts=len(CUTS), **compression)
    except UnsupportedModelError as error:
        return {"refused": str(error)}
    first = dist.get_rank() * 4
    for step in range(steps):
        optimizer.zero_grad()
        for index in range(batches):
            u, y = (part[first : first + 4] for part in batch(batches * step + index))
            # DDP itself fails if the very first pass with a static graph is not averaged.
            apart = index < batches - 1 and (step or not network.static_graph)
            with network.no_sync() if apart else contextlib.nullcontext():
                F.cross_entropy(network(u, sometimes and step % 2 == 1), y).backward()
        optimizer.step()
        compressor.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    states = [value.flatten() for state in optimizer.state.values() for value in state.values() if value.ndim]
    both = torch.cat([weights, *states])
    all_ranks = [torch.zeros_like(both) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, both)
    known = [state for _, state in network._comm_hooks if isinstance(state, Counts)]
    return {
        "equal": all(torch.equal(all_ranks[0], one) for one in all_ranks),
        "finite": bool(both.isfinite().all()),
        "cuts": [event.step for event in compressor.history if event.kind == "cut"],
        "states": sorted(set(compressor.state_dims.values())),
        "hook": str(network._get_ddp_logging_data().get("comm_hook", "")),
        "resets": [state.resets for state in known],
        "group": network.process_group is not dist.group.WORLD,
        "logits": model(batch(9999)[0]).flatten().tolist(),
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {name: train(*option, **COMPRESSION.get(name, {})) for name, option in OPTIONS.items()}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
