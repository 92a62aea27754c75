"""Layers whose parameters several processes hold together: refused before anything begins, with the remedy."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import compressm
from compressm.errors import UnsupportedModelError
from compressm.layers import LRU, Mamba

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed on gloo"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # FSDP of the first kind says that it is old
]
DATA = [torch.randn(2, 6, 4)]


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one process: its shards are whole, and still no plain parameters."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def replicated(model: nn.Module) -> nn.Module:
    """As tensor parallelism does with what it does not split."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(distribute_tensor(value.detach(), mesh, [Replicate()])))
    return model


def fsdp1(model: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


HOW: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "fully_shard": (fully_sharded, r"^0\.\w+ is a DTensor.*compress_sharded.*DistributedDataParallel"),
    "tensor parallelism": (replicated, r"^0\.\w+ is a DTensor.*compress_sharded.*DistributedDataParallel"),
    "FSDP1": (fsdp1, r"^the model is a FullyShardedDataParallel.*fully_shard.*DistributedDataParallel"),
    "FSDP1, original parameters": (
        lambda model: fsdp1(model, use_orig_params=True),
        r"^the model is a FullyShardedDataParallel.*fully_shard.*DistributedDataParallel",
    ),
    "a part of FSDP1": (
        lambda model: fsdp1(model, use_orig_params=True).module,
        r"^0\.\w+ is held by FullyShardedDataParallel.*fully_shard.*DistributedDataParallel",
    ),
}


@pytest.mark.parametrize("layer", [LRU, Mamba])
@pytest.mark.parametrize("how", HOW)
def test_a_sharded_layer_is_refused_by_every_way_to_begin(how: str, layer: Any) -> None:
    wrap, message = HOW[how]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process that shards nothing
        model = wrap(nn.Sequential(layer(4, 8)))
    optimizer = torch.optim.AdamW(model.parameters())
    calls: list[Callable[[], Any]] = [
        lambda: compressm.Compressor(model, optimizer, 40, states=3),
        lambda: compressm.compress(model, states=3, data=DATA),
        lambda: compressm.analyze(model, data=DATA),
    ]
    for call in calls:
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", [LRU, Mamba])
def test_sharding_after_the_compressor_was_built_is_refused_at_the_first_step(layer: Any) -> None:
    model = nn.Sequential(layer(4, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    compressor = compressm.Compressor(model, optimizer, 40, states=3)
    fully_sharded(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())  # as Accelerate does
    model(DATA[0]).square().mean().backward()
    optimizer.step()
    for _ in range(2):  # and at the same step again
        with pytest.raises(UnsupportedModelError, match=r"^0\.\w+ is a DTensor.*compress_sharded"):
            compressor.step()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_a_sharded_part_without_states_is_no_obstacle() -> None:
    model = nn.Sequential(LRU(4, 8), nn.Linear(4, 4))
    fully_sharded(model[1])
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    compressor = compressm.Compressor(model, optimizer, 8, states=3, window=0.5, cuts=1)
    for _ in range(8):
        optimizer.zero_grad()
        model(DATA[0]).square().mean().backward()
        optimizer.step()
        compressor.step()
    assert compressor.state_dims == {"0": 3}
