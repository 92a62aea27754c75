"""Decides what is done after each training step, by the schedule, the goal and the cushion."""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compressm.cutting import Report
from compressm.cutting.metrics import MetricWarning, warn_not_finite
from compressm.errors import EvaluationError, InvalidRankRuleError
from compressm.runtime.warned import warn
from compressm.training.cushion import LOOKS, Cushion, CushionWarning, gap
from compressm.training.cutter import Cutter
from compressm.training.goal import Goal, GoalWarning
from compressm.training.history import Cut, Event, FellShort, Postponed, RolledBack, Stopped, Unchanged
from compressm.training.schedule import LOOKS_BEFORE, Schedule

_NO_TIME = "too few steps are left to examine one"
_PART_OF_THE_WAY = "cuts after one that was undone go a part of the way only"


class Policy:
    """Cuts, examines and rolls back when this is due.

    Args:
        schedule: decides when cuts come.
        goal: decides how far a cut goes.
        cushion: examines cuts and rolls back those that did harm.
        cutter: makes the cuts.

    Raises:
        InvalidRankRuleError: another compressor cuts other layers of the same training, and one of them examines cuts.
    """

    def __init__(self, schedule: Schedule, goal: Goal, cushion: Cushion, cutter: Cutter) -> None:
        self._schedule, self._goal, self._cushion, self._cutter = schedule, goal, cushion, cutter
        self._planned: tuple[dict[str, Any], ...] = ()  # the layers of the last plan
        if obstacle := cutter.obstacle(goal, len(schedule.cut_steps)):
            warn(obstacle, GoalWarning)
        _check_alone(self)

    def spoils(self, other: Policy) -> bool:
        """Whether a roll-back of one of them would undo cuts of the other.

        A second compressor for the same layers takes the place of the first, as where a notebook's cell is run again.
        """
        examined = self._cushion.examines or other._cushion.examines
        over = other._schedule.over and other._cushion.observed is None
        return examined and not over and self._cutter.trains_with(other._cutter)

    @property
    def layers(self) -> str:
        """Names of the layers that are cut."""
        return ", ".join(self._cutter.state_dims)

    def resume(self, states: int, history: Sequence[Event]) -> None:
        """Restore what the next decisions need.

        Args:
            states: of all layers together before the first cut.
            history: of the training so far.
        """
        self._goal = replace(self._goal, initial_states=states)
        self._planned = next((event.layers for event in reversed(history) if event.layers), ())

    def act(self, step: int) -> list[Event]:
        """Evaluate, cut or examine if it is due.

        Args:
            step: training steps done.

        Returns:
            what was done, in order; empty if nothing was due.
        """
        over = self._over
        events = self._watch_or_cut(step)
        if self._over and not over:
            events += self._short(step, events)
        if step == self._schedule.total_steps and self._cushion.examines and not self._goes_back(events):
            events.append(self._cushion.end(step))
        return events

    @property
    def _over(self) -> bool:
        """Whether the layers keep the sizes that they have."""
        return self._schedule.over and self._cushion.observed is None

    def _goes_back(self, events: list[Event]) -> bool:
        """Whether steps are made again, after a cut that was undone. An uncut twin has made them already."""
        undone = next((event for event in events if isinstance(event, RolledBack)), None)
        return undone is not None and self._cushion.rewind and undone.restored_step < undone.step

    def _watch_or_cut(self, step: int) -> list[Event]:
        cushion, schedule = self._cushion, self._schedule
        if cushion.observed is not None:
            due = step >= cushion.examine_at(schedule.check_after)
            return self._examine(step) if due else []
        stopped = schedule.stopped
        if schedule.due(step, self._cutter.spectra) and self._knows_enough(step):
            return self._cut(step)
        if schedule.stopped and not stopped:
            return [self._stop(step, _NO_TIME)]
        if cushion.follows_trend and schedule.looks(step):
            cushion.look(step)
        return []

    def _knows_enough(self, step: int) -> bool:
        """Whether a cut that settled spectra allow early can be compared with enough evaluations before it."""
        early = not self._schedule.over and step < self._schedule.next_cut
        return not (early and self._cushion.follows_trend and len(self._cushion.looks) < LOOKS_BEFORE)

    def _cut(self, step: int) -> list[Event]:
        """Measure, plan, take a snapshot, cut, and measure again."""
        cushion, reference, metric = self._cushion, None, None
        if cushion.evaluate is not None:
            look = cushion.look(step)
            reference = cushion.metric(look.value)
            if cushion.examines and not math.isfinite(look.value):
                return self._postpone(step, reference)
        dims, cuts_left = self._cutter.state_dims.values(), self._schedule.cuts_left
        plan = self._cutter.plan(self._goal.rule_now(dims, cuts_left, cushion.mildness))
        if not plan.changes:
            self._schedule.made()
            self._planned = _layers(plan.report)
            return [Unchanged(step, plan.report.seconds, self._planned, reference)]
        before = cushion.snapshot(step) if cushion.examines else None
        report = self._cutter.write(plan)
        if before is not None:
            metric = cushion.metric(cushion.watch(before).value)
        # The cut counts as made only now. After an error above it is due again at the next step.
        self._schedule.made()
        self._cutter.tell(plan)
        if before is not None and cushion.follows_trend:
            cushion.warn_if_too_fine([step + self._schedule.check_after + i * self._apart for i in range(LOOKS)])
        elif before is None and cushion.evaluate is not None:
            metric = self._for_the_record(step)
        self._planned = _layers(report)
        return [Cut(step, report.seconds, self._planned, reference, metric, report.predicted_loss)]

    def _short(self, step: int, events: Sequence[Event]) -> list[FellShort]:
        """What there is to say where no cut comes any more, if the size that was asked for was not reached.

        Args:
            step: training steps done.
            events: of this step.
        """
        dims = self._cutter.state_dims.values()
        if self._goal.arrived(dims):
            return []
        reasons = [event.reason for event in events if isinstance(event, Stopped)]
        reasons = reasons or [one["reason"] for one in self._planned if self._goal.smaller_than(one["states_after"])]
        why = "; ".join(dict.fromkeys(filter(None, reasons))) or _PART_OF_THE_WAY
        text = f"{self._goal.size} was asked for, and the cuts end at {self._goal.measured(dims)}: {why}"
        return [FellShort(step, reason=text)]

    def _for_the_record(self, step: int) -> float | None:
        """The metric right after a cut that is not examined. An error of ``evaluate`` cannot undo this cut."""
        try:
            return self._cushion.metric(self._cushion.evaluated(step).value)
        except EvaluationError as error:
            warn(f"step {step}, right after a cut, which is kept: {error}", MetricWarning)
            return None

    @property
    def _apart(self) -> int:
        return gap(self._schedule.check_after)

    def _postpone(self, step: int, metric: float) -> list[Event]:
        """Postpone the cut, since a metric that is not finite cannot serve as its reference."""
        self._schedule.postpone(step)
        again = f"it is tried again at step {self._schedule.postponed}"
        again = "no more cuts are made" if self._schedule.stopped else again
        warn_not_finite(metric, f"at step {step}, before a cut, and no cut can be held against that: {again}")
        events: list[Event] = [Postponed(step, metric=metric)]
        if self._schedule.stopped:
            events.append(Stopped(step, reason=_NO_TIME))
        return events

    def _examine(self, step: int) -> list[Event]:
        """Keep the cut that is under observation, undo it, or go on watching it."""
        last = step + self._apart > self._schedule.total_steps
        event = self._cushion.examine(step, last)
        return self._after_setback(event) if isinstance(event, RolledBack) else [event]

    def _after_setback(self, event: RolledBack) -> list[Event]:
        """Announce the restored shapes. Decide when the next cut comes: some steps later, or never."""
        started = time.perf_counter()
        self._cutter.tell_of_shapes()
        now = event.restored_step if self._cushion.rewind else event.step
        if self._goal.rule.promises_quality:
            self._schedule.once_more()  # a milder cut by the same rule takes the place of the one that was undone
        # The evaluations at the next cut must be others than those that judged this one.
        self._schedule.wait(now + self._schedule.check_after)
        reason = self._reason_to_stop()
        undone = replace(event, seconds=event.seconds + time.perf_counter() - started)
        if not reason:
            return [undone]
        return [undone, self._stop(event.step, reason)]

    def _stop(self, step: int, reason: str) -> Stopped:
        """Make no more cuts, and warn of it unless the user asked for it."""
        self._schedule.stop()
        event = Stopped(step, reason=reason)
        if self._cushion.on_setback != "stop":
            warn(str(event), CushionWarning)
        return event

    def _reason_to_stop(self) -> str:
        """Why there will be no other cut; empty if there will be one."""
        schedule, mildness = self._schedule, self._cushion.mildness
        if self._cushion.on_setback == "stop":
            return "a cut was undone, and on_setback='stop'"
        if schedule.over:
            return "the cut that was undone was the last one"
        if self._goal.too_mild(mildness):
            least = self._goal.rule.min_reduction
            return f"after repeated setbacks the next one would remove less than {100 * least:.3g}% of the states"
        if not schedule.leaves_time(schedule.next_cut):
            return _NO_TIME
        return ""


_policies: weakref.WeakSet[Policy] = weakref.WeakSet()


def _check_alone(new: Policy) -> None:
    """Refuse a second compressor for a part of a training if a roll-back restores the whole of it."""
    if any(new.spoils(other) for other in [*_policies]):
        gc.collect()  # one that nobody holds any more may still be waiting for the collector
    for other in [*_policies]:
        if new.spoils(other):
            raise InvalidRankRuleError(
                f"max_drop undoes a cut by restoring the whole model and its optimizer, and another Compressor cuts "
                f"{other.layers} of the same model: cut all layers by one Compressor, or give neither of them max_drop"
            )
    _policies.add(new)


def _layers(report: Report) -> tuple[dict[str, Any], ...]:
    return tuple(layer.to_dict() for layer in report.layers)


__all__ = ["Policy"]
