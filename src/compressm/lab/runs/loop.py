"""The training loop: every step, cut, evaluation and checkpoint of a run, resumable after a kill at any instant.

A run's folder holds ``checkpoints/`` (everything that training needs to go on), ``tensorboard/``, and at the end
``model/`` and ``result.json``. A step is a pure function of the checkpointed state and of the step's number, so that a
resumed run ends with the weights of an unbroken one, on the CPU to the last bit.
"""

from __future__ import annotations

import math
import platform
import random
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from compressm import __version__
from compressm.saving.checkpoint import load, load_tree, save
from compressm.training.clock import StepClock, savings
from compressm.errors import ConfigError
from compressm.training.history import Event
from compressm.training.step_cost import step_cost
from compressm.cutting import state_dims
from compressm.runtime.random_state import rng_state, set_rng_state
from compressm.observing.moments import Statistics
from compressm.runtime.files import write_json
from compressm.lab.runs.checkpoints import Checkpoints
from compressm.lab.config import Config, present_form
from compressm.lab.data.datasets import BatchOrder, SequenceData, Split, load_data
from compressm.lab.runs.energy import Energy
from compressm.lab.runs.logs import RunLog, TensorBoard, Tracker, WeightsAndBiases
from compressm.runtime.memory import keep_freed_memory
from compressm.lab.runs.models import build_compressor, build_model, build_optimizer, build_scheduler
from compressm.lab.runs.objective import Objective
from compressm.lab.runs.result import RunResult
from compressm.lab.runs.spectra import SpectrumLog

# What does not change a run's result, and may differ between the checkpoint and the run which resumes it.
FREE_KEYS = {"data.root"} | {
    f"run.{key}"
    for key in (
        "output", "checkpoint_every", "keep_checkpoints", "log_every", "eval_batch_size", "threads", "device",
        "tensorboard", "wandb", "energy",
    )
}  # fmt: skip


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
    folder = Path(output or config.run.output or f"runs/{config.data.name}-seed{config.run.seed}")
    finished = _prepare(folder, config, resume)
    if finished is not None:
        return finished
    keep_freed_memory()
    threads = torch.get_num_threads()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    try:
        return _Run(config, folder, resume, origin).run(command, quiet)
    finally:
        torch.set_num_threads(threads)


def _prepare(folder: Path, config: Config, resume: bool) -> RunResult | None:
    """The result, if the folder holds it already; the folder, created, if it does not."""
    result = folder / "result.json"
    if not resume and (result.exists() or _checkpoints(folder, config).steps()):
        raise ConfigError(
            f"run.output: {folder} already holds a run; resume it with --resume, or choose another --output"
        )
    if result.exists():
        content = RunResult.read(result)
        _same_config(content.config, config, folder)
        return content
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.output: {folder} cannot be created ({error.strerror}); choose another folder with --output"
        ) from error
    return None


def _checkpoints(folder: Path, config: Config) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", config.run.keep_checkpoints)


def _same_config(saved: Mapping[str, Any], config: Config, folder: Path) -> None:
    for key, value, before in differences(saved, config):
        raise ConfigError(
            f"{key} = {value!r}: the run in {folder} was started with {before!r}; give that value to resume "
            "it, or choose another --output"
        )


def differences(saved: Mapping[str, Any], config: Config) -> Generator[tuple[str, Any, Any]]:
    """What decides about a run's result and is not as it was: the key, its value now and the one before.

    Args:
        saved: a configuration as plain values, by this version or an earlier one.
        config: the one now.
    """
    saved = present_form(saved)
    for section, values in config.model_dump(mode="json").items():
        for name, value in values.items():
            key, before = f"{section}.{name}", saved.get(section, {}).get(name)
            if key not in FREE_KEYS and before != value:
                yield key, value, before


