"""The clock of steps and what it says was saved."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from compressm import Compressor
from compressm.layers import SequenceClassifier
from compressm.training.clock import Phase, StepClock, savings


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
