"""The commands, put together."""

# No `from __future__ import annotations`: typer reads the annotations.

from typing import Annotated

import typer

from compressm.cli.analyze import analyze
from compressm.cli.bench import bench
from compressm.cli.compress import compress
from compressm.cli.demo import demo
from compressm.cli.export import export
from compressm.cli.import_ import import_
from compressm.cli.probe import probe
from compressm.cli.report import report
from compressm.cli.reproduce import reproduce
from compressm.cli.train import train


def make_app() -> typer.Typer:
    """The command line as typer runs it; the help lists the commands in this order."""
    app = typer.Typer(
        help="In-training compression of state space models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(common)
    app.command()(train)
    app.command()(probe)
    app.command()(demo)
    app.command()(reproduce)
    app.command("import")(import_)
    app.command()(report)
    app.command()(analyze)
    app.command()(compress)
    app.command()(bench)
    app.command()(export)
    return app


def print_version(wanted: bool) -> None:
    """Print the version and leave, if ``--version`` was given."""
    if wanted:
        from compressm import __version__

        print(f"compressm {__version__}")
        raise typer.Exit


def common(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Nothing. The options that stand before a command do their work in their callbacks."""


__all__ = ["make_app"]
