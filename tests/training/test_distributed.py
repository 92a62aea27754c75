"""Two real processes on gloo, started by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed on gloo"),
]
SCRIPT = Path(__file__).parents[1] / "distributed_script.py"


def run(out: Path, processes: int, *arguments: Any) -> list[dict[str, Any]]:
    torchrun(processes, SCRIPT, out, *arguments)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    return a == b


@pytest.mark.parametrize("options", [[], ["inner=1"], ["views=1", "hook=1"]], ids=str)
def test_ddp_makes_the_same_cuts_on_all_ranks_and_as_one_process_does(tmp_path: Path, options: list[str]) -> None:
    (alone,) = run(tmp_path / "one", 1)
    first, second = run(tmp_path / "two", 2, *options)
    assert [step for kind, step in first["history"] if kind == "cut"] == [4, 8, 12]
    assert first["model"]["blocks.0.ssm.nu_log"].shape[0] <= 4
    for part in ("model", "optimizer", "history"):
        assert same(first[part], second[part]), part
    assert first["history"] == alone["history"]
    # Two halves of a batch are averaged in another order than one whole one.
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-4, atol=1e-4)


def test_weights_of_another_size_can_be_loaded_into_the_wrapped_model(tmp_path: Path) -> None:
    (alone,) = run(tmp_path / "one", 1, "loads=1", "stop=3")
    first, second = run(tmp_path / "two", 2, "loads=1", "stop=3")
    assert first["model"]["blocks.0.ssm.nu_log"].shape[0] == 12
    assert same(first["model"], second["model"])
    torch.testing.assert_close(first["model"], alone["model"], rtol=1e-3, atol=1e-4)


def test_killed_and_resumed_ddp_ends_as_if_unbroken(tmp_path: Path) -> None:
    unbroken = run(tmp_path / "unbroken", 2, "dropout=0.2")
    run(tmp_path / "killed", 2, "dropout=0.2", "stop=9")
    resumed = run(tmp_path / "resumed", 2, "dropout=0.2", f"resume={tmp_path / 'killed' / 'ckpt.pt'}")
    for rank in range(2):
        for part in ("model", "optimizer", "history"):
            assert same(resumed[rank][part], unbroken[rank][part]), part


EVIDENCE = {"states": "layer=mamba", "gradients": "gramians=loss"}


@pytest.mark.parametrize("of", EVIDENCE)
def test_what_each_process_has_observed_is_its_own_and_resumes_exactly(of: str, tmp_path: Path) -> None:
    unbroken = run(tmp_path / "unbroken", 2, EVIDENCE[of])
    run(tmp_path / "killed", 2, EVIDENCE[of], "stop=10")  # between two cuts, the second of which counts what was seen
    own = run(tmp_path / "own", 2, EVIDENCE[of], f"resume={tmp_path / 'killed' / 'ckpt{rank}.pt'}")
    for rank in range(2):
        for part in ("model", "optimizer", "history"):
            assert same(own[rank][part], unbroken[rank][part]), part
        assert own[rank]["log"] == []
    # One state for all, as most hosts save it: the ranks agree, and it is said what is missing.
    shared = run(tmp_path / "shared", 2, EVIDENCE[of], f"resume={tmp_path / 'killed' / 'ckpt.pt'}")
    assert same(shared[0]["model"], shared[1]["model"])
    assert shared[0]["log"] == []
    (line,) = shared[1]["log"]
    assert "those of process 0" in line
    assert "in every process" in line


def test_a_roll_back_is_decided_once_and_restores_every_ranks_random_state(tmp_path: Path) -> None:
    ranks = run(tmp_path, 2, "dropout=0.2", "harm=1")
    undone = [("cut", 12), ("rolled_back", 15), ("stopped", 15), ("fell_short", 15), ("ended", 24)]
    assert ranks[0]["history"] == ranks[1]["history"] == undone
    for rank in ranks:
        assert torch.equal(rank["rng"][0], rank["rng"][1])
        assert rank["model"]["blocks.0.ssm.nu_log"].shape[0] == 16
    assert not torch.equal(ranks[0]["rng"][0], ranks[1]["rng"][0])
    assert same(ranks[0]["model"], ranks[1]["model"])
