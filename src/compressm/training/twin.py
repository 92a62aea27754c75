"""An uncut twin: what the training would be without its last cut, on the same batches.

At the cut the model and its optimizer are copied. After each training step the twin makes the same step: the same
batch, the same learning rates, and the random state that this step began with. If the cut changed nothing, the twin and
the cut model therefore stay equal, and the difference of their metrics is the cost of the cut.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.adapters import find_layers
from compressm.cutting.metrics import measured
from compressm.cutting.optimizers import Together, members_of
from compressm.cutting.twins import twin
from compressm.errors import EvaluationError, InvalidRankRuleError
from compressm.runtime.copies import copied_module
from compressm.runtime.processes import world_size
from compressm.runtime.random_state import rng_state, set_rng_state
from compressm.training.snapshot import Training

Control = Literal["trend", "twin"]
TrainStep = Callable[[nn.Module, Any, Any], Any]

_SCHEDULED = ("lr", "momentum", "betas", "weight_decay")


def check_twin(training: Training, max_drop: float | None, train_step: TrainStep | None) -> None:
    """Refuse a training that no twin can follow.

    Raises:
        InvalidRankRuleError: what stands in the way, and what to do.
    """
    problem = _problem(training, max_drop, train_step)
    if problem:
        raise InvalidRankRuleError(f"control='twin' {problem}")


def refuse_twin(arguments: Mapping[str, Any], host: str) -> None:
    """Refuse ``control="twin"`` where a host makes the training steps.

    Args:
        arguments: of `Compressor`.
        host: who makes them.

    Raises:
        InvalidRankRuleError: it is asked for.
    """
    if arguments.get("control") == "twin":
        raise InvalidRankRuleError(
            f"control='twin' lets an uncut twin make every step too, and here {host} makes the steps: use "
            "control='trend', or a loop of your own"
        )


def _problem(training: Training, max_drop: float | None, train_step: TrainStep | None) -> str:
    if max_drop is None:
        return "compares a cut with an uncut twin, and without max_drop no cut is examined: give max_drop and evaluate"
    if train_step is None:
        return (
            "needs train_step, a function that makes one training step, and is called for the twin: "
            "train_step=lambda model, optimizer, batch: ..., with compressor.step(batch) in the loop; where a host "
            "makes the steps (Trainer, Lightning), use control='trend'"
        )
    if world_size() > 1:
        return f"works in one process, and there are {world_size()}: use control='trend'"
    if training.scaler is not None:
        return "cannot be combined with scaler=, whose scale two trainings would change: train in bfloat16 or float32"
    if training.followers:
        return "has no averages of its own, and evaluate may read those in followers=: use control='trend'"
    own = {id(parameter) for parameter in training.model.parameters()}
    trained = [one for group in training.optimizer.param_groups for one in group["params"]]
    if not all(hasattr(one, "register_step_pre_hook") for one in members_of(training.optimizer)):
        return "needs an optimizer with torch's hooks on its steps: use control='trend'"
    if any(callable(getattr(one, "eval", None)) for one in members_of(training.optimizer)):
        return (
            "evaluates a copy, and this optimizer holds other weights for evaluation, which evaluate would switch in "
            "the model only: use control='trend'"
        )
    if any(id(parameter) not in own for parameter in trained):
        return (
            "copies the model, and the optimizer also trains parameters outside of it: make them a part of the model, "
            "or use control='trend'"
        )
    return ""


class Twin:
    """A copy of a training that makes the same steps. Call `follow` after each of them.

    Args:
        training: its model and optimizer are copied, and only read.
        train_step: ``train_step(model, optimizer, batch)`` makes one training step, including ``optimizer.step()``, and
            leaves nothing behind that the next step would read. Learning rates are the training's.
        snapshot: take up an earlier twin, from its `snapshot`.

    Attributes:
        model, optimizer: the twin's.
        seconds: time that its steps have taken.
        random: the random state in which the coming step begins.
    """

    def __init__(self, training: Training, train_step: TrainStep, snapshot: Mapping[str, Any] | None = None) -> None:
        self._train_step, self.seconds, self.random = train_step, 0.0, rng_state()
        self.model = copied_module(training.model)
        copies = dict(zip(training.model.parameters(), self.model.parameters(), strict=True))
        members = [twin(member, copies) for member in members_of(training.optimizer)]
        self.optimizer: Optimizer | Together = Together(members) if len(members) > 1 else members[0]
        self._theirs = _Steps(training.optimizer)
        self._ours = _Steps(self.optimizer)
        if snapshot is not None:
            Training(self.model, self.optimizer).restore(snapshot, rewind=False)
            self.random = snapshot["rng"][0]

    def follow(self, batch: Any) -> None:
        """Make the step that the training has just made. Random generators are restored afterwards.

        Args:
            batch: its batch.

        Raises:
            InvalidRankRuleError: ``train_step`` stepped another optimizer than the one that it was given.
        """
        started, now = time.perf_counter(), rng_state()
        for group, settings in zip(self.optimizer.param_groups, self._theirs.settings, strict=True):
            group.update(settings)
        self._theirs.count = self._ours.count = 0
        set_rng_state(self.random)
        try:
            members = members_of(self.optimizer)
            self._train_step(self.model, members[0] if len(members) == 1 else list(members), batch)
        finally:
            set_rng_state(now)
        self.random = now
        if self._theirs.count or not self._ours.count:
            raise InvalidRankRuleError(
                "train_step made no step with the optimizer that it was given: let it use its arguments model and "
                "optimizer, and nothing of the same kind from around it"
            )
        self.seconds += time.perf_counter() - started

    def evaluated(self, evaluate: Callable[[nn.Module], Any]) -> tuple[float, Tensor | None]:
        """The metric of the twin; see `measured`.

        Raises:
            EvaluationError: as in `measured`, or ``evaluate`` did not use the model that it was given.
        """
        used = list[bool]()
        layer, _ = next(iter(find_layers(self.model).values()))
        hook = layer.register_forward_pre_hook(lambda *_: used.append(True))
        try:
            found = measured(self.model, evaluate)
        finally:
            hook.remove()
        if not used:
            raise EvaluationError(
                "evaluate did not call the model that it was given, and control='twin' passes the twin: let it use its "
                "argument, not a model from around it"
            )
        return found

    def snapshot(self) -> dict[str, Any]:
        """Copies of all states, in the form of `Training.snapshot`."""
        return {**Training(self.model, self.optimizer).snapshot(), "rng": [self.random]}


class _Steps:
    """Counts the steps of an optimizer, and knows the settings of the last one.

    Args:
        optimizer: gets a hook, which copies of it do not inherit, and which goes with this object.
    """

    def __init__(self, optimizer: Optimizer | Together) -> None:
        self.count, self._optimizer = 0, optimizer
        self.settings = self._now()
        for member in members_of(optimizer):
            hook = member.register_step_pre_hook(_Hook(self))
            weakref.finalize(self, hook.remove).atexit = False

    def begun(self) -> None:
        """A step begins."""
        self.count += 1
        self.settings = self._now()

    def _now(self) -> list[dict[str, Any]]:
        """What schedules change, group by group. The rest, such as counters, is a training's own."""
        return [{key: group[key] for key in _SCHEDULED if key in group} for group in self._optimizer.param_groups]


class _Hook:
    """The hook on ``optimizer.step``. It does not keep `_Steps` alive."""

    def __init__(self, steps: _Steps) -> None:
        self._steps = weakref.ref(steps)

    def __call__(self, *_: Any) -> None:
        if (steps := self._steps()) is not None:
            steps.begun()


def check_for_twin(batch: Any, made: bool) -> None:
    """Refuse a call of `Compressor.step` that does not tell the twin what to do.

    Args:
        batch: of the step, None if it was not passed.
        made: whether the optimizer has made a step.
    """
    if batch is None:
        raise InvalidRankRuleError("control='twin' needs the batch of every step: call compressor.step(batch)")
    if not made:
        raise InvalidRankRuleError(
            "control='twin' takes every call of compressor.step(batch) for a training step, and the optimizer made "
            "none: where gradients are accumulated, pass the accumulated batches together, as a list"
        )


__all__ = ["Control", "TrainStep", "Twin", "check_for_twin", "check_twin", "refuse_twin"]
