"""The clock of steps and what it says was saved."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from compressm import Compressor
from compressm.layers import SequenceClassifier
from compressm.training.clock import Phase, StepClock, savings
from compressm.training.step_cost import StepCost


def test_the_sample_is_even_and_bounded() -> None:
    phase = Phase({"a": 4})
    for step in range(1, 5001):
        phase.steps = step
        phase.add(float(step), 0.0)
    gaps = {second - first for first, second in zip(phase.wall, phase.wall[1:], strict=False)}
    assert 128 <= len(phase.wall) <= 256
    assert len(gaps) == 1
    assert phase.wall[0] == 32
    assert phase.wall[-1] > 5000 - 64
    assert phase.step_seconds == pytest.approx(2500, rel=0.05)


def test_a_step_of_the_first_size_takes_as_long_as_before() -> None:
    """After cuts that were all undone, a slower machine is not told as a slower model."""
    phases = [Phase({"a": size}, steps=10, wall=[seconds]) for size, seconds in ((16, 1.0), (4, 0.5), (16, 1.4))]
    saved = savings(phases, 0.0)
    assert saved is not None
    assert saved.step_speedup == 1
    assert (saved.seconds, saved.seconds_if_big) == (pytest.approx(29), 30)
    assert "a step takes as long as before" in str(saved)


def test_savings_are_against_the_first_phase() -> None:
    sizes = (8, 10, 40), (4, 10, 20), (2, 80, 10)
    big, middle, small = (Phase({"a": n}, steps, [ms / 1000] * 3, [ms / 2000] * 3) for n, steps, ms in sizes)
    saved = savings([big, middle, small], cut_seconds=0.2)
    assert saved is not None
    assert saved.steps == 100
    assert saved.seconds == pytest.approx(0.4 + 0.2 + 0.8 + 0.2)
    assert saved.seconds_if_big == pytest.approx(4.0)
    assert saved.speedup == pytest.approx(2.5)
    assert saved.step_speedup == pytest.approx(4.0)
    by_cpu = savings([big, middle, small], 0.2, cpu=True)
    assert by_cpu is not None
    assert by_cpu.seconds_if_big == pytest.approx(2.0)
    assert "2.5 times" in str(saved)
    undone = savings([big, middle, small], 0.2, net_steps=80)  # an uncut training would not have made the others
    assert undone is not None
    assert (undone.steps, undone.seconds) == (saved.steps, saved.seconds)
    assert undone.seconds_if_big == pytest.approx(3.2)


def test_no_cut_saves_nothing_that_can_be_told() -> None:
    assert savings([Phase({"a": 8}, 5, [1.0], [1.0])], 0.0) is None
    assert savings([Phase({"a": 8}, 1), Phase({"a": 4}, 5, [1.0], [1.0])], 0.0) is None


def test_time_between_end_and_begin_is_nobodys() -> None:
    clock = StepClock({"a": 1})
    for _ in range(3):
        clock.begin()
        clock.end()
        time.sleep(0.02)
    assert clock.phases[0].steps == 3
    assert min(clock.phases[0].wall) < 0.02  # the others may have waited for other programs


def test_compressor_counts_steps_by_size_and_remembers_them() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, d_model=4, d_state=16, n_layers=1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    compressor = Compressor(model, optimizer, 20, states=4, cuts=2, window=0.5)

    def steps(count: int) -> None:
        for _ in range(count):
            model(torch.randn(2, 10, 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            compressor.step()

    steps(12)
    state = json.loads(json.dumps({"phases": compressor.state_dict()["phases"]}))
    steps(8)
    (name,) = compressor.state_dims
    assert [(p.state_dims[name], p.steps) for p in compressor.clock.phases] == [(16, 5), (8, 5), (4, 10)]
    saved = compressor.savings()
    assert saved is not None
    assert saved.steps == 20
    assert math.isfinite(saved.speedup)
    compressor.clock.load_state_dict(state["phases"])
    assert [p.steps for p in compressor.clock.phases] == [5, 5, 2]


def test_operations_are_told_where_all_phases_were_counted() -> None:
    def phases(*flops: int | None) -> list[Phase]:
        return [Phase({"a": n}, 10, [1.0], [1.0], count) for n, count in zip((8, 4, 2), flops, strict=True)]

    counted = savings(phases(100, 50, 10), 0.0, net_steps=25)
    assert counted is not None
    assert (counted.flops, counted.flops_if_big) == (10 * 160, 25 * 100)
    assert str(counted) == (
        "30 steps and their cuts took 30 s; without cuts an estimated 25 s (0.8 times); a step takes as long as "
        "before, 36% of the operations were spared"
    )
    for partly in (phases(100, None, 10), phases(None, 50, 10), phases(None, None, None), phases(100, 50, None)):
        found = savings(partly, 0.0)
        assert found is not None
        assert found.flops is found.flops_if_big is None
        assert str(found).endswith("a step takes as long as before")
    for half in (replace(counted, flops=None), replace(counted, flops_if_big=None)):
        assert "spared" not in str(half)


def test_the_time_of_observing_is_no_saving() -> None:
    """A training without cuts observes nothing."""
    big = Phase({"a": 8}, 30, [1.0] * 5, [0.5] * 5, observed=20, observed_wall=[2.0] * 20, observed_cpu=[1.5] * 20)
    small = Phase({"a": 4}, 70, [0.8] * 70, [0.4] * 70)
    saved = savings([big, small], 1.0)
    assert saved is not None
    assert (saved.seconds, saved.seconds_if_big) == (pytest.approx(10 * 1 + 20 * 2 + 70 * 0.8 + 1), 100)
    assert (saved.step_speedup, saved.at_most) == (1.25, False)
    assert "observed" not in str(saved)
    by_cpu = savings([big, small], 1.0, cpu=True)
    assert by_cpu is not None
    assert (by_cpu.seconds, by_cpu.seconds_if_big) == (pytest.approx(10 * 0.5 + 20 * 1.5 + 70 * 0.4 + 1), 50)
    nothing_else = savings([replace(big, steps=20, wall=[], cpu=[]), small], 1.0)
    assert nothing_else is not None
    assert (nothing_else.seconds_if_big, nothing_else.at_most) == (90 * 2, True)
    assert str(nothing_else).endswith("so the time without cuts and what was saved are at most this")
    assert "at most this." in nothing_else._repr_html_()


@pytest.mark.parametrize(("gramians", "observed"), [("white", 0), ("loss", 51)])
def test_the_compressor_says_which_steps_it_observed(gramians: Any, observed: int) -> None:
    model = SequenceClassifier(1, 3, d_model=4, d_state=16)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    compressor = Compressor(model, optimizer, 1000, states=4, cuts=1, window=0.07, gramians=gramians)
    for _ in range(80):
        model(torch.randn(2, 4, 1)).square().mean().backward()
        optimizer.step()
        compressor.step()
    first, second = compressor.clock.phases
    assert (first.steps, first.observed) == (70, observed)  # the first step, and the last 50 before the cut
    assert (len(first.wall), len(first.observed_wall)) == (
        70 - max(observed, 1),
        max(0, observed - 1),
    )  # from the second
    assert (second.steps, second.observed) == (10, 0)


def test_a_phase_too_short_to_be_timed_saves_nothing() -> None:
    first, short, last = Phase({"a": 8}, 10, [2.0], [3.0]), Phase({"a": 6}, 5), Phase({"a": 4}, 20, [1.0], [0.5])
    saved = savings([first, short, last], 4.0)
    assert saved is not None
    assert (saved.seconds, saved.seconds_if_big, saved.cut_seconds) == (20 + 10 + 20 + 4, 70, 4)
    assert not saved.cpu
    by_cpu = savings([first, short, last], 4.0, cpu=True)
    assert by_cpu is not None
    assert (by_cpu.seconds, by_cpu.step_speedup, by_cpu.cpu) == (30 + 15 + 10 + 4, 6, True)


def test_a_clock_is_restored_with_its_phases_and_without_the_step_that_ran() -> None:
    clock = StepClock({"a": 8})
    clock.end()  # nothing was begun: a step is counted, and no time
    assert (clock.phases[0].steps, clock.phases[0].wall, clock.phases[0].cpu) == (1, [], [])
    clock.begin()
    clock.end()
    clock.measured(StepCost(7, 9))
    clock.resize({"a": 8})
    assert len(clock.phases) == 1
    clock.resize({"a": 4})
    stored = clock.state_dict()
    assert [phase["state_dims"] for phase in stored] == [{"a": 8}, {"a": 4}]
    assert (stored[0]["flops"], stored[0]["kept_bytes"], stored[1]["flops"]) == (7, 9, None)
    clock.begin()
    clock.load_state_dict(stored)
    clock.end()
    assert (clock.phases[1].steps, clock.phases[1].wall) == (1, [])
    assert stored[1]["steps"] == 0
    row = clock.phases[0].to_dict()
    assert row == {
        "state_dims": {"a": 8}, "steps": 2, "step_seconds": clock.phases[0].wall[0],
        "step_cpu_seconds": clock.phases[0].cpu[0], "flops": 7, "kept_bytes": 9,
        "observed": 0, "observed_step_seconds": None, "observed_step_cpu_seconds": None,
    }  # fmt: skip
    assert clock.phases[1].to_dict()["step_seconds"] is None
