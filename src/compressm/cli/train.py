"""``compressm train``."""

from pathlib import Path
from typing import Annotated

import typer

from compressm.cli.common import write_result
from compressm.cli.options import (
    JsonFile,
    MaxDrop,
    MaxError,
    MetricName,
    OwnModel,
    TrainingData,
    command_line,
    config_or_own,
)  # fmt: skip


def train(
    context: typer.Context,
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file, or a built-in one: digits, demo, forecast, byte-lm, wikitext, smnist, psmnist, "
            "smnist-mamba, scifar, fsdd, listops, mqar or imdb; needed unless --model and --data are given.",
            show_default=False,
        ),
    ] = Path(),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="For example optimizer.lr=1e-3.")
    ] = None,
    model: OwnModel = None,
    data: TrainingData = None,
    states: Annotated[int | None, typer.Option(help="State dimension to arrive at.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Share of the Hankel energy that a cut may discard.")] = None,
    max_error: MaxError = None,
    max_drop: MaxDrop = None,
    metric: MetricName = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Train nothing: print the plan.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the run's folder.")] = False,
    origin: Annotated[
        Path | None,
        typer.Option("--from", help="Folder of the same run without compression; its steps are not made again."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder [runs/CONFIG-seedN].")] = None,
    json: JsonFile = None,
) -> None:
    """Train a model, and compress it while it trains."""
    from compressm.lab.config import load_config
    from compressm.lab.runs.loop import train as run

    config, given = config_or_own(config, overrides, model, data)
    rules = {"states": states, "tolerance": tolerance, "max_error": max_error, "max_drop": max_drop}
    how_far = {name: value for name, value in rules.items() if value is not None}
    if metric is not None:
        given.append(f"run.metric={metric}")
    settings = load_config(config, given, build=model, source=data, how_far=how_far)
    if output is None and settings.run.output is None:
        output = Path("runs") / f"{config.stem}-seed{settings.run.seed}"
    if dry_run:
        from compressm.lab.runs.dry import described

        print(described(settings, output or Path(settings.run.output or "runs")))
        return
    result = run(settings, output=output, resume=resume, origin=origin, command=command_line(context))
    write_result(json, result.to_dict())
