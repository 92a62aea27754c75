"""Examines cuts: the metric before a cut and some steps later, a snapshot, the verdict, and the roll-back."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from compressm.cutting import state_dims
from compressm.cutting.metrics import Better, measured_together, sign_of, warn_not_finite
from compressm.errors import EvaluationError
from compressm.runtime.processes import from_first_rank
from compressm.training.history import Ended, Kept, RolledBack, Watched
from compressm.training.noise import WINDOW, Look, Loss, estimate, foreseen
from compressm.training.snapshot import Stateful, Training
from compressm.training.verdict import too_fine, verdict

OnSetback = Literal["halve", "stop"]

LOOKS = 3  # a cut is examined at most so many times


class CushionWarning(UserWarning):
    """Something that the cushion cannot do: resolve ``max_drop``, or go on cutting."""


class Cushion:
    """Examines a cut some steps later, and undoes it exactly if it cost more of the metric than allowed.

    Before a cut call `look` now and then, and at the cut. Then call `snapshot`, make the cut, and call `watch`. Some
    steps later call `examine`, until the cut is not `observed` any more. Without ``max_drop`` nothing is examined, and
    `examines` is False.

    Args:
        training: the parts of the training that a snapshot stores and a roll-back restores.
        evidence: the observations of the layers' states, which are stored and restored too.
        max_drop, evaluate, mode, on_setback, rewind: as in `Compressor`.

    Attributes:
        mildness: 1 at first, halved by every setback and doubled again by every cut that is kept; see `Goal`.
        looks: the last evaluations of the training that the next cut will be compared with.
        observed: the snapshot before a cut that is under observation; None where none is.
        after: the examinations so far of the cut under observation.
        drop: what the metric lost right after that cut.
        costs: what the kept cuts cost: the loss, and its standard error where it is known.
    """

    def __init__(
        self,
        training: Training,
        evidence: Stateful,
        *,
        max_drop: float | None = None,
        evaluate: Callable[[nn.Module], Any] | None = None,
        mode: Better = "max",
        on_setback: OnSetback = "halve",
        rewind: bool = True,
    ) -> None:
        self.training, self.evidence = training, evidence
        self.max_drop, self.evaluate = max_drop, evaluate
        self.mode: Better = mode
        self.on_setback: OnSetback = on_setback
        self.rewind = rewind
        self.mildness, self.drop, self.warned = 1.0, 0.0, False
        self.looks: list[Look] = []
        self.after: list[Look] = []
        self.costs: list[tuple[float, float | None]] = []
        self.observed: dict[str, Any] | None = None

    @property
    def examines(self) -> bool:
        """Whether cuts are examined at all."""
        return self.max_drop is not None

    def metric(self, value: float) -> float:
        """The metric as `evaluate` returned it, from one that is higher where it is better; and the reverse."""
        return sign_of(self.mode) * value

    def evaluated(self, step: int) -> Look:
        """Evaluate the model, the same in all processes.

        Raises:
            EvaluationError: ``evaluate`` raised, returned no number, or scores of other examples than before.
        """
        assert self.evaluate is not None
        value, scores = measured_together(self.training.model, self.evaluate)
        if self.looks and _examples(scores) != _examples(self.looks[-1].scores):
            raise EvaluationError(
                f"evaluate returned {_examples(scores)} and before that {_examples(self.looks[-1].scores)}; expected "
                "the same examples each time, in the same order: drop and shuffle none of the validation data"
            )
        sign = sign_of(self.mode)
        return Look(step, sign * value, None if scores is None else sign * scores)

    def look(self, step: int) -> Look:
        """Evaluate the training as it is before the next cut, and remember it if it is finite."""
        look = self.evaluated(step)
        if math.isfinite(look.value):
            self.looks = [*self.looks, look][-WINDOW:]
        return look

    def snapshot(self, step: int) -> dict[str, Any]:
        """A copy of the whole training before a cut."""
        return {
            "step": step,
            "state_dims": state_dims(self.training.model),
            "moments": self.evidence.state_dict(),
            **self.training.snapshot(),
        }

    def watch(self, before: dict[str, Any]) -> Look:
        """Put the cut that has just been made under observation, and evaluate the model right after it.

        Args:
            before: from `snapshot`.

        Raises:
            EvaluationError: as in `evaluated`; the cut is undone.
        """
        try:
            look = self.evaluated(int(before["step"]))
        except EvaluationError:
            self._go_back(before)
            raise
        self.drop = self.looks[-1].value - look.value
        self.observed, self.after = before, []
        return look

    def examine_at(self, check_after: int) -> int:
        """The step after which the cut under observation is to be examined next."""
        assert self.observed is not None
        return int(self.observed["step"]) + check_after + len(self.after) * gap(check_after)

    def examine(self, step: int, last: bool = False) -> Kept | RolledBack | Watched:
        """Keep the cut that is under observation, undo it and make the next one milder, or go on watching it.

        Args:
            step: training steps done.
            last: whether training ends before another examination.

        Raises:
            EvaluationError: as in `evaluated`; the cut stays under observation.
        """
        assert self.observed is not None
        look = self.evaluated(step)
        if not math.isfinite(look.value):
            warn_not_finite(self.metric(look.value), f"at step {step}, after a cut, which is therefore undone")
            return self._undo(step, look.value, None)
        self.after.append(look)
        loss = from_first_rank(lambda: estimate(self.looks, self.after))
        assert self.max_drop is not None
        shown = not self.drop <= self.max_drop  # a drop that is not finite shows, too
        found = verdict(loss, self.max_drop, shown=shown, last=last or len(self.after) >= LOOKS)
        mean = loss.reference - loss.value
        if found == "undo":
            return self._undo(step, mean, loss)
        if found == "keep":
            self._keep(loss)
        kind = Kept if found == "keep" else Watched
        return kind(step, 0.0, self.metric(mean), self.metric(loss.reference), loss.value, loss.error)

    def _keep(self, loss: Loss) -> None:
        # A cut moves the level of the metric, not its trend: by what was seen right after it, or less if that healed.
        shift = min(max(loss.value, min(0.0, self.drop)), max(0.0, self.drop))
        moved = [look.shifted(loss=shift) for look in self.looks]
        self.looks = [*moved, *self.after][-WINDOW:]
        self.costs.append((loss.value, loss.error))
        self.mildness = min(1.0, 2 * self.mildness)
        self.observed, self.after = None, []

    def _undo(self, step: int, value: float, loss: Loss | None) -> RolledBack:
        started, before = time.perf_counter(), self.observed
        assert before is not None
        self._go_back(before)
        reference, lost, error = self.looks[-1].value, None, None
        if loss is not None:
            reference, lost, error = loss.reference, loss.value, loss.error
        if not self.rewind:  # the weights of the earlier step are those of this one from now on
            self.looks = [look.shifted(steps=step - int(before["step"])) for look in self.looks]
        self.observed, self.after = None, []
        self.mildness /= 2
        seconds, metrics = time.perf_counter() - started, (self.metric(value), self.metric(reference))
        return RolledBack(step, seconds, *metrics, lost, error, restored_step=int(before["step"]))

    def _go_back(self, before: Mapping[str, Any]) -> None:
        self.training.restore(before, self.rewind)
        self.evidence.load_state_dict(before["moments"])

    def warn_if_too_fine(self, steps: Sequence[int]) -> None:
        """Warn once if ``max_drop`` is finer than the evaluations can resolve.

        Args:
            steps: when the cut that is due would be examined.
        """
        assert self.max_drop is not None
        text = too_fine(self.max_drop, foreseen(self.looks, steps)) if self.looks and not self.warned else ""
        if text:
            self.warned = True
            warnings.warn(text, CushionWarning, stacklevel=5)

    def end(self, step: int) -> Ended:
        """Compare the end of the training with what was promised.

        Raises:
            EvaluationError: as in `evaluated`.
        """
        assert self.max_drop is not None
        lost, error = _together(self.costs)
        metric = self.metric(self.evaluated(step).value)
        return Ended(step, metric=metric, loss=lost, error=error, promised=len(self.costs) * self.max_drop)

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` needs."""
        return {
            "aggressiveness": self.mildness,
            "observed": self.observed,
            "looks": [look.to_dict() for look in self.looks],
            "after": [look.to_dict() for look in self.after],
            "cushion": {
                "drop": self.drop if math.isfinite(self.drop) else None,
                "warned": self.warned,
                "costs": [list(cost) for cost in self.costs],
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Earlier versions stored less."""
        self.mildness, self.observed = float(state["aggressiveness"]), state["observed"]
        self.looks, self.after = ([Look.from_dict(one) for one in state.get(key) or ()] for key in ("looks", "after"))
        if self.observed is not None and "reference" in self.observed:  # an earlier version's reference, a number
            self.looks = [Look(int(self.observed["step"]), self.metric(float(self.observed["reference"])))]
        more: Mapping[str, Any] = state.get("cushion") or {"drop": None, "warned": False, "costs": []}
        self.drop, self.warned = math.inf if more["drop"] is None else float(more["drop"]), bool(more["warned"])
        self.costs = [(loss, error) for loss, error in more["costs"]]


def _together(costs: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """The sum of losses, and its standard error where all of theirs are known."""
    known = [error for _, error in costs if error is not None]
    return sum(loss for loss, _ in costs), math.hypot(*known) if len(known) == len(costs) else None


def _examples(scores: Tensor | None) -> str:
    return "one number" if scores is None else f"{len(scores)} scores"


def gap(check_after: int) -> int:
    """Steps between two evaluations before or after a cut."""
    return max(1, check_after // 2)


__all__ = ["LOOKS", "Cushion", "CushionWarning", "OnSetback", "gap"]
