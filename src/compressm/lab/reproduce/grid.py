"""Running a grid: every run a process, in the order of the seeds, resumable run by run and step by step.

A run trains in ``RUNS/NAME/ARM-seedK`` and leaves ``RESULTS/NAME/ARM-seedK.json``, which is small enough to be
committed. A run whose result is there is not repeated; one that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compressm.errors import CompressmError, ConfigError, RunError
from compressm.lab.config import Config, load_config, parse_config
from compressm.lab.reproduce.experiments import Arm, Experiment
from compressm.lab.runs.loop import train
from compressm.lab.runs.result import RunResult
from compressm.lab.runs.same_settings import differences
from compressm.runtime.files import write_json

Results = dict[tuple[str, int], RunResult]
"""Results by arm and seed."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a grid: an arm, a seed, and where its files are."""

    experiment: Experiment
    arm: Arm
    seed: int
    folder: Path
    result: Path

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    def folder_of(self, arm: str) -> Path:
        """Where another arm trains with the same seed."""
        return self.folder.with_name(f"{arm}-seed{self.seed}")


def plan_runs(
    experiment: Experiment,
    seeds: Iterable[int],
    arms: Sequence[str] | None = None,
    results: Path = Path("results"),
    runs: Path = Path("runs"),
) -> list[PlannedRun]:
    """The runs of a grid, seed by seed, so that one that is stopped early has whole comparisons.

    Raises:
        ConfigError: an arm that the experiment does not have.
    """
    chosen = experiment.arms if arms is None else [experiment.arm(name) for name in arms]
    wanted = {arm.name for arm in chosen}.union(*(arm.needs for arm in chosen))
    return [
        PlannedRun(
            experiment,
            arm,
            seed,
            runs / experiment.name / f"{arm.name}-seed{seed}",
            results / experiment.name / f"{arm.name}-seed{seed}.json",
        )
        for seed in seeds
        for arm in experiment.arms
        if arm.name in wanted
    ]


def configuration(
    run: PlannedRun,
    steps: int | None = None,
    data: str | None = None,
    done: Mapping[tuple[str, int], RunResult] | None = None,
) -> Config:
    """The configuration that one run is trained with.

    Args:
        run: which.
        steps: instead of the experiment's; evaluations and checkpoints move with it.
        data: the directory with the data.
        done: the results so far, for a run that needs those of others; None to check the values before any work.

    Raises:
        ConfigError: values that do not fit.
    """
    tree: dict[str, Any] = load_config(run.experiment.config).model_dump(mode="json")
    changes = {**run.experiment.changes, **run.arm.changes}
    planned = run.experiment.steps or tree["run"]["steps"]
    if steps is not None or run.experiment.steps is not None or run.arm.length != 1:
        steps = max(1, round(run.arm.length * (steps or planned)))
        every = max(1, steps // 20)
        start, window = (changes.get(f"compression.{key}", tree["compression"][key]) for key in ("start", "window"))
        changes |= _window(start, window, round(run.arm.length * planned), steps)
        changes |= {"run.steps": steps, "run.eval_every": every, "run.checkpoint_every": every}
    changes |= {"run.seed": run.seed, "run.threads": 1, "run.tensorboard": False}
    if data is not None:
        changes["data.root"] = data
    if run.arm.same_states_as is not None:
        changes["model.d_state"] = 1 if done is None else done[run.arm.same_states_as, run.seed].state_dims
    if run.arm.teacher is not None:
        changes["loss.teacher"] = str(run.folder_of(run.arm.teacher) / "model")
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section][name] = value
    return parse_config(tree, run.experiment.name)


def _window(start: int, window: float, planned: int, steps: int) -> dict[str, Any]:
    """Start and window of the cuts in a training of another length than planned: they come at the same share of it."""
    if not start:
        return {}
    left = max(1, round((planned - start) * steps / planned))
    window = 1 / steps if window == 1 / planned else window  # a single step stays one
    return {"compression.start": steps - left, "compression.window": window}


def run_grid(
    runs: Sequence[PlannedRun],
    *,
    steps: int | None = None,
    data: str | None = None,
    workers: int | None = None,
    command: str | None = None,
    executor: Callable[[int], Executor] | None = None,
) -> dict[tuple[str, int], RunResult]:
    """Make all runs that are not there yet.

    Args:
        runs: from `plan_runs`.
        steps: see `configuration`.
        data: likewise.
        workers: runs at a time; by default one per CPU, with one thread each.
        command: the exact command line, for the record.
        executor: makes what runs them, given ``workers``; by default processes of this machine.

    Returns:
        the results, by arm and seed.

    Raises:
        ConfigError: unfit data or values, a result that was made with others, or training that diverged.
        RunError: a process that was killed.
    """
    for run in runs:
        configuration(run, steps, data)  # mistakes come before any work
        _check_teacher(run)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    with bar, (executor or _processes)(workers or os.cpu_count() or 1) as pool:

        def start(run: PlannedRun, done: Results) -> Future[RunResult]:
            return pool.submit(_train, run, configuration(run, steps, data, done), command)

        return _run_all(runs, start, bar)


