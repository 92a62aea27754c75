"""Grids of real, short runs on the embedded data."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from compressm.cli import main
from compressm.errors import CompressmError, ConfigError, RunError
from compressm.lab.reproduce import EXPERIMENTS, Arm, Experiment, plan_runs, read_results, run_grid
from compressm.lab.reproduce.figures import draw
from compressm.lab.reproduce.grid import PlannedRun, Results, configuration
from compressm.lab.reproduce.tables import computing, render, rows
from compressm.lab.runs.loop import train
from compressm.lab.runs.result import RunResult
from compressm.saving.checkpoint import load_tree

OFF = {"compression.enabled": False}
TINY = Experiment(
    "tiny",
    "Digits",
    "digits",
    (
        Arm("full", {**OFF, "model.d_state": 16}, paper=12.0),
        Arm("small", OFF, same_states_as="shrunk"),
        Arm("shrunk", {"model.d_state": 16, "compression.states": 5, "compression.tolerance": None}),
    ),
    steps=40,
)
TAUGHT = Experiment(
    "taught",
    "Digits",
    "digits",
    (
        Arm("distilled", {**OFF, "model.d_state": 4}, teacher="full"),
        Arm("full", {**OFF, "model.d_state": 16}),
        Arm("plain", {**OFF, "model.d_state": 4}),
    ),
    steps=40,
)


class Here(Executor):
    """Runs in this process, at once. Starting another takes longer than these runs."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future = Future[Any]()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


