"""``compressm report``."""

from pathlib import Path
from typing import Annotated

import typer

from compressm.cli.options import command_line, file_option


def report(
    context: typer.Context,
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or of saved models, or result files.")
    ],
    output: Annotated[Path, file_option(help="The HTML file.")] = Path("report.html"),
) -> None:
    """Write an HTML page about one run, or several side by side.

    The page opens in a browser, offline.
    """
    from compressm.lab.pages import load_runs, write_page

    write_page(load_runs(runs), output, command_line(context))
    print(f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)")
