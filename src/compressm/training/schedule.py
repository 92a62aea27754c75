"""Decides when cuts are made, when each is examined, and when it is too late for another one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from compressm.cutting.spectrum import spectrum_changes
from compressm.errors import InvalidRankRuleError
from compressm.runtime.processes import from_first_rank
from compressm.theory.balanced import Balanced

When = Literal["schedule", "settled"]

_PROBES = 10  # probes of the spectrum between two cuts
_STILL = 0.02  # a spectrum has settled if at most this share of the Hankel energy moved between two probes
LOOKS_BEFORE = 3  # evaluations before each cut, besides the one at the cut
_OBSERVE_EVERY = 8  # largest number of steps between two observations of selective layers
_GRADIENTS = 50  # number of steps before a cut or probe in which the gradients of the loss are observed


def cut_steps(total_steps: int, cuts: int, window: float, start: int) -> tuple[int, ...]:
    """The steps after which cuts come: equidistant in ``window * total_steps`` steps from ``start`` on.

    The last one is later than ``total_steps`` if they do not fit.
    """
    exact = window * total_steps / cuts
    distance = max(1, round(exact))
    if start + distance * cuts > total_steps:  # rounding must not push the last cut out of a window that fits
        distance = max(1, math.floor(exact + 1e-9))
    return tuple(start + distance * (index + 1) for index in range(cuts))


def first_look(cut: int, check_after: int) -> int:
    """The step of the first evaluation before a cut: see `Schedule.looks`."""
    return cut - LOOKS_BEFORE * _apart(cut, check_after)


def _apart(cut: int, check_after: int) -> int:
    """Steps between two evaluations before a cut."""
    return max(1, min(check_after // 2, cut // (LOOKS_BEFORE + 1)))


class Schedule:
    """Decides after which training steps a cut is made.

    A cut is due at its step in ``cut_steps``, or with ``when="settled"`` as soon as two probes in a row find the same
    spectrum. A cut that cannot be made yet is postponed. A cut is not made if training would end before its
    examination.

    Args:
        total_steps, cuts, window, start, when, check_after: as in `Compressor`.
        examined: whether cuts are examined. The last one then needs ``check_after`` more steps.

    Attributes:
        cut_steps: the steps after which cuts are scheduled.
        check_after: steps between a cut and its first examination.
        cuts_done: how many of the cuts have been made.
        stopped: whether no more cuts are to be made.
        postponed: no cut is made before this step; 0 if none was postponed.
        probe: the balanced layers at the last probe.

    Raises:
        InvalidRankRuleError: the last cut, or its examination, would come after the last step.
    """

    def __init__(
        self,
        total_steps: int,
        cuts: int = 4,
        window: float = 0.1,
        start: int = 0,
        when: When = "schedule",
        check_after: int | None = None,
        *,
        examined: bool = False,
    ) -> None:
        self.total_steps, self.start = total_steps, start
        self.when: When = when
        self.cut_steps = cut_steps(total_steps, int(cuts), window, start)
        distance, last = self.cut_steps[0] - start, self.cut_steps[-1]
        self.check_after = max(1, distance // 2) if check_after is None else check_after
        self.examined = examined
        if last > total_steps:
            raise InvalidRankRuleError(
                f"the last of {cuts} cuts would come at step {last}, after total_steps={total_steps}: "
                "lower start, window or cuts"
            )
        if examined and not self.leaves_time(last):
            raise InvalidRankRuleError(
                f"the last cut, at step {last}, would be examined {self.check_after} steps later, after "
                f"total_steps={total_steps}: lower start, window or check_after"
            )
        self.probe_every = max(1, distance // _PROBES)
        self.observe_every = min(_OBSERVE_EVERY, self.probe_every)
        self.cuts_done, self.stopped, self.postponed = 0, False, 0
        self.probe: dict[str, Balanced] = {}

    @property
    def over(self) -> bool:
        """Whether no more cut will be made."""
        return self.stopped or self.cuts_done >= len(self.cut_steps)

    @property
    def cuts_left(self) -> int:
        """How many cuts are still to come."""
        return len(self.cut_steps) - self.cuts_done

    def leaves_time(self, step: int) -> bool:
        """Whether a cut after this step could be examined before training ends."""
        return step + self.check_after <= self.total_steps

    def due(self, step: int, look: Callable[[], Mapping[str, Balanced]]) -> bool:
        """Whether a cut is to be made after this step.

        Args:
            step: training steps done.
            look: balances the layers as they are now; called when the spectrum is probed.
        """
        if self.over:
            return False
        if (self.postponed or self.examined) and not self.leaves_time(step):
            self.stopped = True
        if self.stopped or step < self.postponed:
            return False
        scheduled = self.cut_steps[self.cuts_done]
        if step >= scheduled or self.when == "schedule":
            return step >= scheduled
        return step >= self.start and step % self.probe_every == 0 and self._settled(look())

    def _settled(self, now: Mapping[str, Balanced]) -> bool:
        """Whether all spectra are the same as at the previous probe, up to a small share."""
        before, self.probe = self.probe, dict(now)
        changes = spectrum_changes(before, now)
        settled = bool(changes) and len(changes) == len(now) and all(c.settled(_STILL) for c in changes.values())
        return from_first_rank(lambda: settled)

    def observes(self, step: int, unseen: bool = False) -> bool:
        """Whether layers that need data are to be observed in the step after this one.

        Args:
            step: training steps done.
            unseen: whether a layer has not been observed since the last cut.
        """
        return not self.over and (unseen or step % self.observe_every == 0)

    def observes_gradients(self, step: int) -> bool:
        """Whether the gradients of the loss are to be observed in the step after this one.

        Args:
            step: training steps done.
        """
        if self.over:
            return False
        scheduled = max(self.cut_steps[self.cuts_done], self.postponed)
        near = step >= scheduled - _GRADIENTS
        if self.when == "settled" and step >= self.start - _GRADIENTS:
            near = near or -step % self.probe_every <= _GRADIENTS
        return near or step == 0  # once at the very start, which finds layers that no gradient reaches

    @property
    def next_cut(self) -> int:
        """The step after which the next cut is scheduled, or to which it was put off."""
        return max(self.cut_steps[self.cuts_done], self.postponed)

    def looks(self, step: int) -> bool:
        """Whether the metric is to be evaluated after this step, to know where it stands when the next cut comes.

        This is so at three steps before a cut, as far apart as examinations after it. With ``when="settled"``, where a
        cut may come any time, it is so all along.
        """
        if self.over:
            return False
        left, apart = self.next_cut - step, _apart(self.next_cut, self.check_after)
        return left > 0 and left % apart == 0 and (left <= LOOKS_BEFORE * apart or self.when == "settled")

    def made(self) -> None:
        """Count the cut that has just been made."""
        self.cuts_done += 1
        self.probe = {}

    def once_more(self) -> None:
        """Make the cut that was undone due again at once."""
        self.cuts_done = max(0, self.cuts_done - 1)

    def wait(self, step: int) -> None:
        """Make no cut before this step."""
        self.postponed = step

    def stop(self) -> None:
        """Make no more cuts."""
        self.stopped = True

    def postpone(self, step: int) -> None:
        """Put off the cut that is due by one probe interval, or stop if there is then no time to examine it."""
        self.postponed = step + self.probe_every
        self.stopped = not self.leaves_time(self.postponed)

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` needs, without the probe."""
        return {"cuts_done": self.cuts_done, "stopped": self.stopped, "postponed": self.postponed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.cuts_done, self.stopped = int(state["cuts_done"]), bool(state["stopped"])
        self.postponed = int(state.get("postponed", 0))  # absent in the oldest checkpoints


__all__ = ["Schedule", "When", "cut_steps", "first_look"]