def run_here(runs: Sequence[PlannedRun], steps: int | None = None) -> Results:
    return run_grid(runs, steps=steps, workers=1, executor=lambda _: Here())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of three ways and two seeds, of which a process of its own runs the second."""
    folder = tmp_path_factory.mktemp("grid")
    run_here(plan_runs(TINY, [0], results=folder / "results", runs=folder / "runs"))
    run_grid(plan_runs(TINY, [1], results=folder / "results", runs=folder / "runs"), workers=1, command="the way")
    return folder


def test_every_run_leaves_one_file_that_says_everything(folder: Path) -> None:
    names = {path.name for path in (folder / "results/tiny").iterdir()}
    assert names == {f"{arm}-seed{seed}.json" for arm in ("full", "shrunk", "small") for seed in (0, 1)}
    content = json.loads((folder / "results/tiny/shrunk-seed1.json").read_text())
    assert content["command"] == "the way"
    assert (content["seed"], content["steps"], content["state_dims"]) == (1, 40, [5])
    assert content["phases"][0]["state_dims"] == {"blocks.0.ssm": 16}
    assert content["history"]
    assert str(folder) not in json.dumps(content)


def test_an_arm_can_start_where_another_ended(folder: Path) -> None:
    results = read_results(TINY, folder / "results")
    assert results["small", 0].state_dims == results["shrunk", 0].state_dims
    assert results["small", 0].history == []


@pytest.mark.slow
def test_an_arm_can_learn_from_another(tmp_path: Path) -> None:
    def made() -> dict[str, float]:
        runs = plan_runs(TAUGHT, [0], results=tmp_path / "results", runs=tmp_path / "runs")
        return {arm: result.curve[-1]["loss"] for (arm, _), result in run_grid(runs, workers=2).items()}

    losses = made()
    assert losses["distilled"] != losses["plain"]  # the same weights, data and dropout
    stored = json.loads((tmp_path / "results/taught/distilled-seed0.json").read_text())
    assert stored["config"]["loss"]["teacher"] == "full"
    assert made() == losses  # all of it from the files
    (tmp_path / "results/taught/distilled-seed0.json").unlink()
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"full-seed0/model: the model that distilled, seed 0, is to learn from"):
        made()
    (tmp_path / "results/taught/full-seed0.json").unlink()
    assert made() == losses


CONTINUED = Experiment(
    "continued",
    "Digits",
    "digits",
    (
        Arm("full", {**OFF, "model.d_state": 16, "run.keep_checkpoints": 4}),
        Arm(
            "late",
            {
                "model.d_state": 16,
                "compression.states": 5,
                "compression.tolerance": None,
                "compression.cuts": 1,
                "compression.start": 36,
                "compression.window": 1 / 40,
            },
            continues="full",
        ),
    ),
    steps=40,
)


def test_an_arm_can_continue_another_and_ends_as_if_it_had_made_all_steps(tmp_path: Path) -> None:
    def made(folder: str) -> RunResult:
        runs = plan_runs(CONTINUED, [0], ["late"], tmp_path / folder, tmp_path / "runs")
        return run_here(runs)["late", 0]

    late = made("results")
    (step,) = (event["step"] for event in late.history if event["kind"] == "cut")
    assert step == 37
    first = load_tree(tmp_path / "runs/continued/full-seed0/checkpoints/step-00000034")
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "results/continued/late-seed0.json").unlink()
    alone = made("results")  # the result of the other is there, its run is not
    assert first["step"] == 34
    assert not (tmp_path / "runs/continued/full-seed0").exists()
    assert [point["loss"] for point in alone.curve] == [point["loss"] for point in late.curve]
    assert (alone.test_accuracy, alone.state_dims) == (late.test_accuracy, [5])


def test_every_experiment_can_be_made_shorter() -> None:
    for experiment in EXPERIMENTS.values():
        for run in plan_runs(experiment, [0]):
            config = configuration(run, steps=400)
            if config.compression.enabled:
                assert 0 <= config.compression.start < 400
    late, tuned = (EXPERIMENTS["rivals"].arm(name) for name in ("after-modal", "tuned-modal"))
    runs = plan_runs(EXPERIMENTS["rivals"], [0], [late.name, tuned.name])
    starts = [configuration(run, steps=400).compression.start for run in runs if run.arm in (late, tuned)]
    assert starts == [399, 360]


def test_results_from_before_a_key_existed_are_ours(folder: Path) -> None:
    runs = plan_runs(TINY, [0], ["full"], folder / "results", folder / "runs")
    content = runs[0].result.read_text()
    old = json.loads(content)
    del old["config"]["loss"], old["config"]["compression"]["on_setback"]
    runs[0].result.write_text(json.dumps(old))
    run_here(runs)
    assert json.loads(runs[0].result.read_text()) == old
    runs[0].result.write_text(content)


def test_what_is_there_is_not_repeated_and_the_rest_is(folder: Path) -> None:
    again = plan_runs(TINY, range(2), results=folder / "results", runs=folder / "runs")
    times = {run.result: run.result.stat().st_mtime_ns for run in again}
    expected = json.loads(again[0].result.read_text())
    again[0].result.unlink()  # as after a kill between the run and its result
    run_here(again)
    assert all(run.result.stat().st_mtime_ns == times[run.result] for run in again[1:])
    assert json.loads(again[0].result.read_text()) == expected


def test_a_result_of_other_settings_is_not_taken_for_ours(folder: Path) -> None:
    runs = plan_runs(TINY, [0], ["full"], folder / "results", folder / "runs")
    with pytest.raises(ConfigError, match=r"full-seed0\.json was made with another .*run\.steps"):
        run_here(runs, steps=60)


def test_an_interrupted_run_goes_on(tmp_path: Path, folder: Path) -> None:
    (run,) = plan_runs(TINY, [0], ["full"], tmp_path / "results", tmp_path / "runs")

    class Killed(BaseException):
        pass

    config = configuration(run)
    with pytest.MonkeyPatch.context() as patch:
        from compressm.lab.runs.loop import _Run

        step = _Run._train_step

        def interrupted(self: _Run) -> None:
            if self.step == 20:
                raise Killed
            step(self)

        patch.setattr(_Run, "_train_step", interrupted)
        with pytest.raises(Killed):
            train(config, output=run.folder, quiet=True)
    run_here([run])
    ours, whole = (
        json.loads((path / "tiny/full-seed0.json").read_text()) for path in (tmp_path / "results", folder / "results")
    )
    assert ours["test_accuracy"] == whole["test_accuracy"]
    assert [point["loss"] for point in ours["curve"]] == [point["loss"] for point in whole["curve"]]


def test_the_table_compares_with_the_first_arm_and_the_paper(folder: Path, tmp_path: Path) -> None:
    results = read_results(TINY, folder / "results")
    made = {row.arm.name: row for row in rows(TINY, results)}
    assert list(made) == ["full", "small", "shrunk"]
    assert made["full"].step_speedup == pytest.approx(1.0)
    assert made["full"].run_speedup == pytest.approx(1.0)
    assert made["shrunk"].states == "5"
    mean = 50 * (results["full", 0].test_accuracy + results["full", 1].test_accuracy)
    text = render(TINY, results)
    assert f"| full | 16 | {mean:.2f} ± " in text
    assert f"| 12.0 | {mean - 12:+.1f} |" in text
    draw(TINY, results, tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").stat().st_size > 10_000
    assert "Hankel" not in text


def test_arms_are_drawn_before_the_big_one_is_there(folder: Path, tmp_path: Path) -> None:
    results = {key: run for key, run in read_results(TINY, folder / "results").items() if key[0] == "shrunk"}
    assert "| shrunk | 5 |" in render(TINY, results)
    draw(TINY, results, tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


def test_settings_are_drawn_as_small_cut_and_big(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting is one column, with the mean of each of the three at its height, and the single seeds beside it."""
    from matplotlib.axes import Axes

    stored = read_results(TINY, folder / "results")
    names = {"full": "full-slow rate", "small": "small-slow rate", "shrunk": "shrunk-slow rate"}
    results = {(names[arm], seed): run for (arm, seed), run in stored.items()}
    cut = Arm("shrunk-slow rate", {}, small="small-slow rate", big="full-slow rate")
    settings = replace(TINY, arms=(Arm(names["full"], OFF), Arm(names["small"], OFF), cut))
    drawn: dict[str, Any] = {}

    def ticks(axis: Axes, _: object, labels: Sequence[str], **options: Any) -> None:
        drawn.update(axis=axis, labels=list(labels))

    monkeypatch.setattr(Axes, "set_xticks", ticks)
    draw(settings, results, tmp_path / "settings.svg")
    assert drawn["labels"] == ["slow rate"]
    points = {line.get_label(): float(line.get_ydata()[0]) for line in drawn["axis"].get_lines()}
    for label, arm in (("small from the start", "small"), ("cut while training", "shrunk"), ("big", "full")):
        scores = [100 * (stored[arm, seed].test_accuracy or 0) for seed in (0, 1)]
        assert points[label] == pytest.approx(sum(scores) / 2)
        assert any(line.get_ydata() == pytest.approx(scores) for line in drawn["axis"].get_lines())
    assert "of small, cut and big, in every setting](x.svg)" in render(settings, results, "x.svg")


