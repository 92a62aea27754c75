"""Examines cuts: the metric before a cut and some steps later, a snapshot, the verdict, and the roll-back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from compressm.cutting import state_dims
from compressm.cutting.metrics import Better, measured_together, sign_of, warn_not_finite
from compressm.errors import CheckpointError, EvaluationError
from compressm.runtime.processes import from_first_rank
from compressm.runtime.warned import warn
from compressm.training.history import Ended, Kept, RolledBack, Watched
from compressm.training.noise import WINDOW, Look, Loss, beside, estimate, foreseen
from compressm.training.snapshot import Stateful, Training
from compressm.training.twin import Control, TrainStep, Twin, check_twin
from compressm.training.verdict import Verdict, too_fine, verdict

OnSetback = Literal["halve", "stop"]

LOOKS = 3  # a cut is examined at most so many times
_LOOKS_BESIDE = 2  # and beside a twin at least so often, since one difference does not tell how much it fluctuates


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
        max_drop, evaluate, mode, on_setback, rewind, control, train_step: as in `Compressor`.

    Attributes:
        mildness: 1 at first, halved by every setback and doubled again by every cut that is kept; see `Goal`.
        looks: the last evaluations of the training that the next cut will be compared with.
        observed: the snapshot before a cut that is under observation; None where none is.
        after: the examinations so far of the cut under observation.
        twin: the uncut twin beside it; None where none runs.
        twins: the evaluations of the twin at these examinations.
        drop: what the metric lost right after that cut.
        costs: what the kept cuts cost: the loss, and its standard error where it is known.

    Raises:
        InvalidRankRuleError: ``control="twin"``, and no twin can follow this training.
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
        control: Control = "trend",
        train_step: TrainStep | None = None,
    ) -> None:
        if control == "twin":
            check_twin(training, max_drop, train_step)
        self.training, self.evidence = training, evidence
        self.max_drop, self.evaluate = max_drop, evaluate
        self.mode: Better = mode
        self.on_setback: OnSetback = on_setback
        self.rewind, self.train_step = rewind, train_step
        self.control: Control = control
        self.mildness, self.drop, self.warned = 1.0, 0.0, False
        self.looks: list[Look] = []
        self.after: list[Look] = []
        self.twins: list[Look] = []
        self.twin: Twin | None = None
        self.costs: list[tuple[float, float | None]] = []
        self.observed: dict[str, Any] | None = None

    @property
    def examines(self) -> bool:
        """Whether cuts are examined at all."""
        return self.max_drop is not None

    @property
    def follows_trend(self) -> bool:
        """Whether evaluations before a cut are needed, to know where the uncut training would go on to."""
        return self.examines and self.control == "trend"

    def metric(self, value: float) -> float:
        """The metric as `evaluate` returned it, from one that is higher where it is better; and the reverse."""
        return sign_of(self.mode) * value

    def evaluated(self, step: int) -> Look:
        """Evaluate the model, the same in all processes.

        Raises:
            EvaluationError: ``evaluate`` raised, returned no number, or scores of other examples than before.
        """
        assert self.evaluate is not None
        return self._look(step, *measured_together(self.training.model, self.evaluate))

    def _look(self, step: int, value: float, scores: Tensor | None) -> Look:
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
        """A copy of the whole training before a cut. Beside a twin, the twin is that copy."""
        known = {
            "step": step,
            "state_dims": state_dims(self.training.model),
            "moments": self.evidence.state_dict(),
        }
        if self.control == "trend":
            return {**known, **self.training.snapshot()}
        assert self.train_step is not None
        self.twin = Twin(self.training, self.train_step)
        return known

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
        self.observed, self.after, self.twins = before, [], []
        return look

    def follow(self, batch: Any) -> None:
        """Let the twin, where one runs, make the training's last step; see `Twin.follow`."""
        if self.twin is not None and self.observed is not None:
            self.twin.follow(batch)

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
        loss = self._loss(step)
        found = self._verdict(loss, last)
        mean = loss.reference - loss.value
        if found == "undo":
            return self._undo(step, mean, loss)
        seconds = self._twin_seconds()
        if found == "keep":
            self._keep(loss)
        kind = Kept if found == "keep" else Watched
        return kind(step, seconds, self.metric(mean), self.metric(loss.reference), loss.value, loss.error)

    def _loss(self, step: int) -> Loss:
        """What the cut under observation cost, by all examinations so far."""
        if self.twin is None:
            return from_first_rank(lambda: estimate(self.looks, self.after))
        assert self.evaluate is not None
        self.twins.append(self._look(step, *self.twin.evaluated(self.evaluate)))
        return beside(self.twins, self.after)

    def _verdict(self, loss: Loss, last: bool) -> Verdict:
        assert self.max_drop is not None
        if self.twin is not None and len(self.after) < _LOOKS_BESIDE and not last:
            return "watch"
        if self.twin is not None:
            self._warn_once(too_fine(self.max_drop, loss, "difference from the uncut twin"))
        shown = not self.drop <= self.max_drop  # a drop that is not finite shows, too
        return verdict(loss, self.max_drop, shown=shown, last=last or len(self.after) >= LOOKS)

    def _twin_seconds(self) -> float:
        """The time that the twin's steps have taken since the last examination."""
        if self.twin is None:
            return 0.0
        seconds, self.twin.seconds = self.twin.seconds, 0.0
        return seconds

    def _keep(self, loss: Loss) -> None:
        # A cut moves the level of the metric, not its trend: by what was seen right after it, or less if that healed.
        shift = min(max(loss.value, min(0.0, self.drop)), max(0.0, self.drop))
        moved = [look.shifted(loss=shift) for look in self.looks]
        self.looks = [*moved, *self.after][-WINDOW:]
        self.costs.append((loss.value, loss.error))
        self.mildness = min(1.0, 2 * self.mildness)
        self._watch_no_more()

    def _undo(self, step: int, value: float, loss: Loss | None) -> RolledBack:
        started, before = time.perf_counter(), self.observed
        assert before is not None
        restored = step if self.twin is not None else int(before["step"])
        followed = self._twin_seconds()
        self._go_back(before)
        reference, lost, error = self.looks[-1].value, None, None
        if loss is not None:
            reference, lost, error = loss.reference, loss.value, loss.error
        if not self.rewind and self.twin is None:  # weights of the earlier step are those of this one from now on
            self.looks = [look.shifted(steps=step - int(before["step"])) for look in self.looks]
        self.looks = [*self.looks, *self.twins][-WINDOW:]
        self._watch_no_more()
        self.mildness /= 2
        seconds = time.perf_counter() - started + followed
        return RolledBack(
            step, seconds, self.metric(value), self.metric(reference), lost, error, restored_step=restored
        )

    def _watch_no_more(self) -> None:
        self.observed, self.after, self.twins, self.twin = None, [], [], None

    def _go_back(self, before: Mapping[str, Any]) -> None:
        """Undo the cut: return to before it, or go on as the twin, which has lost no step."""
        if self.twin is None:
            self.training.restore(before, self.rewind)
        else:
            self.training.restore(self.twin.snapshot(), rewind=False)
        self.evidence.load_state_dict(before["moments"])

    def warn_if_too_fine(self, steps: Sequence[int]) -> None:
        """Warn once if ``max_drop`` is finer than the evaluations can resolve.

        Args:
            steps: when the cut that is due would be examined.
        """
        assert self.max_drop is not None
        if self.looks and not self.warned:
            self._warn_once(too_fine(self.max_drop, foreseen(self.looks, steps)))

    def _warn_once(self, text: str) -> None:
        if text and not self.warned:
            self.warned = True
            warn(text, CushionWarning)

    def end(self, step: int) -> Ended:
        """Compare the end of the training with what was promised.

        Raises:
            EvaluationError: as in `evaluated`.
        """
        assert self.max_drop is not None
        metric = self.metric(self.evaluated(step).value)
        if not self.costs:
            return Ended(step, metric=metric)
        lost, error = _together(self.costs)
        return Ended(step, metric=metric, loss=lost, error=error, promised=len(self.costs) * self.max_drop)

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` needs."""
        return {
            "aggressiveness": self.mildness,
            "observed": self.observed if self.twin is None else self._with_twin(),
            "looks": [look.to_dict() for look in self.looks],
            "after": [look.to_dict() for look in self.after],
            "twins": [look.to_dict() for look in self.twins],
            "cushion": {
                "drop": self.drop if math.isfinite(self.drop) else None,
                "warned": self.warned,
                "costs": [list(cost) for cost in self.costs],
            },
        }

    def _with_twin(self) -> dict[str, Any] | None:
        """The cut under observation with its twin; None where none is."""
        assert self.twin is not None
        return None if self.observed is None else {**self.observed, "control": "twin", **self.twin.snapshot()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Earlier versions stored less.

        Raises:
            CheckpointError: it has a twin, and this training has none.
        """
        self.mildness, self.observed = float(state["aggressiveness"]), state["observed"]
        self.looks, self.after, self.twins = (
            [Look.from_dict(one) for one in state.get(key) or ()] for key in ("looks", "after", "twins")
        )
        self.twin = self._resumed_twin()
        if self.observed is not None and "reference" in self.observed:  # an earlier version's reference, a number
            self.looks = [Look(int(self.observed["step"]), self.metric(float(self.observed["reference"])))]
        more: Mapping[str, Any] = state.get("cushion") or {"drop": None, "warned": False, "costs": []}
        self.drop, self.warned = math.inf if more["drop"] is None else float(more["drop"]), bool(more["warned"])
        self.costs = [(loss, error) for loss, error in more["costs"]]

    def _resumed_twin(self) -> Twin | None:
        if self.observed is None or self.observed.get("control") != "twin":
            return None
        if self.train_step is None:
            raise CheckpointError(
                "the checkpoint has a cut beside an uncut twin: resume with control='twin' and train_step, as before"
            )
        twin = Twin(self.training, self.train_step, self.observed)
        self.observed = {key: self.observed[key] for key in ("step", "state_dims", "moments")}  # the twin has the rest
        return twin


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
