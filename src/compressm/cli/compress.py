"""``compressm compress``."""

from pathlib import Path
from typing import Annotated, Any, Literal

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
    StateBits,
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
    max_reduction: Annotated[
        float | None,
        typer.Option(help="Remove at most this share of a layer's states [half, under rules of quality]."),
    ] = None,
    multiple_of: Annotated[int, typer.Option(help="Prefer state dimensions that are a multiple of this.")] = 1,
    target: TargetName = None,
    sort: Annotated[
        bool,
        typer.Option("--sorted", help="Cut nothing: put the states in order of worth, for `compressm slice`."),
    ] = False,
    gramians: Annotated[
        Literal["white", "loss"] | None,
        typer.Option(help="Balance by white noise, or by data and loss [loss with --max-loss, else white]."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to cut by, and as many to measure the loss on.")] = 32,
    length: Length = 512,
    memory: MemorySize = None,
    state_bits: StateBits = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens per second on this machine.")] = False,
    recover: Annotated[
        int | None,
        typer.Option(metavar="STEPS", help="Train this many steps after the cut, with the uncut model as teacher."),
    ] = None,
    recover_lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Recover by LoRA of this rank, merged at the end [all weights].")
    ] = None,
    recover_rate: Annotated[
        float | None, typer.Option(help="Largest learning rate of the recovery [2e-4, with LoRA 1e-3].")
    ] = None,
    json: JsonFile = None,
) -> None:
    """Cut a trained checkpoint once, and show what was lost."""
    from compressm.cutting.serving import parse_bytes
    from compressm.lab.one_shot import compress_checkpoint
    from compressm.lab.recovering import wanted

    if output is None and not dry_run:
        raise ConfigError("--output: missing; name a new folder for the smaller checkpoint, or try with --dry-run")
    if sort:
        _refuse_cuts(context)
        _sort(context, checkpoint, output, data, model, gramians, sequences, length, json)
        return
    loss = compress_checkpoint(
        checkpoint, None if dry_run else output, data, build=model, states=states, tolerance=tolerance,
        fraction=fraction, max_error=max_error, total_states=total_states, max_loss=max_loss, max_drop=max_drop,
        metric=metric, max_reduction=max_reduction, multiple_of=multiple_of, target=target, gramians=gramians,
        sequences=sequences, length=length, memory=None if memory is None else parse_bytes(memory), speed=speed,
        state_bits=state_bits, recovery=wanted(data, recover, recover_lora, recover_rate),
        command=command_line(context),
    )  # fmt: skip
    if not printed(json):
        print(loss)
    write_result(json, {"command": command_line(context), "output": output and str(output), **loss.to_dict()})


def _refuse_cuts(context: typer.Context) -> None:
    """Refuse options that ask for a cut beside ``--sorted``."""
    cuts = ("states", "tolerance", "fraction", "max_error", "total_states", "max_loss", "max_drop", "metric")
    cuts += ("max_reduction", "target", "memory", "dry_run", "speed", "recover", "state_bits")
    given = [name for name in cuts if context.params.get(name)] + ["multiple_of"] * (context.params["multiple_of"] != 1)
    if given:
        raise ConfigError(
            f"--sorted cuts nothing, and --{given[0].replace('_', '-')} is about a cut: leave it out, and cut the "
            "sorted checkpoint by compressm slice"
        )


def _sort(
    context: typer.Context, checkpoint: Path, output: Path | None, data: str | None, model: str | None,
    gramians: Any, sequences: int, length: int, json: Path | None,
) -> None:  # fmt: skip
    from compressm.lab.slicing import sort_checkpoint

    assert output is not None
    done = sort_checkpoint(checkpoint, output, data, build=model, gramians=gramians, sequences=sequences, length=length)
    if not printed(json):
        print(done)
    write_result(json, {"command": command_line(context), "output": str(output), **done.to_dict()})
