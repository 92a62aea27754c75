"""Write docs/bench.md: every stored row of ``compressm bench``: ``python scripts/bench.py``.

``compressm bench SUITE --json results/bench/SUITE.json`` stores what the page is made of. ``python scripts/bench.py
--before COMMIT`` keeps the ratios that were stored at an earlier commit, which then stand beside those of ``all``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from compressm.lab.bench.results import COLUMNS, cells, number

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "results" / "bench"
BEFORE = "before.json"
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


def shown(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that were measured."""
    return [row for row in result["rows"] if row["reason"] is None]


def section(name: str, result: dict[str, Any]) -> list[str]:
    """A suite's machine, table and command; rows whose peer was not there are left out."""
    m, rates = result["machine"], result["rates"]
    return [
        f"\n## {TITLES[name]}\n",
        f"{m['cpu']}, {m['threads']} threads: matrix product {number(rates['gflops'])} GFLOP/s, "
        f"{number(rates['gexps'])} · 10⁹ exponentials/s, memory {number(rates['gbytes'])} GB/s. "
        f"PyTorch {result['versions']['torch']}. `{result['command']}`\n",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|---|" + "---:|" * (len(COLUMNS) - 3),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in shown(result)),
    ]


def compared(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """The ratios of an earlier commit beside those of now, for the rows that both have."""
    earlier = {row["name"]: row for row in before["rows"]}
    lines = [
        f"\nThe same ratios at commit {before['commit'][:7]}, some of them taken on other machines:\n",
        "| row | peer / ours, then | now | ours / limit, then | now | then on |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in shown(now):
        then = earlier.get(row["name"])
        if then is not None:
            pairs = [number(one[what]) for what in ("ratio", "of_roofline") for one in (then, row)]
            lines.append(f"| {row['name']} | {' | '.join(pairs)} | {then['cpu']} |")
    return lines


def kept(commit: str) -> dict[str, Any]:
    """The ratios of all suites that an earlier commit has stored; of rows in several, those of one run of all."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    rows: list[dict[str, Any]] = []
    paths = [path for path in git("ls-tree", "--name-only", commit, "results/bench/").split() if BEFORE not in path]
    for path in sorted(paths, key=lambda path: path.endswith("/all.json")):  # of two rows of one name the last counts
        result = json.loads(git("show", f"{commit}:{path}"))
        cpu = f"{result['machine']['cpu']}, {number(result['rates']['gflops'])} GFLOP/s"
        rows += [{"cpu": cpu, **{key: row[key] for key in ("name", "ratio", "of_roofline")}} for row in shown(result)]
    return {"commit": git("rev-parse", commit).strip(), "rows": rows}


def read(name: str) -> dict[str, Any] | None:
    """What is stored under a name; None where nothing is."""
    path = STORED / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/bench.md from results/bench.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "bench.md")
    parser.add_argument("--before", metavar="COMMIT", help="keep the ratios that were stored at this commit")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if arguments.before is not None:
        (STORED / BEFORE).write_text(json.dumps(kept(arguments.before), indent=1) + "\n", encoding="utf-8")
    lines, before = [HEAD.rstrip("\n")], read(BEFORE)
    for name in TITLES:
        result = read(f"{name}.json")
        if result is not None:
            lines += section(name, result)
        if name == "all" and result is not None and before is not None:
            lines += compared(result, before)
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
