"""``compressm bench``."""

from pathlib import Path
from typing import Annotated

import typer

from compressm.cli.common import write_result
from compressm.cli.options import PICTURES, JsonFile, MarkdownFile, command_line, file_option


def bench(
    context: typer.Context,
    suites: Annotated[
        list[str],
        typer.Argument(
            metavar="SUITE...",
            help="lru, channels, selective, ssd, gla, delta, reduction, train, mamba2, step; or all.",
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Few repetitions, and no slow rows.")] = False,
    only: Annotated[str | None, typer.Option(metavar="NAME", help="Only rows whose name contains this.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Time against n, length and batch too.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plot: Annotated[Path | None, file_option(help="Draw the sweeps into this file.", endings=PICTURES)] = None,
    markdown: MarkdownFile = None,
    json: JsonFile = None,
) -> None:
    """Measure speed and memory beside other implementations.

    Every row also has the least time that this machine could need.
    """
    from compressm.lab.bench.run import run_bench

    result = run_bench(
        suites, quick=quick, only=only, sweeps=sweep, device=device, picture=plot, table=markdown,
        command=command_line(context),
    )  # fmt: skip
    write_result(json, result)
