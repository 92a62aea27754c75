"""Every option of DistributedDataParallel through cuts, in two real processes on gloo."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compressm import Compressor
from compressm.errors import UnsupportedModelError
from compressm.layers import LRU
from helpers import torchrun
from replicas_script import CUTS, OPTIONS, localised, unknown

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed on gloo"
)
REFUSED = {
    "hook, post_localSGD": "communication hook is post_localSGD: weights then differ between processes",
    "hook of unknown state": "has a state of type dict.*give that type a method reset()",
    "mixed_precision": "mixed_precision=...) keeps copies of the parameters in their first shapes",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("replicas") / "results.json"
    torchrun(2, Path(__file__).parents[1] / "replicas_script.py", out)
    return json.loads(out.read_text())


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in REFUSED])
def test_weights_are_equal_on_both_ranks_fifty_steps_after_a_cut(results: dict[str, Any], name: str) -> None:
    one = results[name]
    assert one["cuts"] == list(CUTS)
    assert one["states"] == [4]
    assert one["finite"]
    assert one["equal"]
    # What the option is for is still in force.
    assert one["hook"].endswith({"hook, built in": "FP16_COMPRESS"}.get(name, ""))
    assert one["resets"] == ([len(CUTS)] if name == "hook of one's own" else [])
    assert one["group"] is (name == "own process group")


@needs_gloo
@pytest.mark.slow
def test_options_that_only_save_time_or_memory_change_no_outputs(results: dict[str, Any]) -> None:
    plain = results["no buffers"]["logits"]
    for name in ("static_graph", "static_graph, views", "small buckets", "hook", "own process group"):
        assert results[name]["logits"] == pytest.approx(plain, rel=1e-5), name
    # The first batch of some steps is averaged alone, which rounds differently.
    accumulated = [results[f"{name}, no_sync"]["logits"] for name in ("static_graph", "gradient_as_bucket_view")]
    assert accumulated[0] == pytest.approx(accumulated[1], rel=1e-2, abs=1e-2)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", list(REFUSED))
def test_options_that_keep_first_shapes_are_refused_on_all_ranks(results: dict[str, Any], name: str) -> None:
    assert REFUSED[name].partition(".*")[0] in results[name]["refused"]


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of one process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(model: nn.Module, hook: Callable[[Any], Any] | None = None, **arguments: Any) -> DistributedDataParallel:
    network = DistributedDataParallel(model, **arguments)
    if hook is not None:
        hook(network)
    return network


@needs_gloo
@pytest.mark.parametrize("static", [False, True])
def test_a_group_of_a_single_process_is_cut_too(alone: None, static: bool) -> None:
    torch.manual_seed(0)
    models, weights = [LRU(2, 16), LRU(2, 16)], []
    models[1].load_state_dict(models[0].state_dict())
    for model, network in zip(models, (models[0], wrapped(models[1], static_graph=static)), strict=True):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        compressor = Compressor(network, optimizer, 12, states=4, window=0.5, cuts=2)
        for _ in range(12):
            optimizer.zero_grad()
            network(torch.randn(2, 8, 2)).square().mean().backward()
            optimizer.step()
            compressor.step()
        assert list(compressor.state_dims.values()) == [4]
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@needs_gloo
def test_replicate_which_wraps_no_module_of_the_model_is_rebuilt_too(alone: None) -> None:
    """It gives a list of the parameters to DDP, and the model keeps its hooks. The gradients are those without it."""
    from torch.distributed._composable.replicate import replicate

    torch.manual_seed(0)
    models, weights = [LRU(2, 16), LRU(2, 16)], []
    models[1].load_state_dict(models[0].state_dict())
    replicate(models[1])
    for model in models:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        compressor = Compressor(model, optimizer, 12, states=4, window=0.5, cuts=2)
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(2, 8, 2)).square().mean().backward()
            optimizer.step()
            compressor.step()
        assert list(compressor.state_dims.values()) == [4]
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@needs_gloo
@pytest.mark.parametrize(
    ("hook", "message"),
    [(localised, "post_localSGD: weights then differ"), (unknown, r"of type dict, .* give that type a method reset")],
)
def test_hooks_that_keep_buckets_are_refused_at_once(alone: None, hook: Any, message: str) -> None:
    model = LRU(2, 16)
    network = wrapped(model, hook)
    with pytest.raises(UnsupportedModelError, match=message):
        Compressor(network, torch.optim.SGD(model.parameters(), lr=0.1), 12, states=4, window=0.5)
