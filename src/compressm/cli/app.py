"""The commands, put together."""

# No `from __future__ import annotations`: typer reads the annotations.

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from compressm.cli.analyze import analyze
from compressm.cli.bench import bench
from compressm.cli.common import spoken_at
from compressm.cli.compress import compress
from compressm.cli.demo import demo
from compressm.cli.export import export
from compressm.cli.import_ import import_
from compressm.cli.probe import probe
from compressm.cli.report import report
from compressm.cli.reproduce import reproduce
from compressm.cli.slice import slice_
from compressm.cli.train import train


def make_app() -> typer.Typer:
    """The command line as typer runs it; the help lists the commands in this order."""
    app = typer.Typer(
        help="Make state space models smaller while they train.\n\nTo see it work, call `compressm demo`.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(common)
    commands = (train, probe, demo, reproduce, import_, report, analyze, compress, slice_, bench, export)
    for command in commands:
        app.command(command.__name__.rstrip("_"))(with_verbosity(command))
    return app


def with_verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command with the options ``--quiet`` and ``--verbose``, which every command has."""

    @functools.wraps(command)
    def spoken(*args: Any, quiet: bool = False, verbose: bool = False, **kwargs: Any) -> Any:
        with spoken_at(quiet, verbose, to_output=str(kwargs.get("json")) == "-"):
            return command(*args, **kwargs)

    flags = {
        "quiet": ("--quiet", "-q", "Print nothing but errors."),
        "verbose": ("--verbose", "-v", "Print versions and times, and where in the code an error arose."),
    }
    signature = inspect.signature(command)
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option(*words, help=help)],
        )
        for name, (*words, help) in flags.items()
    ]
    parameters = [*(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in signature.parameters.values()), *added]
    setattr(spoken, "__signature__", signature.replace(parameters=parameters))  # noqa: B010  # typer reads it
    spoken.__annotations__ = {one.name: one.annotation for one in parameters}
    return spoken


def print_version(wanted: bool) -> None:
    """Print the version and leave, if ``--version`` was given."""
    if wanted:
        from compressm import __version__

        print(f"compressm {__version__}")
        raise typer.Exit


def common(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Nothing. The options that stand before a command do their work in their callbacks."""


__all__ = ["make_app"]
