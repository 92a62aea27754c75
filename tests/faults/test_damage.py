"""Files that are not what was saved."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import STEPS, Record, Training, finish, outcome

import compressm
from compressm.errors import CheckpointError
from compressm.lab.runs.checkpoints import Checkpoints
from helpers import newest_checkpoint

REGIONS = 48


def same(a: Any, b: Any) -> bool:
    """Whether two trees are alike to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))
    return type(a) is type(b) and (a == b).all() if hasattr(a, "all") else a == b or (a != a and b != b)


def damaged(content: bytes, region: int, kind: str) -> bytes:
    """The content with one bit of a region turned over, or cut off there, or with the region filled with zeros."""
    draw = random.Random(region)
    begin, end = len(content) * region // REGIONS, max(1, len(content) * (region + 1) // REGIONS)
    at = draw.randrange(begin, max(begin + 1, end))
    if kind == "bit":
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    return content[:at] if kind == "truncated" else content[:begin] + bytes(end - begin) + content[end:]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("kind", ["bit", "truncated", "zeros"])
def test_training_never_reads_a_damaged_checkpoint(
    name: str, kind: str, tmp_path: Path, unbroken: Path, tried: Record
) -> None:
    shutil.copytree(unbroken / "checkpoints", tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    newest, path = checkpoints.read()[0], newest_checkpoint(tmp_path) / name
    whole = path.read_bytes()
    path.write_bytes(b"")
    older, lines = checkpoints.read()
    assert (newest["step"], older["step"], len(lines)) == (STEPS, STEPS - 5, 1)
    for region in range(REGIONS):
        path.write_bytes(damaged(whole, region, kind))
        found, lines = checkpoints.read()
        # White space in the JSON file may change without changing what it says.
        assert same(found, older if lines else newest)
        assert len(lines) == 1 or path.read_bytes() == whole or name == "state.json"
    tried(f"checkpoint damaged: {kind}", REGIONS)


@pytest.mark.parametrize("name", ["model.safetensors", "compressm.json"])
@pytest.mark.parametrize("kind", ["bit", "truncated", "zeros"])
def test_a_damaged_model_is_not_loaded(name: str, kind: str, tmp_path: Path, unbroken: Path, tried: Record) -> None:
    shutil.copytree(unbroken / "model", tmp_path / "model")
    truth = compressm.load(tmp_path / "model").state_dict()
    path = tmp_path / "model" / name
    whole, refused = path.read_bytes(), 0
    for region in range(REGIONS):
        path.write_bytes(damaged(whole, region, kind))
        try:
            found = compressm.load(tmp_path / "model").state_dict()
        except CheckpointError:
            refused += 1
        else:
            assert name == "compressm.json"
            assert same(dict(found), dict(truth))
    assert refused >= REGIONS - 6
    tried(f"model damaged: {kind}", REGIONS, stopped=True)


def test_both_checkpoints_damaged(tmp_path: Path, unbroken: Path, tried: Record) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken / "checkpoints", folder / "checkpoints")
    for path in folder.glob("checkpoints/*/state.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    run = Training(folder)
    assert run.end() == 2
    assert "SHA-256 differs" in run.error()
    tried("all checkpoints damaged", stopped=True)


def test_resumed_from_the_older_one(tmp_path: Path, unbroken: Path, truth: list[bytes], tried: Record) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken / "checkpoints", folder / "checkpoints")
    path = newest_checkpoint(folder) / "state.safetensors"
    path.write_bytes(damaged(path.read_bytes(), 20, "bit"))
    finish(folder)
    assert outcome(folder) == truth
    tried("newest checkpoint damaged, run resumed", lost=[5])


def test_a_result_that_is_half_written(tmp_path: Path, unbroken: Path, truth: list[bytes], tried: Record) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (folder / "result.json").write_text((unbroken / "result.json").read_text()[:1000])
    run = Training(folder)
    assert run.end() == 2
    assert "move the file away, and go on with --resume" in run.error()
    (folder / "result.json").unlink()
    finish(folder)
    assert outcome(folder) == truth
    before, after = (json.loads((path / "result.json").read_text()) for path in (unbroken, folder))
    assert before["test_accuracy"] == after["test_accuracy"]
    tried("result file damaged", stopped=True)