def _run_all(
    runs: Sequence[PlannedRun], start: Callable[[PlannedRun, Results], Future[RunResult]], bar: Progress
) -> Results:
    """Start every run as soon as those are done that it needs, and collect the results.

    When a run fails, the others go on, since they may take hours. The first failure is raised at the end.
    """
    done: Results = {}
    waiting: dict[Future[RunResult], PlannedRun] = {}
    failures: list[CompressmError] = []
    pending = list(runs)
    task = bar.add_task("runs", total=len(runs))
    while True:
        for run in [run for run in pending if _ready(run, done)]:
            pending.remove(run)
            waiting[start(run, done)] = run
        if not waiting:
            break
        finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in finished:
            run = waiting.pop(future)
            try:
                done[run.arm.name, run.seed] = future.result()
            except BrokenExecutor as error:  # the pool and all that it ran are gone
                raise RunError(
                    f"{run}: a process was killed (out of memory?); take fewer --workers, and the same command goes on "
                    "where it was"
                ) from error
            except CompressmError as error:
                failures.append(error)
                bar.console.print(f"{run}: {error}", markup=False)
            bar.update(task, advance=1, description=str(run))
    if pending:
        names = ", ".join(map(str, pending))
        bar.console.print(f"not made, since they need one of those that failed: {names}")
    if failures:
        raise failures[0]
    return done


def _check_teacher(run: PlannedRun) -> None:
    """Check that a teacher's model is there. A teacher whose result is stored is not trained again."""
    if run.arm.teacher is None or run.result.exists():
        return
    result = run.result.with_name(f"{run.arm.teacher}-seed{run.seed}.json")
    model = run.folder_of(run.arm.teacher) / "model"
    if result.exists() and not model.is_dir():
        raise ConfigError(
            f"{model}: the model that {run.arm.name}, seed {run.seed}, is to learn from is not there, only its result "
            f"is; delete {result} so that it is trained again, or leave {run.arm.name} out of --arms"
        )


def _ready(run: PlannedRun, done: dict[tuple[str, int], RunResult]) -> bool:
    return all((arm, run.seed) in done for arm in run.arm.needs)


def _processes(workers: int) -> Executor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, by a kill for example.

    Otherwise it would train on for hours although nobody waits for its result. The same command, given again, would
    train the same run beside it.
    """

    def wait_for_end() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


def _train(run: PlannedRun, config: Config, command: str | None) -> RunResult:
    """Train one run, in a process of its own, and write its result."""
    if run.result.exists():
        result = RunResult.read(run.result)
        different = [key for key, *_ in differences(result.config, config) if key != "loss.teacher"]  # named by its arm
        if different:
            raise ConfigError(
                f"{run.result} was made with another {', '.join(different)}; choose another --results, or delete it"
            )
        return result
    origin = None if run.arm.continues is None else run.folder_of(run.arm.continues)
    if origin is not None and not origin.exists():
        origin = None  # only its result is here, so all steps are made again
    result = train(config, output=run.folder, resume=True, origin=origin, command=command, quiet=True)
    content = result.to_dict()
    content["config"]["data"]["root"] = content["config"]["run"]["output"] = None  # another machine has others
    content["config"]["loss"]["teacher"] = run.arm.teacher
    run.result.parent.mkdir(parents=True, exist_ok=True)
    write_json(run.result, content)
    return RunResult.read(run.result)


def read_results(experiment: Experiment, results: Path = Path("results")) -> dict[tuple[str, int], RunResult]:
    """The results of an experiment that are stored, by arm and seed.

    Raises:
        CheckpointError: a damaged file.
    """
    found: dict[tuple[str, int], RunResult] = {}
    for arm in experiment.arms:
        for path in sorted((results / experiment.name).glob(f"{arm.name}-seed*.json")):
            found[arm.name, json.loads(path.stem.rsplit("-seed", 1)[1])] = RunResult.read(path)
    return found


__all__ = ["PlannedRun", "configuration", "plan_runs", "read_results", "run_grid"]
