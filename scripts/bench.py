"""Write docs/bench.md: every stored row of ``compressm bench``: ``python scripts/bench.py``.

``compressm bench SUITE --json results/bench/SUITE.json`` stores what the page is made of.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compressm.lab.bench.results import COLUMNS, cells, number

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "all": "Everything in one run",
    "lru": "LRU",
    "channels": "S4D and long convolutions",
    "selective": "Mamba's scan",
    "ssd": "Mamba-2's scan",
    "gla": "Gated linear attention",
    "delta": "The delta rule",
    "reduction": "Reductions",
    "train": "A narrow LRU model, before and after a cut",
    "mamba2": "Mamba-2, before and after a cut from 128 states to 16",
    "step": "One token",
}
HEAD = """# Benchmarks

*Generated from stored results by `python scripts/bench.py` (`make pages`). Edit that script, not this page.*

[Speed](speed.md) says what is compared, and what follows from it. *Limit* is the least time that this machine could
need for a row; *MB* the memory of a step; *moved* the least that it reads and writes. Medians, quartiles in brackets.
"""


def section(name: str, result: dict[str, Any]) -> list[str]:
    """A suite's machine, table and command; rows whose peer was not there are left out."""
    m, rates = result["machine"], result["rates"]
    rows = [row for row in result["rows"] if row["reason"] is None]
    return [
        f"\n## {TITLES[name]}\n",
        f"{m['cpu']}, {m['threads']} threads: matrix product {number(rates['gflops'])} GFLOP/s, "
        f"{number(rates['gexps'])} · 10⁹ exponentials/s, memory {number(rates['gbytes'])} GB/s. "
        f"PyTorch {result['versions']['torch']}. `{result['command']}`\n",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|---|" + "---:|" * (len(COLUMNS) - 3),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/bench.md from results/bench.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "bench.md")
    output: Path = parser.parse_args().output
    lines = [HEAD.rstrip("\n")]
    for name in TITLES:
        stored = ROOT / "results" / "bench" / f"{name}.json"
        if stored.exists():
            lines += section(name, json.loads(stored.read_text(encoding="utf-8")))
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
