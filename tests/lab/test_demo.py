"""What the demo's table says, from runs that are stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compressm.lab.demo import _summary
from compressm.lab.reproduce.experiments import experiment
from compressm.lab.reproduce.grid import read_results

ROOT = Path(__file__).parents[2]


def test_times_are_those_of_computing_whatever_else_the_machine_does() -> None:
    run = read_results(experiment("mamba"), ROOT / "results")["shrunk", 0]
    phases = [{"steps": 100, "step_cpu_seconds": 0.02, "step_seconds": 0.02}]
    quiet = replace(run, phases=phases, reduction_seconds=1.0, train_seconds=3.0)
    busy = [{"steps": 100, "step_cpu_seconds": 0.02, "step_seconds": 0.1}]
    loaded = replace(run, phases=busy, reduction_seconds=5.0, train_seconds=15.0)
    for runs in ([quiet], [loaded], [quiet, loaded]):
        row = _summary(runs)
        assert row["computing_seconds"] == pytest.approx(3.0)
        assert row["cutting_seconds"] == pytest.approx(1.0)
    row = _summary([replace(quiet, test_accuracy=0.9), replace(quiet, test_accuracy=0.8)])
    assert row["accuracy_mean"] == pytest.approx(0.85)
    assert row["accuracy_std"] == pytest.approx(0.1 / 2**0.5)
