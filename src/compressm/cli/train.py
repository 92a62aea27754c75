"""``compressm train``."""

from pathlib import Path
from typing import Annotated

import typer

from compressm.cli.common import write_result
from compressm.cli.options import JsonFile, command_line


def train(
    context: typer.Context,
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file, or a built-in one: digits, demo, smnist, psmnist, smnist-mamba, scifar, listops or imdb.",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="For example optimizer.lr=1e-3.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the run's folder.")] = False,
    origin: Annotated[
        Path | None,
        typer.Option("--from", help="Folder of the same run without compression; its steps are not made again."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder [runs/CONFIG-seedN].")] = None,
    json: JsonFile = None,
) -> None:
    """Train a model, and compress it meanwhile."""
    from compressm.lab.config import load_config
    from compressm.lab.runs.loop import train as run

    settings = load_config(config, overrides or [])
    if output is None and settings.run.output is None:
        output = Path("runs") / f"{config.stem}-seed{settings.run.seed}"
    result = run(settings, output=output, resume=resume, origin=origin, command=command_line(context))
    write_result(json, result.to_dict())
