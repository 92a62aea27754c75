"""How benchmarks store what they measured, beside the exact command and the versions, and write tables into pages."""

from __future__ import annotations

import json
import platform
import shlex
import sys
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
