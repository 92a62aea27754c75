"""What `compressm reproduce` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compressm.errors import ConfigError
from compressm.lab.reproduce import equal_compute
from compressm.lab.reproduce.experiments import EXPERIMENTS, experiment
from compressm.lab.reproduce.figures import draw
from compressm.lab.reproduce.grid import plan_runs, read_results, run_grid
from compressm.lab.reproduce.overview import draw_overview, render_overview
from compressm.lab.reproduce.tables import Results, render, table
from compressm.runtime.files import write_text

_TITLE = """# Results

*Generated from stored results by `compressm reproduce --show --markdown docs/results.md`. Do not edit this page.*
"""
_HOW_TO_READ = """## How to read the tables

Every run's file holds its configuration, seed, versions, command, the course of training and every cut with its
certificate. Test data were read once per run, after training.

*States* are the final state dimensions, layer by layer. *Paper* is CompreSSM (arXiv 2510.02823). *Step* is the
computing time of one of the last training steps, *faster* how many times less that is than in the first row, *whole
run* the same of all steps and cuts, and of a teacher's; medians over seeds. With several seeds accuracies are means ±
standard deviations. Times are from machines with other work, but for `speed`: rows may differ by tenths for that alone.
Times of different processors are left out.

*Gap recovered* is the share of the difference between the first row and the row that is as small from the start (for
`smnist` the paper's dimension) which this row keeps, of the seeds that all three have, with its 95 % interval where
there are three or more; it is left open where that difference is below one point. All rows of a table train at one
learning rate, but for `equal-compute`; [that flatters big models](negative.md), and a small one with a rate of its own
may close much of a gap.

† marks runs of version 0.1.0.dev0, which carried the optimizer's averages of eigenvalues through a cut without their
[sizes](carry.md), so that after deep cuts Adam made too long steps.
Commands in the files are those of the time; the one under each table is today's.
"""


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


def show_experiments(
    names: Sequence[str], results: Path, markdown: Path | None = None, picture: Path | None = None
) -> None:
    """Table, Markdown and picture of all stored results of some experiments.

    Args:
        names: of the experiments; none for all that have results.
        results: the folder of the results.
        markdown: file for the tables; their pictures go to ``images/`` beside it.
        picture: file for the comparison of one experiment.

    Raises:
        ConfigError: an unknown experiment, nothing to show, or a file that cannot be written.
    """
    found = {name: read_results(experiment(name), results) for name in names or EXPERIMENTS}
    missing = [name for name, stored in found.items() if not stored]
    if (names and missing) or len(missing) == len(found):
        raise ConfigError(
            f"{results / (missing[0] if names else '')}: no results there; run compressm reproduce NAME without --show"
        )
    pages = [_TITLE]
    try:
        if markdown is not None:
            (markdown.parent / "images").mkdir(exist_ok=True)
            pages += [_overview(found, markdown.parent), _HOW_TO_READ]
        for name, stored in found.items():
            if not stored:
                continue
            Console().print(table(experiment(name), stored))
            if markdown is not None:
                image = f"images/results-{name}.svg"
                draw(experiment(name), stored, markdown.parent / image)
                pages.append(render(experiment(name), stored, image))
                pages += equal_compute.render(experiment(name), stored)
        if markdown is not None:
            write_text(markdown, "\n".join(pages))
        if picture is not None:
            if len(names) != 1:
                raise ConfigError("--picture: draws one experiment; name it")
            draw(experiment(names[0]), found[names[0]], picture)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written ({error.strerror}); choose another place") from error


def _overview(found: Mapping[str, Results], folder: Path) -> str:
    """The page's first screen, whose figure goes to the folder of the page."""
    stored = {name: (experiment(name), results) for name, results in found.items() if results}
    draw_overview(stored, folder / "images" / "results.svg")
    return render_overview(stored, "images/results.svg")


__all__ = ["list_experiments", "run_experiment", "show_experiments"]
