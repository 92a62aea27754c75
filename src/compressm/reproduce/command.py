"""What `compressm reproduce` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compressm.errors import ConfigError
from compressm.reproduce.experiments import EXPERIMENTS, experiment
from compressm.reproduce.grid import plan_runs, read_results, run_grid
from compressm.reproduce.report import draw, render, table


def list_experiments() -> None:
    """On the terminal: name, title, ways of training, seeds."""
    made = Table("name", "what", "ways of training", "seeds", title="Experiments", title_justify="left")
    for one in EXPERIMENTS.values():
        made.add_row(one.name, one.title, ", ".join(arm.name for arm in one.arms), str(one.seeds))
    Console().print(made)


def run_experiment(
    name: str, seeds: int | None, arms: Sequence[str] | None, results: Path, runs: Path, **options: Any
) -> None:
    """Make the runs of an experiment that are not stored yet; see `plan_runs` and, for the options, `run_grid`.

    Raises:
        ConfigError: an unknown experiment or arm, unfit data or values.
    """
    chosen = experiment(name)
    run_grid(plan_runs(chosen, range(seeds or chosen.seeds), arms, results, runs), **options)


def show_experiment(name: str, results: Path, markdown: Path | None = None, picture: Path | None = None) -> None:
    """Table, Markdown and picture of all stored results of an experiment.

    Raises:
        ConfigError: an unknown experiment, nothing to show, or a file that cannot be written.
    """
    chosen = experiment(name)
    stored = read_results(chosen, results)
    if not stored:
        raise ConfigError(f"{results / name}: no results there; run compressm reproduce {name} without --show")
    Console().print(table(chosen, stored))
    try:
        if markdown is not None:
            markdown.write_text(render(chosen, stored), encoding="utf-8")
        if picture is not None:
            draw(chosen, stored, picture)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written ({error.strerror}); choose another place") from error


__all__ = ["list_experiments", "run_experiment", "show_experiment"]
