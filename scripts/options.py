"""Write docs/options.md from the table of options in compressm.training.options: ``python scripts/options.py``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from compressm.cutting.choosing import Which
from compressm.training.options import ABSENT, OPTIONS, REQUIRED, Option

PAGE = Path(__file__).parent.parent / "docs" / "options.md"

HEAD = """# Options

*Generated from the library's table of options by `python scripts/options.py` (`make pages`). Edit
`compressm/training/options.py`, not this page.*

These are the arguments of [`Compressor`](api.md). A default in the column *once* is that of `compressm.compress`, which
takes the arguments that have one and cuts a single time: a size is then reached at once. A configuration file of
`compressm train` takes the options that are marked under *file*, in its section `compression`, with the same defaults;
there `enabled: false` trains without compression.
"""

PARTS = {
    "goal": (
        "How far",
        "Give exactly one of `tolerance`, `states`, `fraction`, `max_error` and `total_states`; or `max_drop`, with or "
        "without one of them.",
    ),
    "schedule": ("When", "Cuts are equidistant in the window."),
    "cushion": (
        "What if a cut hurts",
        "With `max_drop` every cut is examined, and undone if the metric lost too much. `compress` instead looks for "
        "the largest tolerance at which the metric loses no more than `max_drop`.",
    ),
    "cut": ("How a cut is made", "The defaults are right; the others are there for comparison."),
    "training": ("What else takes part in the training", "A cut changes it, and a roll-back goes back with it."),
}


def values(option: Option) -> str:
    """The values that an option takes."""
    if get_origin(option.type) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(option.type))
    return option.expected if option.bounds or option.type in (bool, Which) else ""


def default(value: Any) -> str:
    """A default, as a cell."""
    if value is ABSENT:
        return ""
    return "required" if value is REQUIRED else f"`{value!r}`"


def row(option: Option) -> str:
    """A line of a table."""
    meaning = re.sub(r"``(.+?)``", r"`\1`", option.help)
    cells = (
        f"`{option.name}`", values(option), default(option.default), default(option.once), "yes" if option.file else "",
        meaning[0].upper() + meaning[1:],
    )  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables() -> Iterator[str]:
    """One table for each part."""
    for part, (title, text) in PARTS.items():
        yield from ("", f"## {title}", "", text, "")
        yield "| option | values | default | once | file | meaning |"
        yield "|---|---|---|---|---|---|"
        yield from (row(option) for option in OPTIONS.values() if option.part == part)


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD.rstrip(), *tables()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/options.md from the table of options.")
    parser.add_argument("--output", type=Path, default=PAGE, help="write the page to this file")
    parser.parse_args().output.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
