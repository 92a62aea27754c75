"""Run the Python blocks of Markdown files, so that README and documentation cannot drift from the code.

    python scripts/run_snippets.py README.md docs/*.md

Every fenced block that opens with ```python is executed. The blocks of one file share one namespace and run in a
temporary folder, from top to bottom. A block is left out if the line above it is ``<!-- snippet: skip -->``.
After a failing block the rest of its file is not run; the other files are. The exit status is 0 if all blocks ran,
1 if one failed, 2 if a file cannot be read as Markdown with closed fences.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
import textwrap
import time
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIP = "<!-- snippet: skip -->"
FENCE = re.compile(r"^\s*(?P<ticks>`{3,}|~{3,})\s*(?P<language>[\w+-]*)")


@dataclass(frozen=True)
class Block:
    """One Python block: its code, the line number of its first line, and whether it is to be left out."""

    code: str
    line: int
    skipped: bool


class MarkdownError(ValueError):
    """A file with a fence that is never closed."""


def python_blocks(text: str) -> Iterator[Block]:
    """Yield the Python blocks of a Markdown text in order; blocks of other languages are passed over."""
    lines = text.splitlines()
    above = ""  # the last line with something on it
    i = 0
    while i < len(lines):
        opening = FENCE.match(lines[i])
        if opening is None:
            above = lines[i].strip() or above
            i += 1
            continue
        ticks = opening["ticks"]
        end = next((j for j in range(i + 1, len(lines)) if closes(lines[j], ticks)), None)
        if end is None:
            raise MarkdownError(f"line {i + 1}: this fence is never closed")
        if opening["language"] == "python":
            code = textwrap.dedent("\n".join(lines[i + 1 : end])) + "\n"
            yield Block(code, line=i + 2, skipped=above == SKIP)
        above = ""
        i = end + 1


def closes(line: str, ticks: str) -> bool:
    """Whether a line closes a fence that was opened with these ticks: the same sign, at least as often, alone."""
    line = line.strip()
    return line.startswith(ticks) and set(line) == {ticks[0]}


def run_file(path: Path, name: Path) -> bool:
    """Run the blocks of one file and say for each how it went, calling the file by this name. True if all ran."""
    blocks = list(python_blocks(path.read_text(encoding="utf-8")))
    if not blocks:
        print(f"{name}: no Python blocks")
    module = types.ModuleType("snippets")
    sys.modules[module.__name__] = module  # dataclasses and the like look their module up
    for block in blocks:
        where = f"{name}:{block.line}"
        if block.skipped:
            print(f"{where} skipped")
            continue
        start = time.perf_counter()
        try:
            # Empty lines in front make the line numbers of a traceback those of the Markdown file.
            code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
            exec(code, module.__dict__)
        except (Exception, SystemExit):
            traceback.print_exc()
            print(f"{where} FAILED", flush=True)
            return False
        print(f"{where} ok ({time.perf_counter() - start:.1f} s)", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the Python blocks of Markdown files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    names: list[Path] = parser.parse_args().files
    failed = False
    for name in names:
        path = name.resolve()  # before the working directory changes
        try:
            with tempfile.TemporaryDirectory() as folder, working_directory(Path(folder)):
                failed |= not run_file(path, name)
        except (OSError, UnicodeDecodeError, MarkdownError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
    return int(failed)


@contextlib.contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Like contextlib.chdir, which Python 3.10 does not have."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    sys.exit(main())
