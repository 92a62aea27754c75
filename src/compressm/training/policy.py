"""Decides what is done after each training step, by the schedule, the goal and the cushion."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from compressm.cutting import Report
from compressm.cutting.metrics import warn_not_finite
from compressm.training.cushion import Cushion
from compressm.training.cutter import Cutter
from compressm.training.goal import Goal
from compressm.training.history import Cut, Event, Postponed, RolledBack, Unchanged
from compressm.training.schedule import Schedule


class Policy:
    """Cuts, examines and rolls back when this is due.

    Args:
        schedule: decides when cuts come.
        goal: decides how far a cut goes.
        cushion: examines cuts and rolls back those that did harm.
        cutter: makes the cuts.
    """

    def __init__(self, schedule: Schedule, goal: Goal, cushion: Cushion, cutter: Cutter) -> None:
        self._schedule, self._goal, self._cushion, self._cutter = schedule, goal, cushion, cutter

    def started_with(self, states: int) -> None:
        """Restore the number of states of all layers together before the first cut."""
        self._goal = replace(self._goal, initial_states=states)

    def act(self, step: int) -> Event | None:
        """Cut or examine if it is due.

        Args:
            step: training steps done.

        Returns:
            what was done; None if nothing was due.
        """
        if self._cushion.observed is not None:
            due = step >= self._cushion.examine_at(self._schedule.check_after)
            return self._examine(step) if due else None
        return self._cut(step) if self._schedule.due(step, self._cutter.spectra) else None

    def _cut(self, step: int) -> Event:
        """Measure, plan, take a snapshot, and cut."""
        reference = None
        if self._cushion.examines:
            metric = self._cushion.measure()
            if not math.isfinite(metric):
                return self._postpone(step, metric)
            reference = self._cushion.reference(metric)
        dims, cuts_left = self._cutter.state_dims.values(), self._schedule.cuts_left
        plan = self._cutter.plan(self._goal.rule_now(dims, cuts_left, self._cushion.mildness))
        before = None
        if plan.changes and reference is not None:
            before = self._cushion.snapshot(step, reference)
        report = self._cutter.write(plan) if plan.changes else plan.report
        # The cut counts as made only now. After an error above it is due again at the next step.
        self._schedule.made()
        self._cushion.watch(before, reference)
        if not plan.changes:
            return Unchanged(step, report.seconds, _layers(report), reference)
        self._cutter.tell(plan)
        return Cut(step, report.seconds, _layers(report), reference)

    def _postpone(self, step: int, metric: float) -> Postponed:
        """Postpone the cut, since a metric that is not finite cannot serve as its reference."""
        self._schedule.postpone(step)
        again = f"it is tried again at step {self._schedule.postponed}"
        again = "no more cuts are made" if self._schedule.stopped else again
        warn_not_finite(metric, f"at step {step}, before a cut, and no cut can be held against that: {again}")
        return Postponed(step, metric=metric)

    def _examine(self, step: int) -> Event:
        """Keep the cut that is under observation, or undo it."""
        event = self._cushion.examine(step)
        return self._after_setback(event) if isinstance(event, RolledBack) else event

    def _after_setback(self, event: RolledBack) -> RolledBack:
        """Announce the restored shapes. Decide whether the next cut is due at once, at its scheduled step, or never."""
        started = time.perf_counter()
        self._cutter.tell_of_shapes()
        now = event.restored_step if self._cushion.rewind else event.step
        too_late = not self._schedule.leaves_time(now + 1)  # to examine another cut
        if self._cushion.on_setback == "stop" or too_late or self._goal.too_mild(self._cushion.mildness):
            self._schedule.stop()
        elif self._goal.rule.guarantees_error:
            # A milder cut by the same rule can be made at the next step instead of one interval later.
            self._schedule.once_more()
        return replace(event, seconds=event.seconds + time.perf_counter() - started)


def _layers(report: Report) -> tuple[dict[str, Any], ...]:
    return tuple(layer.to_dict() for layer in report.layers)


__all__ = ["Policy"]
