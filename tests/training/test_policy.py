"""What is done after each step, for a small layer that stands still, asked step by step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from compressm.layers import LRU
from compressm.training.cushion import Cushion, CushionWarning
from compressm.training.cutter import Cutter
from compressm.training.goal import Goal, GoalWarning, wanted_rule
from compressm.training.history import Cut, Ended, Event, FellShort, Kept, RolledBack, Stopped, Unchanged, Watched
from compressm.training.policy import Policy
from compressm.training.schedule import Schedule
from compressm.training.snapshot import Training


class Loop:
    """The parts of a compressor around one layer, without a metric unless ``cushion`` gives one."""

    def __init__(self, cushion: Mapping[str, Any] | None = None, **given: Any) -> None:
        torch.manual_seed(0)
        self.layer = LRU(2, 16, r_min=0.9)
        optimizer = torch.optim.SGD(self.layer.parameters(), 0.0)
        rule = wanted_rule(**given)
        self.schedule = Schedule(80, 2, 0.5)
        self.cutter = Cutter(self.layer, optimizer, (), rule)
        self.cushion = Cushion(Training(self.layer, optimizer), self.cutter.observations, **(cushion or {}))
        self.policy = Policy(self.schedule, Goal(rule, 16), self.cushion, self.cutter)

    def run(self, start: int, stop: int) -> list[tuple[type, int]]:
        """Kinds of events and their steps."""
        events = [event for step in range(start, stop + 1) for event in self.policy.act(step)]
        return [(type(event), event.step) for event in events]


def test_without_a_metric_cuts_come_at_their_steps() -> None:
    loop = Loop(states=4)
    assert loop.run(1, 80) == [(Cut, 20), (Cut, 40)]
    assert loop.layer.d_state == 4
    assert loop.cushion.observed is None


def test_a_cut_that_changes_nothing_is_done() -> None:
    loop = Loop(tolerance=0.0)
    assert loop.run(1, 80) == [(Unchanged, 20), (Unchanged, 40)]
    assert loop.schedule.over


REACHES: list[tuple[dict[str, Any], int, str]] = [
    (
        {"states": 1, "max_reduction": 0.3},
        9,
        "max_reduction=0.3 of a layer's states end at 9 states a layer; raise max_",
    ),
    ({"fraction": 0.1, "max_reduction": 0.3}, 9, "fraction=0.1 is out of reach"),
    ({"total_states": 3, "max_reduction": 0.3}, 9, "end at 9 states of all layers; raise max_reduction"),
    ({"states": 15, "min_reduction": 0.1}, 16, "end at 16 states a layer; lower min_reduction"),
]


@pytest.mark.parametrize(("given", "arrives", "said"), REACHES)
def test_a_size_out_of_reach_is_told_before_and_after_the_cuts(given: dict[str, Any], arrives: int, said: str) -> None:
    with pytest.warns(GoalWarning, match=said):
        loop = Loop(**given)
    events = [event for step in range(1, 81) for event in loop.policy.act(step)]
    assert loop.layer.d_state == arrives
    assert [type(event) for event in events if event.step == 40][1:] == [FellShort]
    assert "was asked for, and the cuts end at" in str(events[-1])


def test_a_cut_is_examined_half_the_distance_later_and_the_end_is_told() -> None:
    loop = Loop(states=4, cushion={"max_drop": 0.1, "evaluate": lambda _: 0.5})
    assert loop.run(1, 80) == [(Cut, 20), (Kept, 30), (Cut, 40), (Kept, 50), (Ended, 80)]


def test_the_end_is_told_where_no_cut_was_kept() -> None:
    loop = Loop(states=4, cushion={"max_drop": 0.1, "rewind": False})
    loop.cushion.evaluate = lambda layer: 0.5 if layer.d_state == 16 else 0.1
    with pytest.warns(CushionWarning, match="no more cuts will be tried: the cut that was undone was the last one"):
        events = [event for step in range(1, 81) for event in loop.policy.act(step)]
    kinds = [type(event) for event in events if not isinstance(event, Watched)]
    assert kinds == [Cut, RolledBack, Cut, RolledBack, Stopped, FellShort, Ended]
    assert str(events[-2]).endswith(
        "states=4 was asked for, and the cuts end at 16 states a layer: the cut that was undone was the last one"
    )
    assert str(events[-1]) == "step 80: end, metric 0.5; no cut was kept, so none cost anything"


def test_a_training_that_goes_back_from_its_last_step_is_not_at_its_end() -> None:
    def act(restored: int, rewind: bool) -> list[type]:
        loop = Loop(states=4, cushion={"max_drop": 0.1, "evaluate": lambda _: 0.5, "rewind": rewind})
        undone = RolledBack(80, restored_step=restored)
        loop.policy._watch_or_cut = lambda step: [undone]  # type: ignore[method-assign]
        return [type(event) for event in loop.policy.act(80)]

    assert act(70, rewind=True) == [RolledBack]
    assert act(70, rewind=False) == [RolledBack, Ended]
    assert act(80, rewind=True) == [RolledBack, Ended]  # the uncut twin took the cut model's place


@pytest.mark.parametrize("undone", [False, True])
def test_that_a_size_was_missed_is_told_once_the_last_cut_is_examined(undone: bool) -> None:
    """After a resume between the cut and its examination, too. The reason is that of the sizes that layers end with."""
    given: dict[str, Any] = {"states": 1, "max_reduction": 0.3, "cushion": {"max_drop": 0.1}}

    def built() -> Loop:
        with pytest.warns(GoalWarning, match="out of reach"):
            loop = Loop(**given)
        loop.cushion.evaluate = lambda layer: 0.1 if undone and layer.d_state < 12 else 0.5
        return loop

    loop = built()
    history = [event for step in range(1, 46) for event in loop.policy.act(step)]
    assert [type(event) for event in history] == [Cut, Kept, Cut]
    resumed = built()
    for part in ("cutter", "schedule", "cushion"):
        getattr(resumed, part).load_state_dict(getattr(loop, part).state_dict())
    resumed.policy.resume(16, [Event.from_dict(event.to_dict()) for event in history])
    resumed.layer.load_state_dict(loop.layer.state_dict())
    with pytest.warns(CushionWarning, match="was the last one") if undone else nullcontext():
        last = [one for step in range(46, 81) for one in resumed.policy.act(step) if not isinstance(one, Watched)]
    assert [type(event) for event in last] == [*([RolledBack, Stopped] if undone else [Kept]), FellShort, Ended]
    said = {True: "12 states a layer: the cut that was undone was", False: "9 states a layer: a cut removes at"}
    assert f"states=1 was asked for, and the cuts end at {said[undone]}" in str(last[-2])


def test_a_layer_that_is_small_enough_is_no_reason_for_a_size_that_was_missed() -> None:
    goal = Goal(wanted_rule(states=4), 16)
    assert [goal.smaller_than(states) for states in (3, 4, 5)] == [False, False, True]
    goal = Goal(wanted_rule(total_states=4), 16)
    assert [goal.smaller_than(states) for states in (1, 2)] == [False, True]
