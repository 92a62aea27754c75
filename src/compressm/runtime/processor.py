"""What the machine's processor is called."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """The model's name where the system tells it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


__all__ = ["processor_name"]
