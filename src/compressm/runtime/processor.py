"""What the machine's processor is called."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """The model's name where the system tells it, else the architecture.

    Virtual machines call processors of several generations by one name, such as "AMD EPYC", so that family and model
    are added where they are told: times of two generations differ by a factor of five.
    """
    said: dict[str, str] = {}
    if CPUINFO.exists():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            said.setdefault(key.strip(), value.strip())
    if "model name" not in said:
        return platform.processor() or platform.machine()
    if "cpu family" in said and "model" in said:
        return f"{said['model name']} (family {said['cpu family']}, model {said['model']})"
    return said["model name"]


__all__ = ["processor_name"]
