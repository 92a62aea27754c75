"""The training loop: every step, cut, evaluation and checkpoint of a run, resumable after a kill at any instant.

A run's folder holds ``checkpoints/`` (everything that training needs to go on), ``tensorboard/``, and at the end
``model/`` and ``result.json``. A step is a pure function of the checkpointed state and of the step's number, so that a
resumed run ends with the weights of an unbroken one, on the CPU to the last bit.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from compressm import __version__
from compressm.cutting import state_dims
from compressm.cutting.optimizers import unwrap_optimizer
from compressm.errors import ConfigError
from compressm.lab.config import Config
from compressm.lab.data.datasets import load_data
from compressm.lab.data.sequences import BatchOrder, SequenceData, Split
from compressm.lab.runs.energy import Energy
from compressm.lab.runs.folder import checkpoints_in, prepare
from compressm.lab.runs.logs import RunLog, TensorBoard, Tracker, WeightsAndBiases
from compressm.lab.runs.models import build_compressor, build_optimizer, build_scheduler, model_for
from compressm.lab.runs.objective import Objective
from compressm.lab.runs.origin import checkpoint_to_begin_with
from compressm.lab.runs.place import accelerator, device_name, memory_told
from compressm.lab.runs.result import RunResult
from compressm.lab.runs.same_settings import check_same, check_same_data
from compressm.lab.runs.spectra import SpectrumLog
from compressm.lab.runs.tasks import Quality, learning_of, sums_on
from compressm.lab.runs.timers import Timers
from compressm.observing.scores import better
from compressm.runtime.files import write_json
from compressm.runtime.memory import keep_freed_memory
from compressm.runtime.processor import processor_name
from compressm.runtime.random_state import rng_state, seed_all, set_rng_state
from compressm.saving.checkpoint import load, save
from compressm.training.clock import StepClock, savings
from compressm.training.history import Cut, Event, RolledBack
from compressm.training.step_cost import step_cost

_Batch = tuple[Tensor, Tensor, Tensor | None, int]  # sequences, labels, lengths where padded, step


def train(
    config: Config,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    origin: str | Path | None = None,
    command: str | None = None,
    quiet: bool = False,
) -> RunResult:
    """Run a configuration from start to end, or take it up where it stopped.

    Args:
        config: from `load_config`.
        output: the run's folder; before ``run.output``, before ``runs/<data>-seed<seed>``.
        resume: go on from the folder's last checkpoint. Without one, start; after the end, return the result.
        origin: the folder of a run with the same settings but without compression, whose steps before the first cut
            need not be made again: the run starts from its last checkpoint before that cut, and ends as if it had made
            those steps itself.
        command: the exact command line, for the record.
        quiet: nothing on the terminal.

    Raises:
        ConfigError: unfit data, a folder that holds another run, an ``origin`` that does not fit, or training that
            diverged.
        CheckpointError: a damaged checkpoint.
    """
    folder = Path(output or config.run.output or f"runs/{config.data.name or 'own'}-seed{config.run.seed}")
    finished = prepare(folder, config, resume)
    if finished is not None:
        return finished
    keep_freed_memory()
    threads = torch.get_num_threads()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    try:
        return _Run(config, folder, resume, None if origin is None else Path(origin)).run(command, quiet)
    finally:
        torch.set_num_threads(threads)


class _Run:
    """One run in one process: its state, which changes from step to step, and what a step does."""

    def __init__(self, config: Config, folder: Path, resume: bool, origin: Path | None) -> None:
        self.config, self.folder = config, folder
        self.accelerator = accelerator(config.run)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.data: SequenceData = load_data(config.data).to(self.accelerator.device)
        self.learning = learning_of(self.data.task, config.run.metric)
        self.objective = Objective(config.loss, self.accelerator.device, self.learning, config.run.autocast)
        self.order = BatchOrder(len(self.data.train), config.run.batch_size, config.run.seed)
        self._build()
        self.step = 0
        self.loss = torch.tensor(math.nan)
        self.curve: list[dict[str, Any]] = []
        self.best: float | None = None
        self.timers = Timers(self.accelerator.device)
        self.spectra = SpectrumLog(config.compression.method)
        self.energy = Energy(config.run.energy)
        self.checkpoints = checkpoints_in(folder, config)
        self.damaged: list[str] = []
        self._begin(resume, origin)
        self.wrapped: nn.Module = self.accelerator.prepare_model(self.model)

    def _build(self) -> None:
        """Model, optimizer, schedule, compressor, and the clock of the steps."""
        config, data = self.config, self.data
        seed_all(config.run.seed)
        self.model: nn.Module = model_for(config, data).to(self.accelerator.device)
        seed_all(config.run.seed + 1_000_003 * self.rank)  # the processes have the same weights and different dropout
        self.optimizer = build_optimizer(config.optimizer, self.model)
        self.scheduler = build_scheduler(config, self.optimizer)
        self.compressor = build_compressor(
            config, self.model, self.optimizer, self.scheduler, lambda one: self.quality(one, data.validation).score,
            self._learn, better(self.learning.metric), data.task,
        )  # fmt: skip
        self.clock = StepClock(state_dims(self.model)) if self.compressor is None else self.compressor.clock

    def _begin(self, resume: bool, origin: Path | None) -> None:
        """Go on from the last checkpoint, or from that of another run; otherwise start at step 0."""
        if resume and self.checkpoints.steps():
            tree, self.damaged = self.checkpoints.read()
            check_same(tree["config"], self.config, self.folder)
            self._restore(tree, self.folder)
        elif origin is not None:
            self._restore(checkpoint_to_begin_with(origin, self.config, self.model, self.compressor), origin)

    def run(self, command: str | None, quiet: bool) -> RunResult:
        """All remaining steps, the final evaluation, and the result."""
        run, main = self.config.run, self.accelerator.is_main_process
        trackers: list[Tracker] = []
        if main and run.tensorboard:
            trackers.append(TensorBoard(self.folder / "tensorboard", self.step))
        if main and run.wandb is not None:
            trackers.append(WeightsAndBiases(run.wandb, self.folder, self.config.model_dump(mode="json")))
        if not self.step:
            self._measure()
        with RunLog(run.steps, trackers, self.step, quiet or not main) as log, self.energy:
            if self.step:
                log.message("".join(f"{line}\n" for line in self.damaged) + f"resumed at step {self.step}")
            else:
                self._look_at_spectra(log)
            with self.timers.timed("train"), memory_told(run.batch_size, lambda: self.step):
                while self.step < run.steps:
                    self._advance(log)
            result = self._finish(command)
            log.message(f"done: {result}; see {self.folder}")
        return result

    def _advance(self, log: RunLog) -> None:
        """One training step and all that is due after it."""
        run = self.config.run
        batch = self._train_step()
        if run.log_every and self.step % run.log_every == 0:
            loss = float(self.loss)
            self._check_finite(loss)
            log.training(self.step, loss, self._rates())
        seen = 0 if self.compressor is None else len(self.compressor.history)
        event = self._compress(batch)
        if event is not None and self.compressor is not None:
            for one in self.compressor.history[seen:]:
                log.compression(one, state_dims(self.model))
        # A roll-back restores the model from before the cut, so spectra and accuracy of this step are computed again.
        last = self.step == run.steps
        self._look_at_spectra(log)
        if last or (run.eval_every and self.step % run.eval_every == 0):
            self._evaluate(log)
        undone = isinstance(event, RolledBack)
        if last or (run.checkpoint_every and self.step % run.checkpoint_every == 0 and not undone):
            self._checkpoint()

    def _train_step(self) -> _Batch:
        self.clock.begin()
        batch = (*self._batch(), self.step)
        self.loss = self._learn(self.wrapped, self.optimizer, batch)
        self.scheduler.step()
        self.step += 1
        return batch

    def _learn(self, model: nn.Module, optimizer: Any, batch: _Batch) -> Tensor:
        """One step of a model, which may be an uncut twin, by its optimizer, or its several; returns its loss."""
        u, y, lengths, step = batch
        optimizer = unwrap_optimizer(optimizer)
        model.train()
        loss = self.objective(model, u, y, step, lengths)
        self.accelerator.backward(loss)
        if self.config.optimizer.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def _fresh(self) -> nn.Module | None:
        """A model of the user's class as it was built, for `load`, which builds those of compressm itself."""
        return None if self.config.model.build is None else model_for(self.config, self.data)

    def _compress(self, batch: _Batch) -> Event | None:
        if self.compressor is None:
            self.clock.end()
            return None
        with self.timers.timed("reduction"):
            event = self.compressor.step(batch)
        if not isinstance(event, Cut | RolledBack):
            return event
        self.best = None  # weights of another size are no candidates for the result
        self._measure()
        if isinstance(event, RolledBack):
            self.step = event.restored_step
            for point in self.curve:
                if point["step"] == self.step:
                    self.loss = torch.tensor(point["loss"])
            self.curve = [point for point in self.curve if point["step"] < self.step]
            self.spectra.back_to(self.step)
        return event

    def _measure(self) -> None:
        """Count operations and memory of a step at the present size, in this process."""
        with self.timers.timed("evaluation"):
            u, y, lengths = self._batch()
            self.clock.measured(step_cost(self.model, lambda model: self.objective(model.train(), u, y, 0, lengths)))

    def _batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """This process's share of the present step's batch: sequences, labels, and lengths where they are padded."""
        indices = self.order.indices(self.step)[self.rank :: self.world].to(self.accelerator.device)
        return *self.data.batch(self.data.train, indices), self.data.lengths(self.data.train, indices)

    def _look_at_spectra(self, log: RunLog) -> None:
        every = self.config.run.spectrum_every
        if every and self.step % every == 0:
            with self.timers.timed("evaluation"):
                self.spectra.look(self.model, self.step)
                log.spectra(self.spectra.record[-1])

    def quality(self, model: nn.Module, split: Split) -> Quality:
        """How well a model does on a split, the same in all processes."""
        with self.timers.timed("evaluation"), torch.no_grad():
            if self.world > 1:  # every process has running statistics of its own share of the data
                for buffer in model.buffers():
                    broadcast(buffer)
            size = self.config.run.eval_batch_size
            sums = sums_on(self.learning, model, self.data, split, size, self.rank, self.world)
            return self.learning.quality(cast("torch.Tensor", self.accelerator.reduce(sums)).cpu())

    def _evaluate(self, log: RunLog) -> None:
        loss = float(self.loss)
        self._check_finite(loss)
        quality = self.quality(self.model, self.data.validation)
        dims = state_dims(self.model)
        self.curve.append(
            {
                "step": self.step,
                "loss": loss,
                f"validation_{quality.metric}": quality.score,
                "validation_loss": quality.loss,
                "lr": self._rates(),
                "state_dims": list(dims.values()),
                "train_seconds": self.timers.seconds["train"],
            }
        )
        value = quality.sign * quality.score
        if self.config.run.select == "best" and (self.best is None or value > self.best):
            self.best = value
            if self.accelerator.is_main_process:
                save(self.model, self.folder / "best")
        log.evaluation(self.step, quality, dims)

    def _rates(self) -> dict[str, float]:
        return {str(group["name"]): float(group["lr"]) for group in self.optimizer.param_groups}

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss) and not self._may_go_back:
            self._diverged(f"the loss is {loss}")

    @property
    def _may_go_back(self) -> bool:
        """Whether a cut is under observation. Its roll-back would also undo a divergence."""
        return self.compressor is not None and self.compressor.observing

    def _diverged(self, what: str) -> NoReturn:
        steps = self.checkpoints.steps()
        kept = f"; the checkpoint of step {steps[-1]} is from before that" if steps else ""
        raise ConfigError(
            f"optimizer.lr = {self.config.optimizer.lr}: training diverged, {what} at step {self.step}{kept}; lower it"
        )

    def _checkpoint(self) -> None:
        finite = all(bool(value.isfinite().all()) for value in self.model.state_dict().values())
        if not finite or not math.isfinite(float(self.loss)):
            if self._may_go_back:
                return  # the last good checkpoint is kept until it is known whether the cut is undone
            self._diverged("weights or loss are not finite")
        random_states = gather_object([rng_state()])
        if not self.accelerator.is_main_process:
            return
        tree = {
            "config": self.config.model_dump(mode="json"),
            "data": self.data.fingerprint,
            "step": self.step,
            "loss": self.loss,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "compressor": None if self.compressor is None else self.compressor.state_dict(),
            "rng": random_states,
            "curve": self.curve,
            "spectra": self.spectra.state_dict(),
            "best": self.best,
            "seconds": self.timers.seconds,
            "phases": self.clock.state_dict(),
            "energy": self.energy.used(self.step),
        }
        with self.timers.timed("checkpoint"):
            self.checkpoints.write(self.step, tree)

    def _restore(self, tree: Mapping[str, Any], folder: Path) -> None:
        check_same_data(tree, self.config, self.data, folder)
        if len(tree["rng"]) != self.world:
            raise ConfigError(
                f"--resume: the run in {folder} used {len(tree['rng'])} processes, not {self.world}; use as many"
            )
        if self.compressor is not None:  # first, since it gives the layers the sizes that the other states have
            self.compressor.load_state_dict(tree["compressor"])
        self.model.load_state_dict(tree["model"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.scheduler.load_state_dict(tree["scheduler"])
        self.step, self.loss, self.curve, self.best = tree["step"], tree["loss"], tree["curve"], tree["best"]
        self.timers.seconds = tree["seconds"]
        self.spectra.load_state_dict(tree.get("spectra", {"record": [], "previous": {}}))  # absent before version 0.1
        self.clock.load_state_dict(tree["phases"])
        self.energy.resume(tree.get("energy"), self.step)
        set_rng_state(tree["rng"][self.rank])

    def _finish(self, command: str | None) -> RunResult:
        """Test the final model, and write it and the result."""
        model = self.model
        validation = Quality(
            self.curve[-1]["validation_loss"],
            self.learning.metric,
            self.curve[-1][f"validation_{self.learning.metric}"],
        )
        self.accelerator.wait_for_everyone()
        if self.best is not None:
            model = load(self.folder / "best", self._fresh()).to(self.accelerator.device)
            validation = self.quality(model, self.data.validation)
        result = self._result(model, validation, command)
        if self.accelerator.is_main_process:
            save(model, self.folder / "model", self.compressor, card=True)
            write_json(self.folder / "result.json", result.to_dict())
        return result

    def _result(self, model: nn.Module, validation: Quality, command: str | None) -> RunResult:
        seconds, test = self.timers.seconds, self.quality(model, self.data.test)
        of_right = test.metric == "accuracy"
        saved = savings(self.clock.phases, seconds["reduction"], net_steps=self.step)
        return RunResult(
            data=self.data.label,
            config=self.config.model_dump(mode="json"),
            seed=self.config.run.seed,
            command=command,
            versions={"compressm": __version__, "torch": torch.__version__, "python": platform.python_version()},
            processes=self.world,
            device=device_name(self.accelerator.device),
            threads=torch.get_num_threads(),
            processor=processor_name(),
            steps=self.step,
            state_dims=list(state_dims(model).values()),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            test_accuracy=test.score if of_right else None,
            validation_accuracy=validation.score if of_right else None,
            metric=test.metric,
            test_score=test.score,
            validation_score=validation.score,
            test_loss=test.loss,
            validation_loss=validation.loss,
            train_seconds=seconds["train"],
            reduction_seconds=seconds["reduction"],
            evaluation_seconds=seconds["evaluation"],
            checkpoint_seconds=seconds["checkpoint"],
            history=[] if self.compressor is None else [event.to_dict() for event in self.compressor.history],
            phases=[phase.to_dict() for phase in self.clock.phases],
            savings=None if saved is None else {**asdict(saved), "speedup": saved.speedup},
            energy=self.energy.used(self.step),
            curve=self.curve,
            spectra=self.spectra.record or None,
        )


__all__ = ["RunResult", "train"]
