"""Ways of training at their best learning rates: what chooses the rate, and how long each trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from compressm.lab.reproduce import Arm, Experiment, experiment, plan_runs
from compressm.lab.reproduce.equal_compute import render, tuned
from compressm.lab.reproduce.grid import configuration
from compressm.lab.reproduce.tables import Results

TWO = Experiment(
    "two", "Two", "digits", tuple(Arm(f"{way}-{rate}", {}, way=way) for way in ("big", "small") for rate in (1, 2))
)


def run(rate: float, validation: float, test: float) -> Any:
    phases = [
        {"steps": 10, "flops": 3e9, "step_cpu_seconds": 0.5},
        {"steps": 20, "flops": 1e9, "step_cpu_seconds": 0.1},
    ]
    config = {"optimizer": {"lr": rate}}
    return SimpleNamespace(
        config=config, validation_accuracy=validation, score=test, phases=phases, reduction_seconds=2.0
    )


RUNS = cast(
    "Results",
    {
        ("big-1", 0): run(1, 0.8, 0.1),
        ("big-2", 0): run(2, 0.7, 0.9),
        ("small-1", 0): run(1, 0.5, 0.5),
        ("small-1", 1): run(1, 0.7, 0.5),
        ("small-2", 0): run(2, 0.65, 0.6),
        ("small-2", 1): run(2, 0.65, 0.4),
    },
)


def test_validation_chooses_the_rate_and_test_accuracy_does_not() -> None:
    big, small = tuned(TWO, RUNS)
    assert (big.arm.name, big.rate) == ("big-1", 1)
    assert (small.arm.name, small.rate) == ("small-2", 2)  # means of 65 and 60 %
    assert small.validation == pytest.approx(65)


def test_operations_and_seconds_are_of_all_steps_and_cuts() -> None:
    big = tuned(TWO, RUNS)[0]
    assert big.operations == 10 * 3e9 + 20 * 1e9
    assert big.seconds == [10 * 0.5 + 20 * 0.1 + 2.0]
    assert render(TWO, RUNS)[4] == "| big | 1 | 10.00 | 50 G | 9 | 1 |"


def test_experiments_that_compare_no_rates_have_no_such_table() -> None:
    assert render(Experiment("one", "One", "digits", (Arm("a", {}),)), RUNS) == []


def test_a_longer_arm_makes_more_steps_with_its_whole_schedule_in_them() -> None:
    one = experiment("equal-compute")
    steps = {run.arm.name: configuration(run, data="unused").run for run in plan_runs(one, [0])}
    assert steps["small12-rate1"].steps == 6000
    assert (steps["small12-longer-rate1"].steps, steps["small12-longer-rate1"].eval_every) == (10_200, 510)
    assert steps["full-shorter-rate1"].steps == 3300
    quick = next(run for run in plan_runs(one, [0]) if run.arm.name == "small12-longer-rate1")
    assert configuration(quick, steps=100).run.steps == 170
