"""Functions that all commands share: they report errors and write results."""

from __future__ import annotations

import json
import sys
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


__all__ = ["draw", "fail", "printed", "write_result"]
