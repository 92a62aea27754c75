"""Jobs by submitit, on its local scheduler: other processes, started from files, as on a cluster."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from compressm.cli import main
from compressm.errors import CheckpointError, ConfigError, RunError
from compressm.lab.reproduce import Arm, Experiment, plan_runs, run_grid
from compressm.lab.reproduce.cluster import on_cluster, parse_options

pytest.importorskip("submitit")
OFF = {"compression.enabled": False}
TINY = Experiment(
    "tiny",
    "Digits",
    "digits",
    (
        Arm("small", OFF, same_states_as="shrunk"),
        Arm("shrunk", {"model.d_state": 16, "compression.states": 5, "compression.tolerance": None}),
    ),
    steps=40,
)


@pytest.mark.slow
def test_a_grid_as_jobs_is_the_same_grid(tmp_path: Path) -> None:
    def accuracies(name: str, **options: Any) -> dict[tuple[str, int], float]:
        runs = plan_runs(TINY, [0], results=tmp_path / name / "results", runs=tmp_path / name / "runs")
        return {key: result.test_accuracy for key, result in run_grid(runs, workers=2, **options).items()}

    jobs = on_cluster("local", tmp_path / "jobs", {"timeout_min": 5})
    assert accuracies("jobs", executor=jobs) == accuracies("here")
    assert list((tmp_path / "jobs").glob("*_result.pkl")) or list((tmp_path / "jobs").glob("*.out"))
    stored = json.loads((tmp_path / "jobs/results/tiny/small-seed0.json").read_text())
    assert stored["state_dims"] == [5]


@pytest.mark.slow
def test_a_failed_job_says_why(tmp_path: Path) -> None:
    runs = plan_runs(TINY, [0], ["shrunk"], tmp_path / "results", tmp_path / "runs")
    (tmp_path / "results/tiny").mkdir(parents=True)
    (tmp_path / "results/tiny/shrunk-seed0.json").write_text("{")
    jobs = on_cluster("local", tmp_path / "jobs", {"timeout_min": 5})
    with pytest.raises(CheckpointError, match=r"shrunk-seed0\.json: damaged"):
        run_grid(runs, workers=1, executor=jobs)


@pytest.mark.slow
def test_a_job_that_was_killed_is_named(tmp_path: Path) -> None:
    with on_cluster("local", tmp_path / "jobs", {"timeout_min": 5})(1) as jobs:
        with pytest.raises(RunError, match=r"job \d+ ended without a result .* see .*the same command goes on"):
            jobs.submit(die).result()
        assert jobs.submit(abs, -3).result() == 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_options() -> None:
    assert parse_options("timeout_min=60, slurm_partition=gpu") == {"timeout_min": 60, "slurm_partition": "gpu"}
    assert parse_options(None) == {}
    with pytest.raises(ConfigError, match="key=value"):
        parse_options("timeout_min")


def test_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--cluster local"):
        on_cluster("local", tmp_path, {"no_such_option": 1})(1)
    arguments = [
        "reproduce",
        "stability",
        "--cluster",
        "local",
        "--cluster-options",
        "nonsense",
        "--runs",
        str(tmp_path),
    ]
    assert main(arguments) == 2
    assert "--cluster-options 'nonsense'" in capsys.readouterr().err
