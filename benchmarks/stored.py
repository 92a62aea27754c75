"""How benchmarks store what they measured: beside the figures, the exact command and the versions."""

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
