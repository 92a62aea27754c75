"""Put the stored comparison of variants into docs/paper.md: ``python scripts/paper.py``.

The rest of the page is written by hand. The table stands between two marks.
"""

from __future__ import annotations

import argparse
import json
import sys
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


def table() -> str:
    """The variants, one row each."""
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
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the stored comparison of variants into docs/paper.md.")
    parser.add_argument("--output", type=Path, default=PAGE, help="write the page to this file")
    output = parser.parse_args().output
    text = PAGE.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or END not in text.split(BEGIN)[1]:
        sys.exit(f"{PAGE}: the table's marks {BEGIN.strip()} and {END.strip()} must be there, once each, in this order")
    before, rest = text.split(BEGIN)
    output.write_text(before + BEGIN + table() + END + rest.split(END, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
