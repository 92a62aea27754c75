"""What is done after each step: cuts, examinations and roll-backs of a small layer, asked step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from compressm.cutting.metrics import MetricWarning
from compressm.layers import LRU
from compressm.training.cushion import Cushion
from compressm.training.cutter import Cutter
from compressm.training.goal import Goal, wanted_rule
from compressm.training.history import Cut, Kept, Postponed, RolledBack, Unchanged
from compressm.training.policy import Policy
from compressm.training.schedule import Schedule
from compressm.training.snapshot import Training


class Loop:
    """The parts of a compressor around one layer that stands still."""

    def __init__(self, *metrics: float, total: int = 80, cuts: int = 2, check_after: int = 5, **given: Any) -> None:
        torch.manual_seed(0)
        self.layer = LRU(2, 16, r_min=0.9)
        optimizer = torch.optim.SGD(self.layer.parameters(), 0.0)
        kept = {name: given.pop(name) for name in ("on_setback", "rewind") if name in given}
        rule = wanted_rule(**given)
        values: Iterator[float] = iter(metrics)
        examined = {"max_drop": 0.1, "evaluate": lambda _: next(values)} if metrics else {}
        self.schedule = Schedule(total, cuts, 0.5, check_after=check_after)
        self.cutter = Cutter(self.layer, optimizer, (), rule)
        self.cushion = Cushion(Training(self.layer, optimizer), self.cutter.statistics, **examined, **kept)
        self.policy = Policy(self.schedule, Goal(rule, 16), self.cushion, self.cutter)

    def run(self, start: int, stop: int) -> list[tuple[type, int]]:
        """Kinds of events and their steps."""
        events = [self.policy.act(step) for step in range(start, stop + 1)]
        return [(type(event), event.step) for event in events if event is not None]


def test_without_a_metric_cuts_come_at_their_steps() -> None:
    loop = Loop(states=4)
    assert loop.run(1, 80) == [(Cut, 20), (Cut, 40)]
    assert loop.layer.d_state == 4
    assert loop.cushion.observed is None


def test_a_cut_is_examined_so_many_steps_later_and_nothing_else_happens_before() -> None:
    loop = Loop(0.9, 0.85, 0.84, 0.83, states=4)
    event = next(event for step in range(1, 21) if (event := loop.policy.act(step)))
    assert isinstance(event, Cut)
    assert event.reference == 0.9
    assert event.seconds > 0
    assert [layer["states_after"] for layer in event.layers] == [8] == [loop.layer.d_state]
    assert loop.cushion.observed is not None
    assert loop.cushion.observed["step"] == 20
    assert loop.schedule.cuts_done == 1
    assert loop.run(21, 80) == [(Kept, 25), (Cut, 40), (Kept, 45)]
    assert loop.layer.d_state == 4


def test_after_a_setback_a_promise_is_tried_again_at_once_and_half_as_far() -> None:
    loop = Loop(0.9, 0.1, 0.9, 0.9, 0.9, 0.9, tolerance=0.2)
    before = 16
    assert loop.run(1, 20) == [(Cut, 20)]
    first = loop.layer.d_state
    assert loop.run(21, 25) == [(RolledBack, 25)]
    assert loop.layer.d_state == before
    assert loop.schedule.cuts_done == 0
    assert loop.run(26, 31) == [(Cut, 26), (Kept, 31)]
    assert first < loop.layer.d_state < before


def test_after_a_setback_a_size_waits_for_the_next_scheduled_cut() -> None:
    loop = Loop(0.9, 0.1, 0.9, 0.9, states=4)
    assert loop.run(1, 39) == [(Cut, 20), (RolledBack, 25)]
    assert (loop.schedule.cuts_done, loop.cushion.mildness) == (1, 0.5)
    assert loop.run(40, 80) == [(Cut, 40), (Kept, 45)]
    assert loop.layer.d_state == 8  # half of the way from 16 to 4


@pytest.mark.parametrize(("rewind", "stops"), [(True, False), (False, True)])
def test_where_time_goes_on_it_may_be_too_late_for_another_cut(rewind: bool, stops: bool) -> None:
    # One cut at step 40 of 80, examined 30 steps later. From step 41 another could be examined, from step 71 not.
    loop = Loop(0.9, 0.1, 0.9, cuts=1, check_after=30, tolerance=0.2, rewind=rewind)
    assert loop.run(1, 70) == [(Cut, 40), (RolledBack, 70)]
    assert loop.schedule.stopped == stops
    # The step after that which was restored is the last that leaves time for an examination.
    for check_after, late in ((39, False), (40, True)):
        loop = Loop(0.9, 0.1, cuts=1, check_after=check_after, tolerance=0.2)
        loop.run(1, 40 + check_after)
        assert loop.schedule.stopped == late


def test_a_setback_may_be_the_end() -> None:
    loop = Loop(0.9, 0.1, states=4, on_setback="stop")
    assert loop.run(1, 80) == [(Cut, 20), (RolledBack, 25)]
    assert loop.schedule.over
    # A cut of half the mildness would take less than the least that is worth a cut.
    loop = Loop(0.9, 0.1, tolerance=0.7, min_reduction=0.6)
    assert loop.run(1, 80) == [(Cut, 20), (RolledBack, 25)]
    assert loop.schedule.over


def test_a_metric_that_is_not_finite_puts_a_cut_off_or_off_for_good() -> None:
    loop = Loop(math.nan, 0.9, 0.9, 0.9, 0.9, states=4)
    with pytest.warns(MetricWarning, match=r"nan at step 20, before a cut, .* held against that: it is tried again at"):
        assert loop.run(1, 20) == [(Postponed, 20)]
    assert (loop.schedule.postponed, loop.schedule.cuts_done, loop.layer.d_state) == (22, 0, 16)
    assert loop.run(21, 80) == [(Cut, 22), (Kept, 27), (Cut, 40), (Kept, 45)]
    loop = Loop(math.inf, cuts=1, check_after=38, states=4)
    with pytest.warns(MetricWarning, match=r"inf at step 40, .* held against that: no more cuts are made"):
        assert loop.run(1, 80) == [(Postponed, 40)]
    assert loop.schedule.over


def test_a_cut_that_changes_nothing_is_done_and_not_examined() -> None:
    loop = Loop(0.9, 0.95, tolerance=0.0)
    assert loop.run(1, 80) == [(Unchanged, 20), (Unchanged, 40)]
    assert loop.cushion.observed is None
    assert loop.cushion.best == 0.95  # later cuts are held against it all the same
    assert loop.schedule.over
