"""What is done after each step, for a small layer that stands still, asked step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compressm.layers import LRU
from compressm.training.cushion import Cushion
from compressm.training.cutter import Cutter
from compressm.training.goal import Goal, wanted_rule
from compressm.training.history import Cut, Ended, Kept, Unchanged
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


def test_a_cut_is_examined_half_the_distance_later_and_the_end_is_told() -> None:
    loop = Loop(states=4, cushion={"max_drop": 0.1, "evaluate": lambda _: 0.5})
    assert loop.run(1, 80) == [(Cut, 20), (Kept, 30), (Cut, 40), (Kept, 50), (Ended, 80)]
