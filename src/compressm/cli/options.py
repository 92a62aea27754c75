"""Arguments and options that several commands share, and the command line that a result records.

This module and those of the commands import typer, so `compressm.cli.main` imports them only when it needs them.
"""

# No `from __future__ import annotations` here, nor in the modules of the commands: typer reads the annotations.

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from compressm.errors import ConfigError

PICTURES = (".png", ".svg", ".pdf")


def file_option(*names: str, help: str, endings: Sequence[str] = ()) -> Any:
    """An option for an output file. The path is checked before the work begins."""

    def check(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
        if path is None or str(path) == "-":
            return path
        given = f"{parameter.opts[0]} {path}"
        if endings and path.suffix not in endings:
            raise ConfigError(f"{given}: the name must end with {' or '.join(endings)}")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"{given}: its folder does not exist; create it or choose another place")
        return path

    return typer.Option(*names, help=help, callback=check)


def command_line(context: typer.Context) -> str:
    """The exact command line, for the record."""
    return context.obj


def config_or_own(
    config: Path, overrides: Sequence[str] | None, model: str | None, data: str | None
) -> tuple[Path, list[str]]:
    """The configuration and the overrides of a command whose CONFIG may be left out for a model and data of one's own.

    Raises:
        ConfigError: neither a configuration, nor both a model and data.
    """
    from compressm.lab.config import OWN

    given = list(overrides or [])
    if "=" in config.name and not config.exists():  # no CONFIG, and the first argument is a key=value
        given, config = [str(config), *given], Path()
    if config != Path():
        return config, given
    if model is None or data is None:
        raise ConfigError("CONFIG: missing; name a YAML file or a built-in one, or give both --model and --data")
    return OWN, given


JsonFile = Annotated[Path | None, file_option("--json", help="Write the result to this file; - prints it.")]
MarkdownFile = Annotated[Path | None, file_option("--markdown", help="Write the table to this file.")]
Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="A Hugging Face folder, or our own; with --model also a .safetensors file."
    ),
]
OwnModel = Annotated[
    str | None,
    typer.Option("--model", help="package.module:function that builds the model, for a class of your own."),
]
OwnData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Text, .npz, .npy, .csv or .parquet, a folder of them, or package.module:function. Needed for layers "
        "whose states depend on the data, and to measure the loss.",
    ),
]
TrainingData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Data of your own: text, .npz, .csv or .parquet, a folder of them, or package.module:function.",
    ),
]
MaxError = Annotated[
    float | None, typer.Option("--max-error", help="H-infinity error that each layer may make, in output per input.")
]
MaxDrop = Annotated[
    float | None,
    typer.Option("--max-drop", help="Most that the metric may lose by a cut, in its own units: 0.01 of an accuracy."),
]
MetricName = Annotated[
    Literal["accuracy", "r2", "fit", "mse", "perplexity"] | None,
    typer.Option(
        "--metric", help="Measure it beside the loss [accuracy of classes, r2 of numbers, perplexity of text]."
    ),
]
Length = Annotated[int, typer.Option(help="Tokens per sequence.")]
TargetName = Annotated[
    Literal["mamba_ssm", "vllm", "sglang", "flashinfer", "llama.cpp", "transformers"] | None,
    typer.Option("--target", help="Cut only to sizes that these kernels or this server take."),
]
MemorySize = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Say how many sequences fit into it, such as 40GB.")
]
StateBits = Annotated[
    int | None,
    typer.Option("--state-bits", metavar="8", help="Simulate states in 8 bits: bytes, and what rounding costs."),
]

__all__ = [
    "PICTURES",
    "Checkpoint",
    "JsonFile",
    "Length",
    "MarkdownFile",
    "MaxDrop",
    "MaxError",
    "MemorySize",
    "MetricName",
    "OwnData",
    "OwnModel",
    "StateBits",
    "TargetName",
    "command_line",
    "file_option",
]
