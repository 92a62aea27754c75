"""Probes a task before a long training: short trainings of several sizes say whether the number of states matters.

A large state learns faster at the same learning rate, also where a small one would end as good, since more parameters
move the same output. So every size is tried at several rates, in order, as long as the next one is better, and sizes
are compared at their best rates. `compressm.training.probe_answer` has the rule by which they are compared.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from compressm.cutting.metrics import Better, measured, sign_of
from compressm.errors import CheckpointError, ConfigError, EvaluationError
from compressm.runtime.files import write_json
from compressm.runtime.progress import Bar
from compressm.runtime.random_state import rng_state, seed_all, set_rng_state
from compressm.runtime.warned import warn
from compressm.theory.rank_rule import check_choice
from compressm.training.batch_record import BatchRecord
from compressm.training.probe_answer import Probe, ShortRun, answer_of

_SMALLER = (1, 4, 16)  # by how much the sizes are smaller than the one that was asked about


class ProbeWarning(UserWarning):
    """Short trainings that cannot be compared fairly."""


@dataclass(frozen=True)
class Task:
    """One short training that `train` is asked for.

    Attributes:
        steps: how many optimizer steps. The whole learning rate schedule is to fit into them.
        seed: of the order of the batches, where `train` draws it by generators of its own; torch, NumPy and Python are
            seeded already.
        rate: factor on all learning rates.
        states: the size, for names of folders and the like.
    """

    steps: int
    seed: int
    rate: float
    states: int


def probe(
    build: Callable[[int], nn.Module],
    train: Callable[[Any, Task], Any],
    evaluate: Callable[[Any], Any],
    *,
    states: int | Sequence[int],
    steps: int,
    total_steps: int | None = None,
    seeds: int | Sequence[int] = 3,
    rates: Sequence[float] = (1.0, 3.0, 9.0),
    worth: float = 0.25,
    mode: Better = "max",
    metric: str = "metric",
    folder: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Probe:
    """Say, before a long training, whether the number of states matters for a task, and which size to start from.

    Models of several sizes make a few steps each, on the same batches with the same learning rate schedule. The size is
    the only thing in which they differ, besides a factor on the learning rates, which is chosen for each size. The cost
    is at most ``sizes * (rates + seeds - 1)`` short trainings, if none diverges.

    Args:
        build: ``build(states)`` returns a new model with so many states per layer.
        train: ``train(model, task)`` trains it for ``task.steps`` steps, with a whole learning rate schedule in them,
            and all learning rates multiplied by ``task.rate``.
        evaluate: ``evaluate(model)`` returns the validation metric: a number; or one score per validation example,
            always the same ones in the same order, which are then compared in pairs.
        states: the size of the long training, which is compared with a quarter and a sixteenth of it; or the sizes.
        steps: steps of each short training. Enough of them that something is learnt.
        total_steps: steps of the long training, to say which share of its time the probe took.
        seeds: how many seeds, two or more; or the seeds.
        rates: factors on the learning rates, ascending. With the first seed they are tried one after the other until
            one is no better, for a smaller size from the best one of the larger size on. One at which a
            training diverges, with any seed, counts as worse: the metric or the weights are not finite then.
        worth: share of what the largest size learns that a smaller one may be behind and still count as as good.
        mode: ``"max"`` if a higher metric is better, ``"min"`` if a lower one is.
        metric: its name, for the table.
        folder: stores every short training when it is done. A probe that was killed goes on from there.
        quiet: no progress bar.

    Returns:
        the answer. ``print`` shows it in words; see `Probe`.

    Raises:
        ConfigError: arguments that make no probe, or a folder of another probe.
        EvaluationError: ``evaluate`` raised, or returned no number, or no finite one before training or at any rate.
    """
    sizes, seeds = _sizes(states), _seeds(seeds)
    _check(steps, total_steps, rates, worth)
    check_choice("mode", mode, Better)
    made = _Made(folder, {"steps": steps, "mode": mode})
    bar = Bar("probe", len(sizes) * (len(rates) + len(seeds) - 1) * steps, quiet)
    runner = _Runner(build, train, evaluate, steps, mode, made, bar)
    with _random_state_kept(), bar:
        runs = runner.compared(sizes, seeds, rates)
    _warn_of_other_batches(runs)
    return answer_of(runs, steps, worth=worth, mode=mode, metric=metric, total_steps=total_steps, seconds=made.seconds)


@dataclass(frozen=True)
class _Runner:
    """Makes short trainings, or reads those that were made already."""

    build: Callable[[int], nn.Module]
    train: Callable[[Any, Task], Any]
    evaluate: Callable[[Any], Any]
    steps: int
    mode: Better
    made: _Made
    bar: Bar

    def compared(self, sizes: Sequence[int], seeds: Sequence[int], rates: Sequence[float]) -> list[ShortRun]:
        """The trainings of every size with every seed. A smaller size is tried from the best rate of the larger one on.

        Raises:
            EvaluationError: a size diverges at every rate.
        """
        runs: list[ShortRun] = []
        for size in sizes:
            runs += self._of_size(size, seeds, rates, runs[-1].rate if runs else rates[0])
        return runs

    def _of_size(self, states: int, seeds: Sequence[int], rates: Sequence[float], lowest: float) -> list[ShortRun]:
        """The trainings of one size, one for each seed, at the best rate at which none diverges."""
        climbed = [rate for rate in rates if rate >= lowest]
        self.bar.skip((len(rates) - len(climbed)) * self.steps)
        runs = [self._best(states, seeds[0], climbed)]
        for seed in seeds[1:]:
            if not runs[-1].diverged:
                runs.append(self.run(Task(self.steps, seed, runs[0].rate, states)))
        last = runs[-1]
        if not last.diverged:
            return runs
        lower = [rate for rate in rates if rate < last.rate]
        if not lower:
            raise EvaluationError(
                f"the training of {_name(states, last.seed, last.rate)} diverged, and no lower rate is left: lower the "
                "learning rate, or give lower rates="
            )
        return self._of_size(states, seeds, lower, lower[0])

    def _best(self, states: int, seed: int, rates: Sequence[float]) -> ShortRun:
        """The best of the trainings at one rate after the other, until one is no better or diverges."""
        best = self.run(Task(self.steps, seed, rates[0], states))
        for index, rate in enumerate(rates[1:], 1):
            if best.diverged:
                break
            run = self.run(Task(self.steps, seed, rate, states))
            if run.diverged or sign_of(self.mode) * (run.metric - best.metric) <= 0:
                self.bar.skip((len(rates) - index - 1) * self.steps)
                break
            best = run
        return best

    def run(self, task: Task) -> ShortRun:
        """One short training."""
        known = self.made.get(task)
        if known is not None:
            self.bar.skip(task.steps)
            return known
        self.bar.describe(_name(task.states, task.seed, task.rate))
        seed_all(task.seed)
        model = self.build(task.states)
        before, _ = measured(model, self.evaluate)
        if not math.isfinite(before):
            raise EvaluationError(
                f"evaluate returned {before} for an untrained model of {task.states} states; see that its weights, the "
                "data and the metric itself are finite"
            )
        record = BatchRecord(model, self.bar.advance)
        seed_all(task.seed)  # however many numbers the initial weights of this size have taken
        started = time.perf_counter()
        with record:
            self.train(model, task)
        seconds = time.perf_counter() - started
        self.bar.skip(task.steps - min(record.calls, task.steps))
        metric, scores = measured(model, self.evaluate)
        if not all(bool(one.isfinite().all()) for one in model.parameters()):
            metric, scores = math.nan, None  # a share of right answers is finite even where no prediction is
        parameters = sum(one.numel() for one in model.parameters())
        return self.made.add(
            ShortRun(task.states, task.seed, task.rate, before, metric, scores, seconds, parameters, record.checksums)
        )


def _name(states: int, seed: int, rate: float) -> str:
    return f"{states} states, seed {seed}, rate {rate:g}"


class _Made:
    """The short trainings that are done, in memory and, if there is a folder, in a file each.

    Args:
        folder: where to; None for nowhere.
        settings: what trainings in one folder have in common.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self._settings = dict(settings)
        self._runs: dict[tuple[int, int, float], ShortRun] = {}

    @property
    def seconds(self) -> float:
        """Time of the trainings of this probe."""
        return sum(run.seconds for run in self._runs.values())

    def get(self, task: Task) -> ShortRun | None:
        """The training that was asked for, if it is done."""
        key = (task.states, task.seed, task.rate)
        path = self._path(*key)
        if key not in self._runs and path is not None and path.exists():
            self._runs[key] = self._read(path)
        return self._runs.get(key)

    def add(self, run: ShortRun) -> ShortRun:
        """Store a training."""
        self._runs[run.states, run.seed, run.rate] = run
        path = self._path(run.states, run.seed, run.rate)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"settings": self._settings, **run.to_dict()})
        return run

    def _path(self, states: int, seed: int, rate: float) -> Path | None:
        return None if self._folder is None else self._folder / f"states{states}-seed{seed}-rate{rate:g}.json"

    def _read(self, path: Path) -> ShortRun:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            settings = values.pop("settings")
            run = ShortRun.from_dict(values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a short training of a probe ({error}); delete it") from error
        if settings != self._settings:
            raise ConfigError(f"{path} was made with {settings}, not {self._settings}: choose another folder")
        return run


def _sizes(states: int | Sequence[int]) -> list[int]:
    """The sizes, from the largest on."""
    given = [states // by for by in _SMALLER if states >= by] if isinstance(states, int) else list(states)
    sizes = sorted(set(given), reverse=True)
    if len(sizes) < 2 or sizes[-1] < 1:
        raise ConfigError(f"states = {states!r}: two different sizes of at least 1 are needed, such as (256, 64, 16)")
    return sizes


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    given = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if len(set(given)) < 2 or len(set(given)) < len(given) or min(given) < 0:
        raise ConfigError(
            f"seeds = {seeds!r}: at least two different seeds are needed, to know how much is the seed's doing"
        )
    return given


def _check(steps: int, total_steps: int | None, rates: Sequence[float], worth: float) -> None:
    if steps < 1 or (total_steps is not None and steps > total_steps):
        raise ConfigError(f"steps = {steps}: must be at least 1, and at most total_steps = {total_steps}")
    if not rates or list(rates) != sorted(set(rates)) or not all(rate > 0 and math.isfinite(rate) for rate in rates):
        raise ConfigError(f"rates = {tuple(rates)}: positive factors on the learning rates were expected, ascending")
    if not 0 < worth < 1:
        raise ConfigError(f"worth = {worth:g}: a share in (0, 1) was expected, for example 0.25")


def _warn_of_other_batches(runs: Sequence[ShortRun]) -> None:
    """Warn if sizes have seen different batches with the same seed."""
    for run in runs:
        first = next(one for one in runs if one.seed == run.seed)
        if run.batches != first.batches:
            warn(
                f"with seed {run.seed}, {run.states} and {first.states} states were trained on different batches, "
                "which also makes them differ: draw the order of batches in train from torch, NumPy or Python, or by "
                "task.seed",
                ProbeWarning,
            )
            return


@contextmanager
def _random_state_kept() -> Generator[None]:
    """Restore the random state afterwards."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


__all__ = ["Probe", "ProbeWarning", "Task", "probe"]
