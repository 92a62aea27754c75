"""``compressm export``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from compressm.cli.common import printed, write_result
from compressm.cli.options import Checkpoint, JsonFile, OwnModel, command_line, file_option
from compressm.errors import ConfigError


def export(
    context: typer.Context,
    checkpoint: Checkpoint,
    model: OwnModel = None,
    format: Annotated[Literal["onnx", "torch"], typer.Option(help="ONNX, or a torch.export program.")] = "onnx",
    step: Annotated[bool, typer.Option("--step", help="One time step, its state as inputs and outputs.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Weights as 8-bit integers; ONNX only.")] = False,
    lengths: Annotated[bool, typer.Option("--lengths", help="A second input: lengths of padded rows.")] = False,
    int8_error: Annotated[
        float,
        typer.Option(help="Most that 8 bits may change the outputs: RMS, in their standard deviations."),
    ] = 0.02,
    data: Annotated[
        str | None,
        typer.Option(
            help="Sequences to check with, in any form that `compress` takes; needed with --model [random ones]."
        ),
    ] = None,
    output: Annotated[Path | None, file_option(help="The file [CHECKPOINT/model-step-int8.onnx].")] = None,
    json: JsonFile = None,
) -> None:
    """Export a model for deployment, and check its outputs."""
    from compressm.lab.one_shot_inputs import read_checkpoint, read_examples
    from compressm.saving.export import to_onnx, to_torch

    if int8 and format == "torch":
        raise ConfigError("--int8 is for --format onnx; leave it out, or export to ONNX")
    if model is not None and data is None:
        raise ConfigError("--model: what a model of your own reads is not known; give some sequences by --data")
    read = read_checkpoint(checkpoint, model)
    if read.format != "compressm":
        raise ConfigError(
            f"{checkpoint} is a checkpoint of {read.format}: its kernels are what serves it; export takes what "
            "compressm.save wrote, and with --model models of your own"
        )
    path = output or (checkpoint.parent if checkpoint.is_file() else checkpoint) / _name(format, step, int8)
    example = None if data is None else read_examples(read, Path(data))
    if format == "onnx":
        report = to_onnx(
            read.model, path, step=step, int8=int8, example=example, int8_error=int8_error, lengths=lengths
        )
    else:
        report = to_torch(read.model, path, step=step, example=example, lengths=lengths)
    if not printed(json):
        print(report)
    write_result(json, {"command": command_line(context), **report.to_dict()})


def _name(format: Literal["onnx", "torch"], step: bool, int8: bool) -> str:
    """The default name of the file."""
    return "model" + "-step" * step + "-int8" * int8 + (".onnx" if format == "onnx" else ".pt2")