class _Run:
    """One run in one process: everything that changes from step to step, and what changes it."""

    def __init__(self, config: Config, folder: Path, resume: bool, origin: str | Path | None) -> None:
        self.config, self.folder = config, folder
        run = config.run
        if run.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("run.device = 'cuda': torch sees no CUDA device here; use run.device=auto or cpu")
        use_cpu = run.device == "cpu" or not torch.cuda.is_available()
        self.accelerator = Accelerator(cpu=use_cpu)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if run.batch_size % self.world:
            raise ConfigError(
                f"run.batch_size = {run.batch_size}: {self.world} processes cannot share it evenly; choose a multiple"
            )
        self.data: SequenceData = load_data(config.data).to(self.accelerator.device)
        self.objective = Objective(config.loss, self.accelerator.device)
        self.order = BatchOrder(len(self.data.train), run.batch_size, run.seed)
        _seed(run.seed)
        data = self.data
        model = build_model(config, data.channels, data.n_classes, data.vocabulary, data.padding)
        self.model: nn.Module = model.to(self.accelerator.device)
        _seed(run.seed + 1_000_003 * self.rank)  # the same weights, other dropout
        self.optimizer = build_optimizer(config.optimizer, self.model)
        self.scheduler = build_scheduler(config, self.optimizer)
        self.compressor = build_compressor(
            config, self.model, self.optimizer, self.scheduler, lambda model: self.accuracy(model, self.data.validation)
        )
        self.clock = StepClock(state_dims(self.model)) if self.compressor is None else self.compressor.clock
        self.step = 0
        self.loss = torch.tensor(math.nan)
        self.curve: list[dict[str, Any]] = []
        self.best: float | None = None
        self.seconds = {"train": 0.0, "reduction": 0.0, "evaluation": 0.0, "checkpoint": 0.0}
        self._clock, self._since = "", 0.0
        self.spectra = SpectrumLog(config.compression.method)
        self.energy = Energy(run.energy)
        self.checkpoints = _checkpoints(folder, config)
        self.damaged: list[str] = []
        if resume and self.checkpoints.steps():
            tree, self.damaged = self.checkpoints.read()
            _same_config(tree["config"], config, folder)
            self._restore(tree, folder)
        elif origin is not None:
            self._take_over(Path(origin))
        self.wrapped: nn.Module = self.accelerator.prepare_model(self.model)

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
            with self._timed("train"), self._memory():
                while self.step < run.steps:
                    self._advance(log)
            result = self._finish(command)
            log.message(
                f"done: test accuracy {result.test_accuracy:.4f}, states {result.state_dims}, training took "
                f"{result.train_seconds:.1f} s and reductions {result.reduction_seconds:.1f} s; see {self.folder}"
            )
        return result

    def _advance(self, log: RunLog) -> None:
        """One training step and all that is due after it."""
        run = self.config.run
        self._train_step()
        if run.log_every and self.step % run.log_every == 0:
            loss = float(self.loss)
            self._check_finite(loss)
            log.training(self.step, loss, self._rates())
        event = self._compress()
        if event is not None:
            log.compression(event, state_dims(self.model))
        # After a roll-back the model is what it was before the cut, and what was seen of it after the cut is seen anew.
        last = self.step == run.steps
        self._look_at_spectra(log)
        if last or (run.eval_every and self.step % run.eval_every == 0):
            self._evaluate(log)
        undone = event is not None and event.kind == "rolled_back"
        if last or (run.checkpoint_every and self.step % run.checkpoint_every == 0 and not undone):
            self._checkpoint()

    def _train_step(self) -> None:
        self.clock.begin()
        u, y, lengths = self._batch()
        self.wrapped.train()
        loss = self.objective(self.wrapped, u, y, self.step, lengths)
        self.accelerator.backward(loss)
        if self.config.optimizer.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.loss = loss.detach()
        self.step += 1

    def _compress(self) -> Event | None:
        if self.compressor is None:
            self.clock.end()
            return None
        with self._timed("reduction"):
            event = self.compressor.step()
        if event is None or event.kind not in ("cut", "rolled_back"):
            return event
        self.best = None  # weights of another size are no candidates for the result
        self._measure()
        if event.restored_step is not None and event.kind == "rolled_back":
            self.step = event.restored_step
            for point in self.curve:
                if point["step"] == self.step:
                    self.loss = torch.tensor(point["loss"])
            self.curve = [point for point in self.curve if point["step"] < self.step]
            self.spectra.back_to(self.step)
        return event

    def _measure(self) -> None:
        """Count what a step of the present size takes in this process."""
        with self._timed("evaluation"):
            u, y, lengths = self._batch()
            self.clock.measured(step_cost(self.model, lambda model: self.objective(model.train(), u, y, 0, lengths)))

    def _batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """This process's share of the present step's batch: sequences, labels, and lengths where they are padded."""
        indices = self.order.indices(self.step)[self.rank :: self.world].to(self.accelerator.device)
        return *self.data.batch(self.data.train, indices), self.data.lengths(self.data.train, indices)

    def _look_at_spectra(self, log: RunLog) -> None:
        every = self.config.run.spectrum_every
        if every and self.step % every == 0:
            with self._timed("evaluation"):
                self.spectra.look(self.model, self.step)
                log.spectra(self.spectra.record[-1])

    def accuracy(self, model: nn.Module, split: Split) -> float:
        """Share of a split that is classified correctly, the same in all processes."""
        with self._timed("evaluation"), torch.no_grad():
            if self.world > 1:  # every process has running statistics of its own share of the data
                for buffer in model.buffers():
                    broadcast(buffer)
            correct = self.data.correct(model, split, self.config.run.eval_batch_size, self.rank, self.world)
            return float(cast("torch.Tensor", self.accelerator.reduce(correct))) / len(split)

    def _evaluate(self, log: RunLog) -> None:
        loss = float(self.loss)
        self._check_finite(loss)
        accuracy = self.accuracy(self.model, self.data.validation)
        dims = state_dims(self.model)
        self.curve.append(
            {
                "step": self.step,
                "loss": loss,
                "validation_accuracy": accuracy,
                "lr": self._rates(),
                "state_dims": list(dims.values()),
                "train_seconds": self.seconds["train"],
            }
        )
        if self.config.run.select == "best" and (self.best is None or accuracy > self.best):
            self.best = accuracy
            if self.accelerator.is_main_process:
                save(self.model, self.folder / "best")
        log.evaluation(self.step, accuracy, dims)

    def _rates(self) -> dict[str, float]:
        return {str(group["name"]): float(group["lr"]) for group in self.optimizer.param_groups}

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss) and not self._may_go_back:
            self._diverged(f"the loss is {loss}")

    @property
    def _may_go_back(self) -> bool:
        """Whether a cut is under observation, whose roll-back would also undo a divergence."""
        return self.compressor is not None and self.compressor.observing

    def _diverged(self, what: str) -> NoReturn:
        steps = self.checkpoints.steps()
        kept = f"; the checkpoint of step {steps[-1]} is from before that" if steps else ""
        raise ConfigError(
            f"optimizer.lr = {self.config.optimizer.lr}: training diverged, {what} at step {self.step}{kept}; lower it"
        )

    @contextmanager
    def _memory(self) -> Generator[None]:
        """Says what to do where memory does not suffice."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not should_reduce_batch_size(cast("Exception", error)) and not isinstance(error, MemoryError):
                raise
            raise ConfigError(
                f"run.batch_size = {self.config.run.batch_size}: out of memory at step {self.step}; lower it, or free "
                "memory and go on with --resume"
            ) from error

    def _checkpoint(self) -> None:
        finite = all(bool(value.isfinite().all()) for value in self.model.state_dict().values())
        if not finite or not math.isfinite(float(self.loss)):
            if self._may_go_back:
                return  # the last good one stays until it is known whether this is undone
            self._diverged("weights or loss are not finite")
        random_states = gather_object([rng_state()])
        if not self.accelerator.is_main_process:
            return
        tree = {
            "config": self.config.model_dump(mode="json"),
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
            "seconds": self.seconds,
            "phases": self.clock.state_dict(),
            "energy": self.energy.used(self.step),
        }
        with self._timed("checkpoint"):
            self.checkpoints.write(self.step, tree)

    def _take_over(self, origin: Path) -> None:
        """Begin with the steps that an uncompressed run has made, up to its last checkpoint before our first cut."""
        if self.compressor is None:
            raise ConfigError(f"--from {origin}: nothing would differ from that run without compression; enable it")
        selective = Statistics(self.model).layers
        if self.config.compression.when == "settled" or selective:
            reason = f"{selective[0]} is a selective layer" if selective else "compression.when = 'settled'"
            raise ConfigError(
                f"--from {origin}: {reason}, which is watched over the steps before a cut, and that run did not watch; "
                "train without --from"
            )
        first = self.compressor.cut_steps[0]
        checkpoints = _checkpoints(origin, self.config)
        steps = [step for step in checkpoints.steps() if step < first]
        if not steps:
            raise ConfigError(
                f"--from {origin}: it has no checkpoint from before step {first}, where the first cut is due; keep "
                "more of them there with run.keep_checkpoints, or train without --from"
            )
        tree = load_tree(checkpoints.path(steps[-1]))
        if tree["compressor"] is not None:
            raise ConfigError(
                f"--from {origin}: that run was compressed itself; name one with compression.enabled=false"
            )
        for key, value, before in differences(tree["config"], self.config):
            if not key.startswith("compression."):
                raise ConfigError(
                    f"{key} = {value!r}: the run in {origin} was made with {before!r}; give that value to go on from "
                    "it, or train without --from"
                )
        started = {**self.compressor.state_dict(), "steps": tree["step"]}
        self._restore({**tree, "compressor": started, "best": None}, origin)

    def _restore(self, tree: Mapping[str, Any], folder: Path) -> None:
        if len(tree["rng"]) != self.world:
            raise ConfigError(
                f"--resume: the run in {folder} used {len(tree['rng'])} processes, not {self.world}; use as many"
            )
        if self.compressor is not None:  # first: it gives the layers the sizes that the others expect
            self.compressor.load_state_dict(tree["compressor"])
        self.model.load_state_dict(tree["model"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.scheduler.load_state_dict(tree["scheduler"])
        self.step, self.loss, self.curve, self.best = tree["step"], tree["loss"], tree["curve"], tree["best"]
        self.seconds = tree["seconds"]
        self.spectra.load_state_dict(tree.get("spectra", {"record": [], "previous": {}}))  # absent before version 0.1
        self.clock.load_state_dict(tree["phases"])
        self.energy.resume(tree.get("energy"), self.step)
        set_rng_state(tree["rng"][self.rank])

    def _finish(self, command: str | None) -> RunResult:
        model, validation = self.model, float(self.curve[-1]["validation_accuracy"])
        self.accelerator.wait_for_everyone()
        if self.best is not None:
            model = load(self.folder / "best").to(self.accelerator.device)
            validation = self.accuracy(model, self.data.validation)
        saved = savings(self.clock.phases, self.seconds["reduction"], net_steps=self.step)
        result = RunResult(
            data=self.data.label,
            config=self.config.model_dump(mode="json"),
            seed=self.config.run.seed,
            command=command,
            versions={"compressm": __version__, "torch": torch.__version__, "python": platform.python_version()},
            processes=self.world,
            device=_device_name(self.accelerator.device),
            threads=torch.get_num_threads(),
            steps=self.step,
            state_dims=list(state_dims(model).values()),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            test_accuracy=self.accuracy(model, self.data.test),
            validation_accuracy=validation,
            train_seconds=self.seconds["train"],
            reduction_seconds=self.seconds["reduction"],
            evaluation_seconds=self.seconds["evaluation"],
            checkpoint_seconds=self.seconds["checkpoint"],
            history=[] if self.compressor is None else [event.to_dict() for event in self.compressor.history],
            phases=[phase.to_dict() for phase in self.clock.phases],
            savings=None if saved is None else {**asdict(saved), "speedup": saved.speedup},
            energy=self.energy.used(self.step),
            curve=self.curve,
            spectra=self.spectra.record or None,
        )
        if self.accelerator.is_main_process:
            save(model, self.folder / "model", self.compressor, card=True)
            write_json(self.folder / "result.json", result.to_dict())
        return result

    @contextmanager
    def _timed(self, clock: str) -> Generator[None]:
        """Runs one of the clocks, and meanwhile none of the others."""
        if self.accelerator.device.type == "cuda" and clock != "reduction":
            torch.cuda.synchronize()  # what was asked for belongs to the clock so far; too dear where it is every step
        outer = self._clock
        self._switch(clock)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, clock: str) -> None:
        now = time.perf_counter()
        if self._clock:
            self.seconds[self._clock] += now - self._since
        self._clock, self._since = clock, now


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


__all__ = ["RunResult", "differences", "train"]
