"""Functions that all commands share: they report errors and write results."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal, Protocol

from compressm.errors import ConfigError


def fail(message: str) -> int:
    """Print one line about a user's mistake on standard error.

    Returns:
        the exit code of a mistake, 2.
    """
    # A file or an argument may contain control characters, which must not reach the terminal.
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    return 2


def printed(path: Path | None) -> bool:
    """Whether ``--json -`` asks for the result on standard output, which then holds nothing else."""
    return str(path) == "-"


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write the machine-readable result to a file, or print it for ``-``. Without a path nothing is written."""
    if path is None:
        return
    from compressm.runtime.files import finite, write_json

    if printed(path):
        print(json.dumps(finite(result), indent=1))
    else:
        write_json(path, finite(result))


@contextlib.contextmanager
def spoken_at(quiet: bool, verbose: bool, to_output: bool) -> Generator[None]:
    """Run a command quietly, verbosely, or as it is.

    Args:
        quiet: nothing reaches the terminal. An error is reported by `compressm.cli.main`, outside of this.
        verbose: versions before, the time after, and the traceback of an error, on standard error.
        to_output: the result goes to standard output (``--json -``), also with ``quiet``.

    Raises:
        ConfigError: both.
    """
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose contradict each other: leave one out")
    if verbose:
        with _verbose():
            yield
    elif quiet:
        with contextlib.ExitStack() as stack:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            if not to_output:
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    else:
        yield


@contextlib.contextmanager
def _verbose() -> Generator[None]:
    import platform

    import torch

    from compressm import __version__

    start = time.perf_counter()
    print(
        f"compressm {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads",
        file=sys.stderr,
    )
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise
    finally:
        print(f"took {time.perf_counter() - start:.1f} s", file=sys.stderr)


class Drawable(Protocol):
    """Something that can be plotted."""

    def plot(self, backend: Literal["plotly", "matplotlib"] | None = None) -> Any:
        """A figure of plotly or of matplotlib."""
        ...


def draw(what: Drawable, path: Path) -> None:
    """Draw a picture into a file: a page with plotly's if its name ends with ``.html``, otherwise matplotlib's.

    Raises:
        ConfigError: the file cannot be written.
    """
    from compressm.runtime.files import replacing

    try:
        with replacing(path) as new:
            if path.suffix == ".html":
                what.plot("plotly").write_html(new)
            else:
                what.plot("matplotlib").savefig(new, dpi=150, format=path.suffix[1:])
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error.strerror}); choose another place") from error


__all__ = ["draw", "fail", "printed", "spoken_at", "write_result"]
