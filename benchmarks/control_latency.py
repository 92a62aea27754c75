"""What a step of a reduced model costs in C: the chain of masses of docs/control-tutorial.md at several orders.

    python benchmarks/control_latency.py [--json results/control.json] [--picture docs/images/control.png]

Prints the table of that page, from the code that `compressm.saving.c_code.to_c` writes, compiled by ``cc -O2``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import signal

import compressm
from compressm.saving.c_code import to_c

ERRORS = (0.0, 0.001, 0.05, 0.5)


def plant(masses: int = 20) -> Any:
    """Masses between springs and dampers: a force on the first, the place of the last."""
    stiffness = 2 * np.eye(masses) - np.eye(masses, k=1) - np.eye(masses, k=-1)
    damping = 0.1 * stiffness + 0.02 * np.eye(masses)
    A = np.block([[np.zeros((masses, masses)), np.eye(masses)], [-stiffness, -damping]])
    eye = np.eye(2 * masses)
    return signal.StateSpace(A, eye[:, [masses]], eye[[masses - 1]], np.zeros((1, 1)))


def row(error: float) -> dict[str, Any]:
    """Reduce, write and time one system."""
    reduced = compressm.reduce(plant(), error=error, dt=0.1, discretise="bilinear")
    with tempfile.TemporaryDirectory() as folder:
        reports = [to_c(reduced.system, Path(folder) / "chain.c") for _ in range(5)]
    best = min(reports, key=lambda report: report.nanoseconds or float("inf"))
    bound, found = reduced.certificate.bound, reduced.certificate.hinf_error
    return {"error": error, "bound": bound, "hinf_error": found, **asdict(best), "path": "chain.c"}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| `error=` | order | error found | its bound | multiplications | state | constants | a step, one x86 core |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in rows:
        error = f"{one['error']:g}" if one["error"] else "0 (nothing cut)"
        lines.append(
            f"| {error} | {one['order']} | {one['hinf_error']:.2g} | {one['bound']:.2g} | {one['multiplications']} | "
            f"{one['state_bytes']} B | {one['constant_bytes']} B | {one['nanoseconds']:.0f} ns |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a reduced model in C.")
    parser.add_argument("--json", type=Path, help="store the rows here")
    parser.add_argument("--picture", type=Path, help="draw the plot of the page here")
    arguments = parser.parse_args()
    rows = [row(error) for error in ERRORS]
    print(table(rows))
    if arguments.json:
        command = "python benchmarks/" + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        arguments.json.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    if arguments.picture:
        reduced = compressm.reduce(plant(), error=0.05, dt=0.1, discretise="bilinear")
        reduced.plot().savefig(arguments.picture, dpi=100)


if __name__ == "__main__":
    main()
