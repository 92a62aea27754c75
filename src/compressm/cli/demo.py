"""``compressm demo``."""

from pathlib import Path
from typing import Annotated

import typer

from compressm.cli.common import write_result
from compressm.cli.options import PICTURES, JsonFile, command_line, file_option


def demo(
    context: typer.Context,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 4,
    steps: Annotated[int | None, typer.Option(min=40, help="Training steps of each run [1500].")] = None,
    picture: Annotated[Path, file_option(help="Where to draw the picture.", endings=PICTURES)] = Path("demo.png"),
    json: JsonFile = None,
) -> None:
    """Train big, shrink, compare: handwritten digits, two minutes.

    On two cores without AVX-512 it takes six to ten.
    """
    from compressm.lab.demo import run_demo

    write_result(json, run_demo(seeds=seeds, steps=steps, picture=picture, command=command_line(context)))
