"""The Compressor: cuts a model while it trains, examines each cut, and undoes those that did harm."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.cutting.carry import Carry, Together, unwrap_optimizer
from compressm.cutting.choosing import Which, choose
from compressm.cutting.metrics import Better
from compressm.cutting.spectrum import snapshot, snapshot_state
from compressm.errors import CheckpointError
from compressm.observing.loss_evidence import Gramians
from compressm.observing.observer import Terms
from compressm.theory.balancing import Method
from compressm.theory.selection import Selection
from compressm.theory.targets import Target
from compressm.training.clock import Savings, StepClock, savings
from compressm.training.cushion import Cushion, OnSetback
from compressm.training.cutter import Cutter
from compressm.training.delegated import attribute_of as _of
from compressm.training.goal import Goal, initial_dims, initial_dims_of, wanted_rule
from compressm.training.history import Cut, Event, Recompiled, RolledBack, history_line, history_table
from compressm.training.options import check_options
from compressm.training.policy import Policy
from compressm.training.schedule import Schedule, When
from compressm.training.snapshot import Schedulers, Stateful, Training
from compressm.training.step_cost import StepCost, step_cost
from compressm.training.steps import StepWatch, factor_of_loss, scale_of, warn_of_scaler
from compressm.training.twin import Control, TrainStep, check_for_twin

log = logging.getLogger(__name__)


class Compressor:
    """Shrinks the state space layers of a model during training.

    Change

        optimizer.step()

    to

        optimizer.step()
        compressor.step()

    By default it makes 4 equidistant cuts in the first tenth of the training steps, as in the CompreSSM paper. With
    ``evaluate`` and ``max_drop`` every cut is examined some steps later. If it cost more of the metric than
    ``max_drop``, and more than noise explains, it is undone exactly, and the next one discards half as much.

    A metric that climbs steeply hides what a cut will cost in the end. With ``max_drop`` alone a cut therefore discards
    2 % of a layer's Hankel energy and half of its states at most, however good the metric is.

    A `Schedule` decides when cuts come, a `Goal` how far each goes, and a `Cushion` what happens if one hurts. The page
    docs/options.md lists the options by these parts.

    Args:
        model: the model, trained by ``optimizer``.
        optimizer: the optimizer, a wrapper with one in ``.optimizer``, or a list if several train the model. The page
            docs/carry.md says which work; all others are refused here.
        total_steps: planned number of optimizer steps.
        tolerance: share of a layer's Hankel energy that each cut may discard (tau in the paper).
        states: state dimension to arrive at with the last cut; the cuts before approach it geometrically.
        fraction: share of the states at the start to arrive at with the last cut.
        max_error: H-infinity error that each cut may make in a layer, in units of output per input.
        total_states: states of all layers together to arrive at with the last cut.
        max_loss: rise of the loss that each cut may cost, in nats per prediction, predicted before it is made. Needs
            ``gramians="loss"``. One of these six or ``max_drop`` is needed.
        max_drop: how much of the metric a cut may cost, in the metric's own units (0.002 is 0.2 points of an accuracy
            in [0, 1]). A cut that cost more, and more than noise explains, is undone; see docs/cushion.md. Without one
            of the six rules above, a cut discards what ``tolerance=0.02`` allows.
        evaluate: ``evaluate(model)`` returns the validation metric: a number; or one score per validation example,
            always the same ones in the same order, which are then compared in pairs. Needed for ``max_drop``, which
            calls it about six times per cut. Without ``max_drop`` it is called before and after each cut, for the
            history.
        mode: ``"max"`` if a higher metric is better, ``"min"`` if a lower one is, such as a loss or perplexity.
        multiple_of: prefer state dimensions that are a multiple of this; see `RankRule` for what comes first.
        min_reduction: cut a layer only where this share of its states goes.
        max_reduction: remove at most this share of a layer's states in one cut. By default half under ``tolerance``,
            ``max_error``, ``max_loss`` and ``max_drop``, in every family of layers, and no limit under ``states``,
            ``fraction`` and ``total_states``.
        per_layer: let the layers of a Hugging Face model differ in their state dimension; see `RankRule`.
        target: cut to sizes only that these kernels or this server take; see docs/serving.md.
        layers: cut these layers only: a name, a glob, a list of these, or a function of a layer's name and the layer.
        exclude: leave these layers as they are, and ask nothing of them; as ``layers``.
        cuts: how many cuts.
        window: share of ``total_steps`` in which they are made.
        start: steps to wait before the window.
        when: ``"schedule"`` cuts at fixed steps; ``"settled"`` probes the spectrum at those steps, and at nine more
            between each two, and cuts as soon as it holds still (less than 2 % of the Hankel energy moved since the
            probe before), or at the scheduled step at the latest.
        method: ``"real"`` or ``"complex"`` truncation of linear time-invariant layers; see
            `compressm.theory.balancing`.
        selection: how states of selective layers are picked; see `compressm.theory.selection`. What those layers do
            with the data is observed at every eighth step while cuts are pending, on one sequence of the batch.
        gramians: ``"white"`` balances time-invariant layers under white noise; ``"loss"`` by their states on the data
            and the gradients of the loss, which the training's own backward passes give, on four sequences of each of
            the last 50 batches before a cut. It also picks the states of selective layers by the loss where that does
            less damage, and predicts what cuts cost.
        loss_terms: how the loss of a batch is computed, for ``gramians="loss"``: ``"sequences"``, the mean over its
            sequences; ``"tokens"``, the mean over its tokens, as in language models; or ``"sum"`` over its sequences.
        loss_scale: factor by which the loss is multiplied before ``backward``, such as 1 over the number of accumulated
            batches, for ``gramians="loss"``. The factor of ``scaler`` is known and comes on top.
        match_steps: steps of Adam in which cut time-invariant layers learn the old layers' outputs on recorded inputs,
            before a cut is written, for ``gramians="loss"``; see docs/loss.md.
        carry: what becomes of the optimizer's state; see `compressm.cutting.carry`.
        check_after: steps between a cut and its first examination; by default half the distance between cuts. Up to two
            more examinations follow, each half as many steps later.
        on_setback: after a roll-back ``"halve"`` the next cut, which comes ``check_after`` steps later at the earliest,
            or ``"stop"`` cutting. A cut that is kept doubles the next one again, up to the full size.
        scheduler: learning rate scheduler, or a list of several, rolled back with the rest.
        scaler: gradient scaler, rolled back with the rest.
        followers: averaged copies of the model (`torch.optim.swa_utils.AveragedModel`). What a cut changes in the
            model, it sets in them to the model's new values. Averaging starts again there; an average over all steps
            counts them from there.
        rewind: a roll-back turns back time as well. False where a host counts the steps: then only what was learnt goes
            back (weights, the optimizer's state, averages), and steps, learning rates, scaler and random state go on.
        control: with what a cut is compared. ``"trend"``: the course of the metric before it, which goes on.
            ``"twin"``: the uncut model, which trains on beside it on the same batches until the cut is judged. Needs
            ``train_step`` and the batch in ``compressor.step(batch)``, in a loop of your own in one process.
        train_step: ``train_step(model, optimizer, batch)`` makes one training step, as your loop does, with the model
            and the optimizer that it is given. Only ``control="twin"`` calls it, for the twin.

    Attributes:
        history: what was done, an `Event` each.
        clock: times of the steps, phase by phase; see `savings`.
        cut_steps: the steps after which cuts are scheduled.
        initial_dims: state dimension of every layer before the first cut; ``fraction`` is relative to these.

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
        max_loss: float | None = None,
        max_drop: float | None = None,
        evaluate: Callable[[nn.Module], Any] | None = None,
        mode: Better = "max",
        multiple_of: int = 1,
        min_reduction: float = 0.05,
        max_reduction: float | None = None,
        per_layer: bool = False,
        target: Target | None = None,
        layers: Which | None = None,
        exclude: Which | None = None,
        cuts: int = 4,
        window: float = 0.1,
        start: int = 0,
        when: When = "schedule",
        method: Method = "real",
        selection: Selection = "hankel",
        gramians: Gramians = "white",
        loss_terms: Terms = "sequences",
        loss_scale: float = 1.0,
        match_steps: int = 0,
        carry: Carry = "transform",
        check_after: int | None = None,
        on_setback: OnSetback = "halve",
        scheduler: Schedulers | None = None,
        scaler: Stateful | None = None,
        followers: Sequence[nn.Module] = (),
        rewind: bool = True,
        control: Control = "trend",
        train_step: TrainStep | None = None,
    ) -> None:
        check_options(locals())
        rule = wanted_rule(
            tolerance=tolerance, states=states, fraction=fraction, max_error=max_error, total_states=total_states,
            max_loss=max_loss, multiple_of=multiple_of, min_reduction=min_reduction, max_reduction=max_reduction,
            per_layer=per_layer, target=target,
        )  # fmt: skip
        self._schedule = Schedule(total_steps, cuts, window, start, when, check_after, examined=max_drop is not None)
        choice = choose(model, layers, exclude, per_layer)
        with choice.scope():
            self._cutter = Cutter(
                model, unwrap_optimizer(optimizer), tuple(followers), rule,
                method, selection, carry, gramians, loss_terms, match_steps,
            )  # fmt: skip
        self._cutter.choice = choice
        training = Training(model, self.optimizer, self.followers, scheduler, scaler)
        self._cushion = Cushion(
            training, self._cutter.observations,
            max_drop=max_drop, evaluate=evaluate, mode=mode, on_setback=on_setback, rewind=rewind,
            control=control, train_step=train_step,
        )  # fmt: skip
        self.initial_dims = initial_dims(self.state_dims)
        goal = Goal(rule, sum(self.initial_dims.values()))
        self._policy = Policy(self._schedule, goal, self._cushion, self._cutter)
        self._steps, self._loss_scale, self._scaler = 0, loss_scale, scaler
        self._watch = StepWatch(self.optimizer, self._cutter.resized_parameters, self._cutter.layers())
        self.clock = StepClock(self.state_dims)
        self.history: list[Event] = []
        weakref.finalize(self, self._cutter.observations.close).atexit = False
        self._observe()
        self._cutter.free_sizes()

    # The arguments are stored in the parts.
    model: nn.Module = _of("_cutter", "model")
    optimizer: Optimizer | Together = _of("_cutter", "optimizer")
    followers: tuple[nn.Module, ...] = _of("_cutter", "followers")
    method: Method = _of("_cutter", "method")
    selection: Selection = _of("_cutter", "selection")
    carry: Carry = _of("_cutter", "carry")
    total_steps: int = _of("_schedule", "total_steps")
    cut_steps: tuple[int, ...] = _of("_schedule", "cut_steps")
    when: When = _of("_schedule", "when")
    check_after: int = _of("_schedule", "check_after")
    max_drop: float | None = _of("_cushion", "max_drop")
    evaluate: Callable[[nn.Module], Any] | None = _of("_cushion", "evaluate")
    mode: Better = _of("_cushion", "mode")
    on_setback: OnSetback = _of("_cushion", "on_setback")
    rewind: bool = _of("_cushion", "rewind")

    @property
    def state_dims(self) -> dict[str, int]:
        """Present state dimension of every layer, by its name in the model."""
        return self._cutter.state_dims

    def __repr__(self) -> str:
        coming = () if self._schedule.over else self.cut_steps[self._schedule.cuts_done :]
        return f"Compressor({history_line(self._steps, self.total_steps, coming, self.state_dims)})"

    def _repr_html_(self) -> str:
        return history_table(self._steps, self.state_dims, self.history)

    @property
    def done(self) -> bool:
        """Whether no more cut will be made and none is under observation."""
        return not self.observing and self._schedule.over

    @property
    def observing(self) -> bool:
        """Whether a cut is under observation, and may still be rolled back."""
        return self._cushion.observed is not None

    def savings(self, cpu: bool = False) -> Savings | None:
        """Estimate what the cuts have saved so far, from the times of the steps before and after them.

        Args:
            cpu: use CPU time instead of wall-clock time, for machines that run other programs.

        Returns:
            an estimate, see `Savings`; None until steps before and after a cut have been timed.
        """
        return savings(self.clock.phases, sum(event.seconds for event in self.history), cpu, self._steps)

    def measure(self, loss: Callable[[nn.Module], Tensor]) -> StepCost:
        """Measure the cost of a step at the present size, on a copy of the model. `savings` reports it.

        Call it once before training and again after a cut.

        Args:
            loss: ``loss(model)`` returns the scalar that is differentiated. Use a batch of the training's size.
        """
        cost = step_cost(self.model, loss)
        self.clock.measured(cost)
        return cost

    def step(self, batch: Any = None) -> Event | None:
        """Count one training step; cut, examine or roll back if it is time. Call it after ``optimizer.step()``.

        Calls without an optimizer step do nothing and are not counted: while gradients are accumulated, and when a
        gradient scaler has skipped the step.

        Args:
            batch: what this step was made with, needed for ``control="twin"``: ``train_step`` gets it for the twin.

        Returns:
            what was done; None at most steps. After ``"rolled_back"`` the weights, optimizer, scheduler, scaler and
            random state are those of ``event.restored_step``; a loop that counts steps itself should go back to that
            number. Where an uncut twin takes the cut model's place, that is the present step.

        Raises:
            InvalidRankRuleError: ``control="twin"``, and no batch was passed, the optimizer made no step, or
                ``train_step`` did not use its arguments.
            InvalidSystemError: at a cut, parameters or data that are not finite.
            UnsupportedModelError: at a cut, a selective layer that no data have passed through; at the first step, a
                model that was sharded after the Compressor was built.
            UnsupportedOptimizerError: at a cut, state whose meaning is not known; or an optimizer that the Compressor
                was not built with trains what cuts change.
            EvaluationError: ``evaluate`` raised, or returned no number.

        After an error nothing has changed, and the cut or examination that was due is due again at the next step.
        """
        made = self._watch.made(guarded=not self.done)
        if self._cushion.control == "twin":
            check_for_twin(batch, made)
        if not made:
            if scale_of(self._scaler) != self._scale:  # it has skipped a step, whose gradients could not be observed
                self._observe()
            return None
        if self._steps == 0:
            self._cutter.check_first_step()
        self.clock.end(self._observed)
        self._cushion.follow(batch)
        self._steps += 1
        if self._steps == 1:
            warn_of_scaler(self._scaler, self._cutter.observations.observer is not None)
        if graphs := self._cutter.new_graphs():
            self._note(Recompiled(self._steps, graphs=graphs))
        try:
            events = self._policy.act(self._steps)
            for event in events:
                self._note(event)
        finally:  # after an error the cut is due again at the next step, which needs its observations
            self._watch.forget()
            self._observe()
            self.clock.begin()
        if self._steps == self.total_steps and self.max_drop is None:
            self._say_what_is_not_known()
        return events[0] if events else None

    def _say_what_is_not_known(self) -> None:
        """At the end of a training whose cuts were not examined."""
        if any(isinstance(event, Cut) for event in self.history):
            log.info(
                "step %d: end; what the cuts cost cannot be said: max_drop and evaluate were not given", self._steps
            )

    def _note(self, event: Event) -> None:
        """Append an event to the history, and adjust the number of steps and the clock to it."""
        if isinstance(event, RolledBack) and self.rewind:
            self._steps = event.restored_step
        self.clock.resize(self.state_dims)
        self.history.append(event)
        log.info("%s", event)

    def _observe(self) -> None:
        """Have the layers observed in the coming step, if a cut will need it."""
        steps, schedule, self._scale = self._steps, self._schedule, scale_of(self._scaler)
        # The factor is asked for in the backward pass: until then a scaler may be restored, or updated.
        factor = partial(factor_of_loss, self._loss_scale, self._scaler)
        states, gradients = schedule.observes(steps, self._cutter.unseen), schedule.observes_gradients(steps)
        self._observed = self._cutter.observations.observe(states, gradients, steps + 1, factor)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on, in nested dicts and lists of tensors, numbers and strings."""
        return {
            "format": 1,
            "steps": self._steps,
            "initial_dims": dict(self.initial_dims),
            **self._schedule.state_dict(),
            **self._cushion.state_dict(),
            **self._cutter.state_dict(),
            "probe": {name: snapshot_state(balancing) for name, balancing in self._schedule.probe.items()},
            "history": [event.to_dict() for event in self.history],
            "phases": self.clock.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from the point where `state_dict` was called.

        This gives the model's layers the saved state dimensions. Load the model's and the optimizer's own state dicts
        afterwards, when their shapes fit.

        Raises:
            CheckpointError: of another format, or of another model.
        """
        if state_dict.get("format") != 1:
            raise CheckpointError(
                f"compressor state of format {state_dict.get('format')!r}; this version reads format 1"
            )
        self._cutter.load_state_dict(state_dict)
        self.initial_dims = initial_dims_of(state_dict)
        self._schedule.load_state_dict(state_dict)
        self._schedule.probe = {name: snapshot(state, self.method) for name, state in state_dict["probe"].items()}
        self._cushion.load_state_dict(state_dict)
        self._steps = int(state_dict["steps"])
        self._watch.forget()
        self._observe()
        self.history = [Event.from_dict(event) for event in state_dict["history"]]
        self._policy.resume(sum(self.initial_dims.values()), self.history)
        self.clock.load_state_dict(state_dict["phases"])


__all__ = ["Compressor"]
