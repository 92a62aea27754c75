"""Rebuild the pages that are generated from stored results, or show where they differ from what is in docs/.

    python scripts/pages.py            write them into docs/
    python scripts/pages.py --check    write them into a temporary folder and compare; exit status 1 on any difference

Nothing is measured: `python scripts/families.py --measure`, `compressm reproduce` and the benchmarks store what the
pages are made of.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SHOWN = 60  # lines of a difference


@dataclass(frozen=True)
class Page:
    """A generated page.

    Attributes:
        name: of the file in docs/.
        command: writes the page; the page itself names this command at its top.
        option: of the command, for another file to write to.
        pictures: pattern of the files in docs/ that the command draws as well.
    """

    name: str
    command: str
    option: str = "--output"
    pictures: str | None = None


PAGES = (
    Page("families.md", "python scripts/families.py"),
    Page("bench.md", "python scripts/bench.py"),
    Page("cases.md", "python scripts/cases.py"),
    Page("paper.md", "python scripts/paper.py"),
    Page("state-classes.md", "python scripts/state_classes.py"),
    Page("options.md", "python scripts/options.py"),
    Page("reference.md", "python scripts/reference.py"),
    Page("savings.md", "python scripts/savings.py"),
    Page("serving.md", "python scripts/serving.py"),
    Page("situations.md", "python scripts/hosts.py"),
    Page("mistakes.md", "python scripts/mistakes.py"),
    Page("results.md", "compressm reproduce --show", "--markdown", "images/results*.svg"),
)


class PageError(Exception):
    """A page that cannot be generated, or does not say how it was."""


def build(page: Page, folder: Path) -> None:
    """Write one page and its pictures into a folder."""
    program, *arguments = shlex.split(page.command)
    start = [sys.executable] if program == "python" else [sys.executable, "-m", program]
    command = [*start, *arguments, page.option, str(folder / page.name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise PageError(f"`{page.command}` failed with exit status {done.returncode}:\n{done.stdout}{done.stderr}")
    head = "\n".join((folder / page.name).read_text(encoding="utf-8").splitlines()[:8])
    if f"`{page.command}" not in head:
        raise PageError(f"docs/{page.name}: its first lines must name the command that generates it, `{page.command}`")


def files(page: Page, folder: Path) -> set[str]:
    """The page and its pictures, as far as they are in a folder."""
    patterns = [page.name, page.pictures] if page.pictures else [page.name]
    return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}


def differences(page: Page, folder: Path) -> Iterator[str]:
    """What differs between docs/ and a folder that holds the page as it is generated now."""
    stored, made = files(page, DOCS), files(page, folder)
    for name in sorted(stored | made):
        if name not in made:
            yield f"docs/{name}: stored, but `{page.command}` does not write it"
        elif name not in stored:
            yield f"docs/{name}: missing, and `{page.command}` writes it"
        else:
            old, new = (path.read_text(encoding="utf-8").splitlines() for path in (DOCS / name, folder / name))
            names = (f"docs/{name} (stored)", f"docs/{name} (generated)")
            lines = list(difflib.unified_diff(old, new, *names, lineterm=""))
            yield from (line[:240] for line in lines[:SHOWN])
            if len(lines) > SHOWN:
                yield f"... and {len(lines) - SHOWN} more lines of docs/{name}"


def store(page: Page, folder: Path) -> None:
    """Put the page and its pictures into docs/ in place of those that are there."""
    made = files(page, folder)
    for name in files(page, DOCS) - made:
        (DOCS / name).unlink()
    for name in made:
        shutil.copyfile(folder / name, DOCS / name)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rebuild the pages that are generated from stored results.")
    parser.add_argument("--check", action="store_true", help="compare only; exit status 1 on any difference")
    check = parser.parse_args(given).check
    same = True
    for page in PAGES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            try:
                build(page, folder)
            except PageError as error:
                print(error, file=sys.stderr)
                return 1
            if not check:
                store(page, folder)
                print(f"docs/{page.name}: written")
                continue
            found = list(differences(page, folder))
            print("\n".join(found) if found else f"docs/{page.name}: as generated", flush=True)
            same = same and not found
    if not same:
        print("Generated pages differ from docs/: run `make pages` and commit what it writes.", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
