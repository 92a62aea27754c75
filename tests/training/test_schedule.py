"""When cuts come: a schedule without a model, asked step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from compressm import DiagonalSystem, balance
from compressm.errors import InvalidRankRuleError
from compressm.theory.balancing import Balancing
from compressm.training.schedule import Schedule, cut_steps


def layer(gain: float = 1.0, n: int = 6) -> Balancing:
    """A balanced system; ``gain`` scales the output of its first state, and with it the largest value."""
    lam = torch.linspace(0.2, 0.9, n, dtype=torch.float64) * torch.exp(1j * torch.linspace(0.1, 1.0, n)).to(
        torch.complex128
    )
    B = torch.ones(n, 2, dtype=torch.complex128)
    C = torch.ones(3, n, dtype=torch.complex128)
    C[:, 0] *= gain
    return balance(DiagonalSystem(lam, B, C))


class Eyes:
    """Gives the spectrum of the moment, and counts how often it is asked for."""

    def __init__(self) -> None:
        self.now: Mapping[str, Balancing] = {"a": layer()}
        self.asked = 0

    def __call__(self) -> Mapping[str, Balancing]:
        self.asked += 1
        return self.now


def cuts_of(schedule: Schedule, look: Eyes, steps: range) -> list[int]:
    """The steps after which cuts are due, each of them made at once."""
    made = list[int]()
    for step in steps:
        if schedule.due(step, look):
            schedule.made()
            made.append(step)
    return made


@pytest.mark.parametrize("total", [7, 30, 100, 20_000])
@pytest.mark.parametrize("cuts", [1, 3, 4])
@pytest.mark.parametrize("window", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("start", [0, 2])
def test_cuts_are_equidistant_and_fill_the_window(total: int, cuts: int, window: float, start: int) -> None:
    steps = cut_steps(total, cuts, window, start)
    (distance,) = {after - before for before, after in zip((start, *steps), steps, strict=False)}
    assert len(steps) == cuts
    assert abs(distance - window * total / cuts) < 1 or distance == 1
    if start + window * total <= total and window * total >= cuts:
        assert steps[-1] <= total


def test_cuts_are_due_at_their_steps_and_nothing_is_looked_at() -> None:
    look = Eyes()
    assert cuts_of(Schedule(80, 4, 0.5), look, range(1, 81)) == [10, 20, 30, 40]
    late = Schedule(80, 2, 0.5)
    assert [late.due(step, look) for step in (19, 20, 21, 79)] == [False, True, True, True]  # due until it is made
    assert look.asked == 0


def test_a_spectrum_that_holds_still_is_cut_at_the_second_probe() -> None:
    look, schedule = Eyes(), Schedule(800, 1, 0.5, when="settled")  # probes at every 40th step
    assert cuts_of(schedule, look, range(1, 400)) == [80]
    assert look.asked == 2
    look, schedule = Eyes(), Schedule(800, 1, 0.25, start=500, when="settled")  # at every 20th from step 500 on
    assert cuts_of(schedule, look, range(1, 801)) == [520]


def test_a_spectrum_that_moves_is_cut_at_its_step_at_the_latest() -> None:
    look, schedule, made = Eyes(), Schedule(800, 1, 0.5, when="settled"), []
    for step in range(1, 401):
        look.now = {"a": layer(1 + step / 50)}  # between two probes the largest value nearly doubles
        made += [step] if schedule.due(step, look) else []
    assert made == [400]
    assert look.asked == 9


@pytest.mark.parametrize(("moved", "settled"), [(0.01, True), (0.05, False)])
def test_two_percent_of_the_energy_may_move(moved: float, settled: bool) -> None:
    before = layer()
    gain, target = 1.0, moved * float(before.hsv.sum())
    while float((layer(gain).hsv.sort().values - before.hsv.sort().values).abs().sum()) < target:
        gain += 1e-3
    look, schedule = Eyes(), Schedule(800, 1, 0.5, when="settled")
    assert not schedule.due(40, look)
    look.now = {"a": layer(gain)}
    assert schedule.due(80, look) == settled


def test_all_layers_must_hold_still_and_have_been_seen() -> None:
    for second in ({"a": layer(), "b": layer(9.0)}, {"a": layer(), "b": layer(n=5)}, {"a": layer(), "c": layer()}):
        look, schedule = Eyes(), Schedule(800, 1, 0.5, when="settled")
        look.now = {"a": layer(), "b": layer()}
        assert not schedule.due(40, look)
        look.now = second
        assert not schedule.due(80, look)
        assert schedule.due(120, look)  # then it is the same as at the probe before


def test_a_cut_that_was_undone_is_due_at_once_and_a_stop_is_final() -> None:
    look, schedule = Eyes(), Schedule(80, 2, 0.5)
    assert cuts_of(schedule, look, range(1, 21)) == [20]
    schedule.once_more()
    assert schedule.cuts_left == 2
    assert schedule.due(21, look)
    schedule.once_more()
    assert schedule.cuts_left == 2  # there is no cut before the first
    schedule.stop()
    assert schedule.over
    assert not schedule.due(21, look)


def test_a_postponed_cut_comes_a_tenth_of_the_distance_later_while_it_can_be_examined() -> None:
    look, schedule = Eyes(), Schedule(800, 1, 0.25, check_after=100)
    assert schedule.due(200, look)
    schedule.postpone(200)
    assert [schedule.due(step, look) for step in (201, 219, 220)] == [False, False, True]
    schedule.postpone(680)
    assert not schedule.over  # 700 + 100 is the last step
    assert not schedule.due(701, look)
    assert schedule.over
    schedule = Schedule(800, 1, 0.25, check_after=100)
    schedule.postpone(681)
    assert schedule.over


def test_examination_by_default_after_half_the_distance() -> None:
    assert Schedule(80, 4, 0.5).check_after == 5
    assert Schedule(4, 4, 1.0).check_after == 1
    schedule = Schedule(80, 4, 0.5, check_after=7)
    assert (schedule.leaves_time(73), schedule.leaves_time(74)) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 41, "window": 0.5}, "the last of 4 cuts would come at step 81, after total_steps=80"),
        ({"window": 1.0, "examined": True}, "the last cut, at step 80, would be examined 10 steps later"),
        ({"window": 0.5, "check_after": 41, "examined": True}, "at step 40, would be examined 41 steps later"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRankRuleError, match=message):
        Schedule(80, **arguments)
    Schedule(80, window=0.5, check_after=40, examined=True)
    Schedule(80, window=1.0)


@pytest.mark.parametrize(("check_after", "looks"), [(1, [7, 8, 9]), (3, [7, 8, 9]), (4, [4, 6, 8]), (30, [4, 6, 8])])
def test_the_metric_is_looked_at_thrice_before_a_cut_as_often_as_after_it(check_after: int, looks: list[int]) -> None:
    schedule = Schedule(200, 1, 0.05, check_after=check_after, examined=True)  # a cut at step 10
    assert [step for step in range(1, 11) if schedule.looks(step)] == looks
    schedule.made()
    assert not any(schedule.looks(step) for step in range(11, 200))


def test_gradients_are_observed_at_the_very_start_and_in_the_fifty_steps_before_a_cut() -> None:
    schedule = Schedule(1000, 1, 0.5)
    assert [step for step in range(500) if schedule.observes_gradients(step)] == [0, *range(450, 500)]
    schedule.made()
    assert not schedule.observes_gradients(500)
    assert not schedule.observes_gradients(0)


def test_a_cut_that_was_put_off_is_due_at_that_step() -> None:
    look, schedule = Eyes(), Schedule(80, 4, 0.5)
    schedule.wait(15)
    assert [schedule.due(step, look) for step in (10, 14, 15, 16)] == [False, False, True, True]


def test_layers_are_observed_at_every_eighth_step_and_more_often_where_cuts_are_close() -> None:
    schedule = Schedule(20_000)
    assert [step for step in range(40) if schedule.observes(step)] == [0, 8, 16, 24, 32]
    assert all(schedule.observes(step, unseen=True) for step in range(40))
    close = Schedule(200, 4, 0.4)  # every 20 steps: probed at every second one
    assert [step for step in range(7) if close.observes(step)] == [0, 2, 4, 6]
    schedule.stop()
    assert not schedule.observes(8, unseen=True)


def test_it_goes_on_from_its_state() -> None:
    look, schedule, again = Eyes(), Schedule(80, 4, 0.5), Schedule(80, 4, 0.5)
    cuts_of(schedule, look, range(1, 15))
    schedule.postpone(20)
    again.load_state_dict(schedule.state_dict())
    assert cuts_of(again, look, range(15, 81)) == cuts_of(schedule, look, range(15, 81)) == [21, 30, 40]
    again.load_state_dict({"cuts_done": 1, "stopped": False})  # as the oldest checkpoints have it
    assert (again.cuts_done, again.stopped, again.postponed) == (1, False, 0)
