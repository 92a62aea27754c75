"""``compressm probe``."""

from pathlib import Path
from typing import Annotated

import typer

from compressm.cli.common import draw, printed, write_result
from compressm.cli.options import PICTURES, JsonFile, OwnModel, TrainingData, command_line, config_or_own, file_option
from compressm.errors import ConfigError


def probe(
    context: typer.Context,
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="As for train: a YAML file, or a built-in one such as smnist; needed unless --model and --data are "
            "given.",
            show_default=False,
        ),
    ] = Path(),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="For example optimizer.lr=1e-3.")
    ] = None,
    model: OwnModel = None,
    data: TrainingData = None,
    states: Annotated[
        str | None, typer.Option(help="Sizes to compare [model.d_state, a quarter and a sixteenth of it].")
    ] = None,
    share: Annotated[float, typer.Option(help="Steps of each short training, as a share of run.steps.")] = 0.004,
    steps: Annotated[int | None, typer.Option(help="Steps of each short training, instead of a share.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, two or more.")] = 3,
    worth: Annotated[
        float, typer.Option(help="A size may be behind by this share of what is learnt, and still be as good.")
    ] = 0.25,
    output: Annotated[
        Path | None, typer.Option(help="Keep finished short trainings in this folder; a killed probe goes on there.")
    ] = None,
    plot: Annotated[
        Path | None, file_option(help="Draw the metrics into this file.", endings=(".html", *PICTURES))
    ] = None,
    json: JsonFile = None,
) -> None:
    """Find out before a long training whether more states help.

    The answer also says which size to start from.
    """
    from compressm.lab.config import load_config
    from compressm.lab.probing import probe_config

    config, given = config_or_own(config, overrides, model, data)
    settings = load_config(config, given, build=model, source=data)
    found = probe_config(
        settings, states=_sizes(states), share=share, steps=steps, seeds=seeds, worth=worth, folder=output
    )
    if not printed(json):
        print(found)
    if plot is not None:
        draw(found, plot)
    write_result(
        json,
        {"command": command_line(context), "config": settings.model_dump(mode="json"), **found.to_dict()},
    )


def _sizes(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--states {text}: numbers separated by commas were expected, such as 256,64,16") from None
