"""How benchmarks store what they measured, beside the exact command and the versions, and write tables into pages."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import compressm


def store(path: Path, **content: Any) -> None:
    """Write a result file; its folder is created if needed."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "compressm": compressm.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": "python " + shlex.join(sys.argv), "versions": versions, **content}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def between(page: str, begin: str, end: str, text: str) -> str:
    """The page with this text between two lines of it, instead of what stands there."""
    before, rest = page.split(f"{begin}\n")
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def rewrite(page: Path, with_table: Callable[[str, list[dict[str, Any]]], str], rows: list[dict[str, Any]]) -> None:
    """Write the tables of these rows into a page of the documentation."""
    page.write_text(with_table(page.read_text(encoding="utf-8"), rows), encoding="utf-8")


def stored_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def add_files(parser: argparse.ArgumentParser, name: str, page: Path) -> None:
    """The options of a benchmark whose trainings are kept one by one, so that it goes on where it was stopped."""
    parser.add_argument("--parts", type=Path, default=Path("runs", name), help="where finished trainings are kept")
    parser.add_argument("--json", type=Path, default=Path("results", f"{name}.json"))
    parser.add_argument("--table", action="store_true", help=f"only write the stored rows into docs/{page.name}")
