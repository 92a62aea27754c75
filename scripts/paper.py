"""Put the stored comparison of variants into docs/paper.md: ``python scripts/paper.py``."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "results" / "paper_variants.json", ROOT / "docs" / "paper.md"
BEGIN, END = "<!-- begin table: python scripts/paper.py -->\n", "<!-- end table -->"

NAMES = {
    "ours": "all of the circle, as published",
    "norm": "batch norm by running statistics, without scale and shift, as published",
    "dropout": "one dropout mask for all sequences of a batch, as published",
    "inputs": "pixels from 0 to 1, as published",
    "all": "these three together",
    "rate": "ten times the learning rate",
    "phase": "phases below π/10",
}


def main() -> None:
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    by = {(one["variant"], one["states"]): one for one in content["variants"]}
    lines = [
        f"| after {content['steps']:,} steps | validation, 256 states | states for τ = 0.01, 0.02, 0.04 "
        "| validation, 28 states |",
        "|---|---:|---:|---:|",
    ]
    for variant, name in NAMES.items():
        big, small = by[variant, 256], by[variant, 28]
        ranks = ", ".join(str(rank) for rank in big["ranks"].values())
        accuracies = [f"{100 * one['validation_accuracy']:.1f} %" for one in (big, small)]
        lines.append(f"| {name} | {accuracies[0]} | {ranks} | {accuracies[1]} |")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
