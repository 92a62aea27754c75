"""``compressm slice``."""

from pathlib import Path
from typing import Annotated

import typer

from compressm.cli.common import printed, write_result
from compressm.cli.options import Checkpoint, JsonFile, MemorySize, OwnModel, TargetName, command_line


def slice_(
    context: typer.Context,
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option(help="Folder for the smaller checkpoint.")],
    model: OwnModel = None,
    states: Annotated[int | None, typer.Option(help="State dimension to cut every layer to.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the states to keep.")] = None,
    multiple_of: Annotated[int, typer.Option(help="Prefer state dimensions that are a multiple of this.")] = 1,
    target: TargetName = None,
    memory: MemorySize = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens per second on this machine.")] = False,
    json: JsonFile = None,
) -> None:
    """Cut a checkpoint of `compress --sorted` to any size.

    This needs no data.
    """
    from compressm.cutting.serving import parse_bytes
    from compressm.lab.slicing import slice_checkpoint

    done = slice_checkpoint(
        checkpoint, output, build=model, states=states, fraction=fraction, multiple_of=multiple_of, target=target,
        memory=None if memory is None else parse_bytes(memory), speed=speed,
    )  # fmt: skip
    if not printed(json):
        print(done)
    write_result(json, {"command": command_line(context), "output": str(output), **done.to_dict()})
