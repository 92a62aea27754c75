"""Examines cuts: the metric and a snapshot before a cut, the metric some steps later, and the roll-back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from compressm.cutting import state_dims
from compressm.cutting.metrics import measure_together, warn_not_finite
from compressm.training.history import Kept, RolledBack
from compressm.training.snapshot import Stateful, Training

OnSetback = Literal["halve", "stop"]


class Cushion:
    """Examines a cut some steps later, and undoes it exactly if the metric has dropped too far.

    At a cut call `measure`, `reference` and `snapshot`, make the cut, and call `watch`. Some steps later call
    `examine`. Without ``max_drop`` nothing is examined, and `examines` is False.

    Args:
        training: the parts of the training that a snapshot stores and a roll-back restores.
        evidence: the observations of the layers' states, which are stored and restored too.
        max_drop, evaluate, on_setback, rewind: as in `Compressor`.

    Attributes:
        mildness: 1 at first, halved by every setback; see `Goal`.
        best: the best metric seen so far, at a cut or an examination; None before the first.
        observed: the snapshot before a cut that is under observation; None where none is.
    """

    def __init__(
        self,
        training: Training,
        evidence: Stateful,
        *,
        max_drop: float | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        on_setback: OnSetback = "halve",
        rewind: bool = True,
    ) -> None:
        self.training, self.evidence = training, evidence
        self.max_drop, self.evaluate = max_drop, evaluate
        self.on_setback: OnSetback = on_setback
        self.rewind = rewind
        self.mildness = 1.0
        self.best: float | None = None
        self.observed: dict[str, Any] | None = None

    @property
    def examines(self) -> bool:
        """Whether cuts are examined at all."""
        return self.max_drop is not None

    def measure(self) -> float:
        """The metric now, the same in all processes.

        Raises:
            EvaluationError: ``evaluate`` raised, or returned no number.
        """
        assert self.evaluate is not None
        return measure_together(self.training.model, self.evaluate)

    def reference(self, metric: float) -> float:
        """The metric that a cut is compared with: the best so far, including the present one."""
        return metric if self.best is None else max(self.best, metric)

    def snapshot(self, step: int, reference: float) -> dict[str, Any]:
        """A copy of the whole training before a cut.

        Args:
            step: training steps done.
            reference: from `reference`.
        """
        return {
            "step": step,
            "reference": reference,
            "state_dims": state_dims(self.training.model),
            "moments": self.evidence.state_dict(),
            **self.training.snapshot(),
        }

    def watch(self, before: dict[str, Any] | None, reference: float | None) -> None:
        """Put the cut that has just been made under observation.

        Args:
            before: from `snapshot`; None if the cut changed nothing.
            reference: from `reference`; None without ``max_drop``.
        """
        self.observed = before
        self.best = self.best if reference is None else reference

    def examine_at(self, check_after: int) -> int:
        """The step after which the cut under observation is to be examined."""
        assert self.observed is not None
        return int(self.observed["step"]) + check_after

    def examine(self, step: int) -> Kept | RolledBack:
        """Keep the cut that is under observation, or undo it and make the next one milder.

        Args:
            step: training steps done.

        Raises:
            EvaluationError: as in `measure`; the cut stays under observation.
        """
        assert self.max_drop is not None
        assert self.observed is not None
        metric, before = self.measure(), self.observed
        reference = float(before["reference"])
        self.observed = None
        if not math.isfinite(metric):
            warn_not_finite(metric, f"at step {step}, after a cut, which is therefore undone")
        elif metric >= reference - self.max_drop:
            self.best = max(reference, metric)
            return Kept(step, metric=metric, reference=reference)
        started = time.perf_counter()
        self.training.restore(before, self.rewind)
        self.evidence.load_state_dict(before["moments"])
        self.mildness /= 2
        seconds = time.perf_counter() - started
        return RolledBack(step, seconds, metric, reference, restored_step=int(before["step"]))

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` needs."""
        return {"aggressiveness": self.mildness, "best": self.best, "observed": self.observed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.mildness, self.best = float(state["aggressiveness"]), state["best"]
        self.observed = state["observed"]


__all__ = ["Cushion", "OnSetback"]
