"""``compressm analyze``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from compressm.cli.common import draw, printed, write_result
from compressm.cli.options import PICTURES, Checkpoint, JsonFile, Length, command_line, file_option


def analyze(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: Annotated[
        Path | None, typer.Option(help="As for compress; needed for layers whose states depend on the data.")
    ] = None,
    gramians: Annotated[
        Literal["white", "loss"] | None,
        typer.Option(help="'loss' also shows what states are worth to the loss; needs --data."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to look at.")] = 32,
    length: Length = 512,
    plot: Annotated[
        Path | None, file_option(help="Draw the spectra into this file.", endings=(".html", *PICTURES))
    ] = None,
    json: JsonFile = None,
) -> None:
    """Show how many states each layer of a trained model really uses, and what a cut would save."""
    from rich.console import Console

    from compressm.lab.one_shot import analyze_checkpoint

    analysis = analyze_checkpoint(checkpoint, data, sequences=sequences, length=length, gramians=gramians)
    if not printed(json):
        Console().print(analysis.table())
        for line in filter(None, (*analysis.refusals, analysis.spectrum.advice())):
            print(line)
    if plot is not None:
        draw(analysis.spectrum, plot)
    write_result(json, {"command": command_line(context), **analysis.to_dict()})
