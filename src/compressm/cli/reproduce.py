"""``compressm reproduce``."""

from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Annotated, Literal

import typer

from compressm.cli.options import PICTURES, MarkdownFile, command_line, file_option


def reproduce(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="An experiment; without one they are listed.")] = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds, from 0 [the experiment's].")] = None,
    arms: Annotated[str | None, typer.Option(help="Only these ways of training, by commas.")] = None,
    steps: Annotated[int | None, typer.Option(min=20, help="Training steps of each run.")] = None,
    data: Annotated[Path | None, typer.Option(help="Directory with the data [$COMPRESSM_DATA].")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time [one per CPU].")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the results, one JSON file per run.")] = Path("results"),
    runs: Annotated[Path, typer.Option(help="Folder of unfinished runs.")] = Path("runs"),
    cluster: Annotated[
        Literal["slurm", "local"] | None, typer.Option(help="Make every run a job of this scheduler (submitit).")
    ] = None,
    cluster_options: Annotated[
        str | None, typer.Option(help="Options of the jobs: timeout_min=600,slurm_partition=gpu.")
    ] = None,
    picture: Annotated[Path | None, file_option(help="Draw the comparison into this file.", endings=PICTURES)] = None,
    markdown: MarkdownFile = None,
    show: Annotated[bool, typer.Option("--show", help="Train nothing: the table of what is stored.")] = False,
) -> None:
    """Repeat a comparison of the paper, or of our results.

    It goes run by run. After a kill the same command goes on where it stopped.
    """
    from compressm.lab.reproduce import command

    chosen = None if arms is None else [arm.strip() for arm in arms.split(",")]
    if not name and not show:
        command.list_experiments()
        return
    if not show:
        executor = None if cluster is None else _jobs(cluster, cluster_options, runs / "jobs")
        command.run_experiment(
            name, seeds, chosen, results, runs, steps=steps, data=data and str(data), workers=workers,
            command=command_line(context), executor=executor,
        )  # fmt: skip
    command.show_experiments([name] if name else [], results, markdown, picture)


def _jobs(cluster: Literal["slurm", "local"], options: str | None, folder: Path) -> Callable[[int], Executor]:
    """A factory of executors that submit runs as jobs to a scheduler. Their logs are written to ``folder``."""
    from compressm.lab.reproduce.cluster import on_cluster, parse_options

    return on_cluster(cluster, folder, parse_options(options))