def test_computing_times_are_those_of_the_training_and_of_a_teacher(folder: Path) -> None:
    def timed(*phases: tuple[int, float | None], cuts: float = 0.0) -> RunResult:
        made = [{"steps": steps, "step_cpu_seconds": seconds} for steps, seconds in phases]
        return replace(stored, phases=made, reduction_seconds=cuts)

    stored = read_results(TINY, folder / "results")["full", 0]
    names = ("full", "late", "distilled", "orphan", "short")
    arms = [Arm(name, {}, teacher={"distilled": "full", "orphan": "lost"}.get(name)) for name in names]
    results = {
        ("full", 0): timed((100, 0.02)),
        ("late", 0): timed((100, 0.04), (0, None), cuts=1.0),  # nothing was trained after the cut
        ("distilled", 0): timed((100, 0.01)),
        ("orphan", 0): timed((100, 0.01)),
        ("short", 0): timed((98, 0.02), (2, None)),  # too few steps at the last size for a time
    }
    made = {row.arm.name: row for row in rows(replace(TINY, arms=(*arms, Arm("lost", {}))), results)}
    assert {name: row.step_ms for name, row in made.items()} == pytest.approx(
        {"full": 20, "late": 40, "distilled": 10, "orphan": 10, "short": None}
    )
    speedups = {name: row.run_speedup for name, row in made.items()}
    assert speedups == pytest.approx({"full": 1, "late": 2 / 5, "distilled": 2 / 3, "orphan": None, "short": None})


def test_cuts_are_counted_with_the_share_of_the_processor_that_the_steps_had(folder: Path) -> None:
    phases = [
        {"steps": 100, "step_cpu_seconds": 0.02, "step_seconds": 0.08},  # 2 of 8 seconds
        {"steps": 2, "step_cpu_seconds": None, "step_seconds": None},
        {"steps": 100, "step_cpu_seconds": 0.01, "step_seconds": 0.02},  # 1 of 2 seconds
    ]
    run = replace(read_results(TINY, folder / "results")["full", 0], phases=phases, reduction_seconds=20.0)
    assert computing(run) == pytest.approx(2 + 1 + 2 * 0.02 + 20 * 3 / 10)


def test_spectra_over_training_are_shown(tmp_path: Path) -> None:
    watched = replace(TINY, arms=(Arm("watched", {**OFF, "model.d_state": 16, "run.spectrum_every": 5}),))
    runs = plan_runs(watched, [0], results=tmp_path / "results", runs=tmp_path / "runs")
    results = run_here(runs)
    text = render(watched, results, "images/x.svg")
    assert "![Accuracy over the steps, and against computing time](images/x.svg)" in text
    assert "Hankel singular values over training: `watched`, seed 0, blocks.0.ssm" in text
    rows = [line for line in text.splitlines() if line.startswith(("| 5 |", "| 10 |", "| 20 |", "| 40 |"))]
    assert len(rows) == 4
    assert all(row.count("%") == 3 for row in rows)
    draw(watched, results, tmp_path / "watched.svg")
    assert "<svg" in (tmp_path / "watched.svg").read_text()[:1000]


