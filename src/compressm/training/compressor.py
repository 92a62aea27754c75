"""The Compressor: cuts a model while it trains, looks back, and undoes what did harm."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from compressm.adapters import find_layers
from compressm.adapters.base import check_plain
from compressm.cutting import Plan, Report, plan_reduction, resize_states, state_dims
from compressm.cutting.carry import (
    Carry,
    check_optimizer,
    check_trained,
    follow,
    forget_sizes,
    paired_layers,
    unwrap_optimizer,
)
from compressm.cutting.fitting import fit_any_size
from compressm.cutting.metrics import measure_together, warn_not_finite
from compressm.cutting.replay import errors_on_samples
from compressm.cutting.spectrum import AnyBalancing, balance_layers, snapshot, snapshot_state, spectrum_changes
from compressm.errors import CheckpointError, InvalidRankRuleError
from compressm.observing.moments import Sample, Statistics
from compressm.runtime.compiled_graphs import allow_recompilation, graphs_compiled
from compressm.runtime.processes import from_first_rank, rebuild_replicas
from compressm.theory.balancing import Method
from compressm.theory.ranks import RankRule, check_choice, check_sizes
from compressm.theory.selection import Selection
from compressm.training.clock import Savings, StepClock, savings
from compressm.training.history import Event
from compressm.training.schedule import cut_steps, towards
from compressm.training.snapshot import Stateful, Training
from compressm.training.step_cost import StepCost, step_cost

When = Literal["schedule", "settled"]
OnSetback = Literal["halve", "stop"]

# Where only max_drop is given. In the paper a tolerance of 0.02 costs 0.4 points on sequential MNIST, 0.04 costs 1.4.
_CAUTIOUS_TOLERANCE, _CAUTIOUS_REDUCTION = 0.02, 0.5

log = logging.getLogger(__name__)


class Compressor:
    """Shrinks the state space layers of a model during training.

    Change

        optimizer.step()

    to

        optimizer.step()
        compressor.step()

    By default it makes 4 equidistant cuts in the first tenth of the training steps, as in the CompreSSM paper. With
    ``evaluate`` and ``max_drop`` every cut is held against the best metric seen so far after ``check_after`` steps,
    and is undone exactly where the metric lost more than ``max_drop``; the next one then discards half as much.

    While a metric climbs steeply it hides what a cut will cost in the end. ``max_drop`` alone therefore does not take
    the metric's word for it: a cut discards 2 % of a layer's Hankel energy and half of its states at most, and the
    metric can only make that less.

    Args:
        model: the model, trained by ``optimizer``.
        optimizer: SGD, Adam, AdamW, or a wrapper with one in ``.optimizer``.
        total_steps: planned number of optimizer steps.
        tolerance: share of a layer's Hankel energy that each cut may discard (tau in the paper).
        states: state dimension to arrive at with the last cut; the cuts before approach it geometrically.
        fraction: the same, as a share of the states at the start.
        max_error: H-infinity error that each cut may make in a layer, in units of output per input.
        total_states: the same as ``states``, for all layers together. One of these five or ``max_drop`` is needed.
        max_drop: how much of the metric a cut may cost, in its own units (0.002 is 0.2 points of an accuracy in
            [0, 1]), as far as that shows after ``check_after`` steps. The rule above proposes and the metric disposes;
            without one, ``tolerance=0.02`` proposes, and at most half of the states.
        evaluate: ``evaluate(model)`` returns the validation metric, higher is better. Needed for ``max_drop``.
        multiple_of: prefer state dimensions that are a multiple of this; see `RankRule` for what comes first.
        min_reduction: cut a layer only where this share of its states goes.
        per_layer: let the layers of a Hugging Face model differ in their state dimension; see `RankRule`.
        cuts: how many cuts.
        window: share of ``total_steps`` in which they are made.
        start: steps to wait before the window.
        when: ``"schedule"`` cuts at fixed steps; ``"settled"`` probes the spectrum at those steps, and at nine more
            between each two, and cuts as soon as it holds still (less than 2 % of the Hankel energy moved since the
            probe before), or at the scheduled step at the latest.
        method: ``"real"`` or ``"complex"``; see `balancing`.
        selection: how states of selective layers are picked; see `compressm.theory.selection`. What those layers do
            with the data is observed at every eighth step while cuts are pending, on one sequence of the batch.
        carry: what becomes of the optimizer's state; see `carry`.
        check_after: steps between a cut and its examination; by default half the distance between cuts.
        on_setback: after a roll-back ``"halve"`` the next cut, or ``"stop"`` cutting.
        scheduler: learning rate scheduler, rolled back with the rest.
        scaler: gradient scaler, likewise.
        followers: averaged copies of the model (`torch.optim.swa_utils.AveragedModel`); what a cut changes in the
            model, it sets in them to the model's new values, where averaging starts again (an average over all steps
            counts them from there).
        rewind: a roll-back turns back time as well. False where a host counts the steps: then only what was learnt
            goes back (weights, the optimizer's state, averages), and steps, learning rates, scaler and random state
            go on.

    Attributes:
        history: what was done, an `Event` each.
        clock: times of the steps, phase by phase; see `savings`.

    Raises:
        InvalidRankRuleError: contradicting or impossible arguments.
        UnsupportedModelError: nothing in the model can be reduced.
        UnsupportedOptimizerError: the optimizer's state cannot be carried over, or a parameter that cuts change is not
            in it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        total_steps: int,
        *,
        tolerance: float | None = None,
        states: int | None = None,
        fraction: float | None = None,
        max_error: float | None = None,
        total_states: int | None = None,
        max_drop: float | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        multiple_of: int = 1,
        min_reduction: float = 0.05,
        per_layer: bool = False,
        cuts: int = 4,
        window: float = 0.1,
        start: int = 0,
        when: When = "schedule",
        method: Method = "real",
        selection: Selection = "hankel",
        carry: Carry = "transform",
        check_after: int | None = None,
        on_setback: OnSetback = "halve",
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        followers: Sequence[nn.Module] = (),
        rewind: bool = True,
    ) -> None:
        given = [value is not None for value in (tolerance, states, fraction, max_error, total_states)]
        if max_drop is None and not any(given):
            raise InvalidRankRuleError(
                "say how far to cut: tolerance=0.02 for example, or max_drop=0.002 with evaluate="
            )
        if max_drop is not None and evaluate is None:
            raise InvalidRankRuleError(
                "max_drop needs evaluate: a function of the model that returns the validation metric"
            )
        _require("max_drop", max_drop, max_drop is None or (math.isfinite(max_drop) and max_drop >= 0), "at least 0")
        _require("total_steps", total_steps, total_steps >= 1, "at least 1")
        _require("cuts", cuts, cuts >= 1, "at least 1")
        _require("window", window, 0 < window <= 1, "a share in (0, 1]")
        _require("start", start, start >= 0, "at least 0")
        _require("check_after", check_after, check_after is None or check_after >= 1, "at least 1")
        check_choice("when", when, When)
        check_choice("method", method, Method)
        check_choice("selection", selection, Selection)
        check_choice("carry", carry, Carry)
        check_choice("on_setback", on_setback, OnSetback)
        self.model = model
        self.optimizer = unwrap_optimizer(optimizer)
        self.total_steps, self._start = total_steps, start
        self.max_drop = max_drop
        self.evaluate = evaluate
        self.when: When = when
        self.method: Method = method
        self.selection: Selection = selection
        self.carry: Carry = carry
        self.on_setback: OnSetback = on_setback
        self.followers, self.rewind = tuple(followers), rewind
        self._training = Training(model, self.optimizer, self.followers, scheduler, scaler)
        self._aggressiveness = 1.0
        self._rule = RankRule(
            tolerance=tolerance if any(given) else _CAUTIOUS_TOLERANCE,
            states=states,
            fraction=fraction,
            max_error=max_error,
            total_states=total_states,
            multiple_of=multiple_of,
            min_reduction=min_reduction,
            max_reduction=1.0 if any(given) else _CAUTIOUS_REDUCTION,
            per_layer=per_layer,
        )
        self.cut_steps = cut_steps(total_steps, cuts, window, start)
        if self.cut_steps[-1] > total_steps:
            raise InvalidRankRuleError(
                f"the last of {cuts} cuts would come at step {self.cut_steps[-1]}, after total_steps={total_steps}: "
                "lower start, window or cuts"
            )
        distance = self.cut_steps[0] - start
        self.check_after = check_after if check_after is not None else max(1, distance // 2)
        if max_drop is not None and self.cut_steps[-1] + self.check_after > total_steps:
            raise InvalidRankRuleError(
                f"the last cut, at step {self.cut_steps[-1]}, would be examined {self.check_after} steps later, after "
                f"total_steps={total_steps}: lower start, window or check_after"
            )
        self._probe_every = max(1, distance // 10)
        layers = find_layers(model)
        plain = {name: layer for name, (layer, _) in layers.items()}
        check_plain(plain)
        check_optimizer(self.optimizer, plain, carry)
        check_trained(self.optimizer, layers)
        self._initial_dims = state_dims(model)
        alike = [] if per_layer else [name for name, (_, adapter) in layers.items() if adapter.uniform]
        check_sizes(self._rule, self._initial_dims, alike)
        self._steps = 0
        self._cuts_done = 0
        self._stopped = False
        self._postponed = 0  # no cut before this step
        self._best: float | None = None
        self._observed: dict[str, Any] | None = None  # the snapshot before a cut that is under observation
        self._probe: dict[str, AnyBalancing] = {}
        self._statistics = Statistics(model)
        self._observe_every = min(8, self._probe_every)
        self._observe()
        self._graphs = 0  # compiled so far, since the first cut
        self.clock = StepClock(self._initial_dims)
        self.history: list[Event] = []
        fit_any_size(model)
        for follower in self.followers:
            paired_layers(fit_any_size(follower), model)

    @property
    def state_dims(self) -> dict[str, int]:
        """Present state dimension of every layer, by its name in the model."""
        return state_dims(self.model)

    @property
    def done(self) -> bool:
        """Whether no more cut will be made and none is under observation."""
        return self._observed is None and (self._stopped or self._cuts_done >= len(self.cut_steps))

    @property
    def observing(self) -> bool:
        """Whether a cut is under observation, and may still be rolled back."""
        return self._observed is not None

    def savings(self, cpu: bool = False) -> Savings | None:
        """What the cuts have saved so far, by the times of the steps before and after them.

        Args:
            cpu: by computing time instead of the clock, for machines with other work.

        Returns:
            an estimate, see `Savings`; None before there are times on both sides of a cut.
        """
        return savings(self.clock.phases, sum(event.seconds for event in self.history), cpu, self._steps)

    def measure(self, loss: Callable[[nn.Module], Tensor]) -> StepCost:
        """Count what a step of the present size takes, on a copy of the model, for `savings` to tell of.

        Call it once before training and again after a cut.

        Args:
            loss: ``loss(model)`` returns the scalar that is differentiated, on a batch of the training's size.
        """
        cost = step_cost(self.model, loss)
        self.clock.measured(cost)
        return cost

    def step(self) -> Event | None:
        """Count one training step; cut, examine or roll back if it is time. Call it after ``optimizer.step()``.

        Returns:
            what was done; None at most steps. After ``"rolled_back"`` the weights, optimizer, scheduler, scaler and
            random state are those of ``event.restored_step``; a loop that counts steps itself should go back to that
            number.

        Raises:
            InvalidSystemError: at a cut, parameters or data that are not finite.
            UnsupportedModelError: at a cut, a selective layer that no data have passed through.
            UnsupportedOptimizerError: at a cut, state whose meaning is not known.
            EvaluationError: ``evaluate`` raised, or returned no number.

        After an error all is as it was before, and what was due is due at the next call.
        """
        self.clock.end()
        self._steps += 1
        problems = self._statistics.problems() if self._steps == 1 else []
        if problems and not self._statistics.dropped:  # at a cut it would be an error, after much work
            warnings.warn(problems[0], stacklevel=2)
        self._count_recompilations()
        try:
            event = self._act()
        finally:  # after an error too, what was due is due at the next step
            self._observe()
            self.clock.begin()
        return event

    def _act(self) -> Event | None:
        """Cut, examine or roll back if it is time, and write it down."""
        event = None
        if self._observed is not None:
            if self._steps >= self._observed["step"] + self.check_after:
                event = self._examine(self._observed)
        elif not self.done and self._time_to_cut():
            event = self._cut()
        if event is not None:
            self.history.append(event)
            log.info("%s", event)
        return event

    def _observe(self) -> None:
        """Have the selective layers observed in the coming step, if it is time and a cut may still come."""
        due = self._steps % self._observe_every == 0 or bool(self._statistics.unseen)
        if due and not self._stopped and self._cuts_done < len(self.cut_steps):
            self._statistics.observe_next(when=f"step {self._steps + 1}")
        else:
            self._statistics.close()

    def _count_recompilations(self) -> None:
        """A line in the history if graphs were compiled since the last step, and cuts had been made by then."""
        new = graphs_compiled() - self._graphs if self._graphs else 0
        if new > 0:
            self._graphs += new
            self.history.append(Event("recompiled", self._steps, graphs=new))
            log.info("%s", self.history[-1])

    def _shapes_changed(self) -> None:
        """Tell everyone who holds on to the shapes of parameters."""
        self.clock.resize(self.state_dims)
        rebuild_replicas(self.model)
        self._graphs = graphs_compiled()
        if self._graphs:
            allow_recompilation()
            log.info("the shapes of parameters have changed: compiled graphs are compiled anew at their next use")

    def _time_to_cut(self) -> bool:
        if self._postponed and self._steps + self.check_after > self.total_steps:
            self._stopped = True  # what was put off can no longer be examined
        if self._stopped or self._steps < self._postponed:
            return False
        scheduled = self.cut_steps[self._cuts_done]
        if self._steps >= scheduled or self.when == "schedule":
            return self._steps >= scheduled
        if self._steps < self._start or self._steps % self._probe_every:
            return False
        before, self._probe = self._probe, balance_layers(self.model, self.method, self._statistics.moments())
        changes = spectrum_changes(before, self._probe)
        settled = bool(changes) and len(changes) == len(self._probe) and all(c.settled(0.02) for c in changes.values())
        return from_first_rank(lambda: settled)

    def _cut(self) -> Event:
        reference = None
        if self.max_drop is not None:
            metric = self._evaluate()
            if not math.isfinite(metric):
                return self._postpone(metric)
            reference = metric if self._best is None else max(self._best, metric)
        moments = self._statistics.moments()  # sums over all ranks

        def decide() -> Plan:
            plan = plan_reduction(self.model, self._rule_now(), self.method, moments=moments, selection=self.selection)
            return plan.with_errors(errors_on_samples(self.model, plan.changes, self._statistics.samples)).cpu()

        plan = from_first_rank(decide)
        before = None
        if plan.changes and self.max_drop is not None:
            before = {
                "step": self._steps,
                "reference": reference,
                "state_dims": self.state_dims,
                "moments": self._statistics.state_dict(),
                **self._training.snapshot(),
            }
        report = plan.apply(self.model, self.optimizer, self.carry) if plan.changes else plan.report
        # An error so far has changed nothing: the cut is due at the next step again.
        self._cuts_done += 1
        self._probe, self._observed = {}, before
        self._best = self._best if reference is None else reference
        if not plan.changes:
            return self._event("unchanged", report, reference)
        for follower in self.followers:
            follow(follower, self.model, plan.changes)
        self._statistics.reset()
        self._shapes_changed()
        return self._event("cut", report, reference)

    def _postpone(self, metric: float) -> Event:
        """No cut now, since no later metric could be held against this one; soon again, while there is time."""
        self._postponed = self._steps + self._probe_every
        self._stopped = self._postponed + self.check_after > self.total_steps
        again = "no more cuts are made" if self._stopped else f"it is tried again at step {self._postponed}"
        warn_not_finite(metric, f"at step {self._steps}, before a cut, and no cut can be held against that: {again}")
        return Event("postponed", self._steps, metric=metric)

    def _rule_now(self) -> RankRule:
        """The rule for the cut that is due: sizes are approached geometrically, and setbacks make it milder."""
        rule, mildness = self._rule, self._aggressiveness
        if rule.guarantees_error:
            rule = replace(rule, max_reduction=rule.max_reduction * mildness)
        if rule.tolerance is not None:
            return replace(rule, tolerance=rule.tolerance * mildness)
        if rule.max_error is not None:
            return replace(rule, max_error=rule.max_error * mildness)
        share = mildness / (len(self.cut_steps) - self._cuts_done)  # of what is left of the way
        dims = self.state_dims.values()
        if rule.fraction is not None:
            left = rule.fraction * sum(self._initial_dims.values()) / sum(dims)
            return replace(rule, fraction=min(1.0, left) ** share)
        if rule.states is not None:
            return replace(rule, states=towards(max(dims), rule.states, share))
        assert rule.total_states is not None
        return replace(rule, total_states=towards(sum(dims), rule.total_states, share))

    def _examine(self, before: dict[str, Any]) -> Event:
        assert self.max_drop is not None
        metric, reference = self._evaluate(), float(before["reference"])
        self._observed = None
        if not math.isfinite(metric):
            warn_not_finite(metric, f"at step {self._steps}, after a cut, which is therefore undone")
        elif metric >= reference - self.max_drop:
            self._best = max(reference, metric)
            return Event("kept", self._steps, metric=metric, reference=reference)
        at, started = self._steps, time.perf_counter()
        self._training.restore(before, self.rewind)
        self._statistics.load_state_dict(before["moments"])
        self._shapes_changed()
        if self.rewind:
            self._steps = int(before["step"])
        self._aggressiveness /= 2
        too_small = self._rule.max_reduction * self._aggressiveness < self._rule.min_reduction
        too_late = self._steps + self.check_after >= self.total_steps  # to examine another cut; hosts may not rewind
        if self.on_setback == "stop" or too_small or too_late:
            self._stopped = True
        elif self._rule.guarantees_error:
            # What the cut was to take is still there: the milder one is due at the next chance, not an interval later.
            self._cuts_done = max(0, self._cuts_done - 1)
        seconds = time.perf_counter() - started
        return Event("rolled_back", at, seconds, metric=metric, reference=reference, restored_step=before["step"])

    def _evaluate(self) -> float:
        assert self.evaluate is not None
        return measure_together(self.model, self.evaluate)

    def _event(self, kind: str, report: Report, reference: float | None) -> Event:
        layers = tuple(layer.to_dict() for layer in report.layers)
        return Event(kind, self._steps, report.seconds, layers, reference=reference)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on in the middle of a schedule or of an observation.

        Nested dicts and lists of tensors, numbers and strings.
        """
        return {
            "format": 1,
            "steps": self._steps,
            "cuts_done": self._cuts_done,
            "stopped": self._stopped,
            "postponed": self._postponed,
            "aggressiveness": self._aggressiveness,
            "best": self._best,
            "state_dims": self.state_dims,
            "observed": self._observed,
            "probe": {name: snapshot_state(balancing) for name, balancing in self._probe.items()},
            "moments": self._statistics.state_dict(),
            "samples": {name: [one.hidden, one.present] for name, one in self._statistics.samples.items()},
            "history": [event.to_dict() for event in self.history],
            "phases": self.clock.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up where `state_dict` was called.

        The model's layers are given the saved state dimensions first; load the model's and the optimizer's own state
        dicts after this, when their shapes fit.

        Raises:
            CheckpointError: of another format, or of another model.
        """
        if state_dict.get("format") != 1:
            raise CheckpointError(
                f"compressor state of format {state_dict.get('format')!r}; this version reads format 1"
            )
        resized = self.state_dims != state_dict["state_dims"]
        resize_states(self.model, state_dict["state_dims"])
        if resized:
            forget_sizes(self.optimizer)
            rebuild_replicas(self.model)
        self._steps = int(state_dict["steps"])
        self._cuts_done = int(state_dict["cuts_done"])
        self._stopped = bool(state_dict["stopped"])
        self._postponed = int(state_dict.get("postponed", 0))
        self._aggressiveness = float(state_dict["aggressiveness"])
        self._best = state_dict["best"]
        self._observed = state_dict["observed"]
        self._probe = {n: snapshot(state, self.method) for n, state in state_dict["probe"].items()}
        self._statistics.load_state_dict(state_dict["moments"])
        self._statistics.samples = {name: Sample(*one) for name, one in state_dict.get("samples", {}).items()}
        self._observe()
        self.history = [Event.from_dict(event) for event in state_dict["history"]]
        self.clock.load_state_dict(state_dict["phases"])


def _require(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise InvalidRankRuleError(f"{name} must be {expected}; got {value!r}")
