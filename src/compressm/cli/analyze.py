"""``compressm analyze``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from compressm.cli.common import draw, printed, write_result
from compressm.cli.options import (
    PICTURES,
    Checkpoint,
    JsonFile,
    Length,
    MemorySize,
    OwnData,
    OwnModel,
    StateBits,
    TargetName,
    command_line,
    file_option,
)


def analyze(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: OwnData = None,
    model: OwnModel = None,
    gramians: Annotated[
        Literal["white", "loss"] | None,
        typer.Option(help="'loss' also shows what states are worth to the loss; needs --data."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to look at.")] = 32,
    length: Length = 512,
    target: TargetName = None,
    memory: MemorySize = None,
    state_bits: StateBits = None,
    plot: Annotated[
        Path | None, file_option(help="Draw the spectra into this file.", endings=(".html", *PICTURES))
    ] = None,
    json: JsonFile = None,
) -> None:
    """Show how many states each layer uses, and what a cut saves."""
    from rich.console import Console

    from compressm.cutting.serving import Serving, parse_bytes
    from compressm.lab.prospects import analyze_checkpoint

    device = None if memory is None else parse_bytes(memory)
    analysis = analyze_checkpoint(
        checkpoint,
        data,
        sequences=sequences,
        length=length,
        gramians=gramians,
        build=model,
        target=target,
        state_bits=state_bits,
    )
    if not printed(json):
        for line in Serving(analysis.memory, analysis.memory, device).lines():
            print(line)
        for line in [] if analysis.bits is None else analysis.bits.lines():
            print(line)
        Console().print(analysis.table())
        for line in filter(None, (*analysis.takers, *analysis.refusals, analysis.spectrum.advice())):
            print(line)
    if plot is not None:
        draw(analysis.spectrum, plot)
    write_result(json, {"command": command_line(context), **analysis.to_dict()})
