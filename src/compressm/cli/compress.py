"""``compressm compress``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from compressm.cli.common import printed, write_result
from compressm.cli.options import (
    Checkpoint,
    JsonFile,
    Length,
    MaxDrop,
    MaxError,
    MemorySize,
    MetricName,
    OwnData,
    OwnModel,
    TargetName,
    command_line,
)
from compressm.errors import ConfigError


def compress(
    context: typer.Context,
    checkpoint: Checkpoint,
    output: Annotated[Path | None, typer.Option(help="Folder for the smaller checkpoint.")] = None,
    data: OwnData = None,
    model: OwnModel = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing: show what would be lost.")] = False,
    states: Annotated[int | None, typer.Option(help="State dimension to cut every layer to.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Share of the Hankel energy to discard.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the states to keep.")] = None,
    max_error: MaxError = None,
    total_states: Annotated[int | None, typer.Option(help="States of all layers together.")] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="Rise of the loss that the cut may cost, in nats per prediction.")
    ] = None,
    max_drop: MaxDrop = None,
    metric: MetricName = None,
    multiple_of: Annotated[int, typer.Option(help="Prefer state dimensions that are a multiple of this.")] = 1,
    target: TargetName = None,
    gramians: Annotated[
        Literal["white", "loss"] | None,
        typer.Option(help="Balance by white noise, or by data and loss [loss with --max-loss, else white]."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to cut by, and as many to measure the loss on.")] = 32,
    length: Length = 512,
    memory: MemorySize = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens per second on this machine.")] = False,
    json: JsonFile = None,
) -> None:
    """Cut a trained checkpoint once, and show what was lost."""
    from compressm.cutting.serving import parse_bytes
    from compressm.lab.one_shot import compress_checkpoint

    if output is None and not dry_run:
        raise ConfigError("--output: missing; name a new folder for the smaller checkpoint, or try with --dry-run")
    loss = compress_checkpoint(
        checkpoint, None if dry_run else output, data, build=model, states=states, tolerance=tolerance,
        fraction=fraction, max_error=max_error, total_states=total_states, max_loss=max_loss, max_drop=max_drop,
        metric=metric, multiple_of=multiple_of, target=target, gramians=gramians, sequences=sequences, length=length,
        memory=None if memory is None else parse_bytes(memory), speed=speed,
    )  # fmt: skip
    if not printed(json):
        print(loss)
    write_result(json, {"command": command_line(context), "output": output and str(output), **loss.to_dict()})
