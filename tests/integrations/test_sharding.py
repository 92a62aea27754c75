"""FSDP2 on two real processes on gloo."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from compressm.errors import CheckpointError, UnsupportedModelError
from compressm.layers import SequenceClassifier
from helpers import torchrun

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs gloo")
SCRIPT = Path(__file__).parents[1] / "sharding_script.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "carry"), [("lru", "transform"), ("mamba", "transform"), ("lru", "reset")]
)  # mamba looks at data, on rank 0
def test_fsdp2_trains_through_cuts_as_one_process_does_and_resumes(
    layer: str, carry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYER", layer)
    monkeypatch.setenv("CARRY", carry)
    torchrun(1, SCRIPT, tmp_path / "one")
    torchrun(2, SCRIPT, tmp_path / "two")
    torchrun(2, SCRIPT, tmp_path / "again", tmp_path / "two" / "checkpoint")
    alone, sharded, again = (
        torch.load(tmp_path / name / "rank0.pt", weights_only=True) for name in ("one", "two", "again")
    )
    assert alone["dims"] == sharded["dims"] == again["dims"]
    assert max(sharded["dims"]) <= 5
    # Two halves of a batch are averaged in another order than one whole one.
    torch.testing.assert_close(sharded["losses"], alone["losses"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again["losses"], sharded["losses"][-4:], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # saved by one process, as meant
def test_what_is_no_checkpoint_of_the_model_is_refused(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    from compressm.integrations.sharding import fit_to_checkpoint

    model = SequenceClassifier(1, 2, 4, 16)
    with pytest.raises(CheckpointError, match="no distributed checkpoint"):
        fit_to_checkpoint(model, tmp_path / "nowhere")
    dcp.save({"net": model.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CheckpointError, match="holds nothing under 'model'"):
        fit_to_checkpoint(model, tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:FSDP is switching:UserWarning")  # FSDP1 is old, or alone
@pytest.mark.parametrize("kind", ["FullyShardedDataParallel", "DistributedDataParallel"])
def test_a_wrapper_in_place_of_fully_shard_is_refused_before_anything_is_gathered(kind: str, tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    from compressm.integrations.sharding import compress_sharded

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        if kind == "DistributedDataParallel":
            return DistributedDataParallel(model)
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters())

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = wrap(SequenceClassifier(1, 2, 4, 16))
        with pytest.raises(UnsupportedModelError, match=rf"^the model is a {kind}, .* fully_shard"):
            compress_sharded(
                model, adam(model), build=lambda: SequenceClassifier(1, 2, 4, 16), shard=wrap, build_optimizer=adam,
                states=4,
            )  # fmt: skip
    finally:
        dist.destroy_process_group()