def test_arms_bring_those_that_they_build_upon() -> None:
    assert [run.arm.name for run in plan_runs(TINY, [0], ["small"])] == ["small", "shrunk"]
    with pytest.raises(ConfigError, match="'big' is none of full, small, shrunk"):
        plan_runs(TINY, [0], ["big"])


def test_mistakes_come_before_any_run(tmp_path: Path) -> None:
    wrong = replace(TINY, arms=(TINY.arms[0], Arm("wrong", {"model.d_state": 0})))
    with pytest.raises(ConfigError, match="d_state"):
        run_here(plan_runs(wrong, [0], results=tmp_path / "results", runs=tmp_path / "runs"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_all_experiments_have_valid_configurations(experiment: Experiment) -> None:
    for run in plan_runs(experiment, [0]):
        config = configuration(run)
        assert config.run.threads == 1


def test_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPERIMENTS, "tiny", TINY)
    assert main(["reproduce"]) == 0
    assert "ablation-count" in capsys.readouterr().out
    out = tmp_path / "tiny.md"
    assert main(["reproduce", "tiny", "--show", "--results", str(folder / "results"), "--markdown", str(out)]) == 0
    assert "shrunk" in capsys.readouterr().out
    assert "compressm reproduce tiny" in out.read_text()
    assert (tmp_path / "images/results-tiny.svg").exists()
    assert main(["reproduce", "--show", "--results", str(folder / "results"), "--markdown", str(out)]) == 0
    assert out.read_text().startswith("# Results")
    assert "## Digits" in out.read_text()
    assert main(["reproduce", "tiny", "--show", "--results", str(tmp_path)]) == 2
    assert "no results there" in capsys.readouterr().err
    assert main(["reproduce", "table1"]) == 2
    assert "smnist" in capsys.readouterr().err


KILLED = """
import os, sys, time
from compressm.lab.reproduce.grid import _processes
if __name__ == "__main__":
    with _processes(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def test_a_killed_grid_leaves_no_run_behind(tmp_path: Path) -> None:
    script = tmp_path / "grid.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.kill()
    for _ in range(200):
        if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    worker.kill()
    pytest.fail("the worker outlived its parent by 20 seconds")


def test_a_killed_process_is_named(folder: Path, tmp_path: Path) -> None:
    def deadly(workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=os._exit, initargs=(9,))

    runs = plan_runs(TINY, [0], results=tmp_path / "results", runs=tmp_path / "runs")
    with pytest.raises(RunError, match=r"a process was killed .*the same command goes on"):
        run_grid(runs, workers=1, executor=deadly)


def test_a_failed_run_is_told_at_once_and_the_others_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Experiment(
        "broken",
        "Digits",
        "digits",
        (
            Arm("diverges", {**OFF, "model.d_state": 4, "optimizer.lr": 1e30, "optimizer.name": "sgd"}),
            Arm("follows", {**OFF}, same_states_as="diverges"),
            Arm("fine", {**OFF, "model.d_state": 4}),
        ),
        steps=40,
    )
    with pytest.raises(CompressmError, match="diverged"):
        run_here(plan_runs(broken, [0], results=tmp_path / "results", runs=tmp_path / "runs"))
    assert [path.name for path in (tmp_path / "results/broken").iterdir()] == ["fine-seed0.json"]
    told = capsys.readouterr().err
    assert "diverges, seed 0: " in told
    assert "not made, since they need one of those that failed: follows, seed 0" in told


def test_times_of_different_processors_are_not_compared(tmp_path: Path) -> None:
    one = EXPERIMENTS["ablation-loss"]
    stored = read_results(one, Path(__file__).parents[3] / "results")
    other = {key: replace(run, processor="another") if key[0] == "loss12" else run for key, run in stored.items()}
    before, after = ({row.arm.name: row for row in rows(one, results)} for results in (stored, other))
    assert before["loss12"].step_speedup is not None
    assert before["loss12"].run_speedup is not None
    assert (after["loss12"].step_ms, after["loss12"].step_speedup, after["loss12"].run_speedup) == (None, None, None)
    assert after["loss12"].scores == before["loss12"].scores
    assert after["small12"] == before["small12"]
