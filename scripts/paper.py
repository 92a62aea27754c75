"""Put the stored comparison of variants, and what the best seeds alone would show, into docs/paper.md.

    python scripts/paper.py

The rest of the page is written by hand. Each table stands between two marks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from scipy import integrate, stats

from compressm.lab.reproduce import experiment, read_results

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "results" / "paper_variants.json", ROOT / "docs" / "paper.md"
BEGIN, END = "<!-- begin table: python scripts/paper.py, {} -->\n", "<!-- end table -->"
BEST, OF = 3, 10  # seeds that the paper's accuracies on sequential MNIST are the mean of

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


def mean_of_best(best: int, of: int) -> float:
    """Expected mean of the largest ``best`` of ``of`` draws of a standard normal distribution."""

    def density(x: float, rank: int) -> float:
        """Of the draw that ``rank`` draws lie below."""
        return float(x * stats.norm.pdf(x) * stats.binom.pmf(rank, of - 1, stats.norm.cdf(x)) * of)

    return statistics.fmean(integrate.quad(density, -8, 8, args=(of - 1 - k,))[0] for k in range(best))


def seeds() -> str:
    """Rows of several seeds: their mean, and the mean of the best three of ten that such seeds would give."""
    lines = [
        f"| | seeds here | mean ± deviation | expected mean of the best {BEST} of {OF} | paper |",
        "|---|---:|---:|---:|---:|",
    ]
    chosen = experiment("smnist")
    results = read_results(chosen, ROOT / "results")
    for arm in chosen.arms:
        accuracies = [100 * run.test_accuracy for (name, _), run in results.items() if name == arm.name]
        if len(accuracies) < BEST or arm.paper is None:
            continue
        mean, spread = statistics.fmean(accuracies), statistics.stdev(accuracies)
        best = mean + spread * mean_of_best(BEST, OF)
        lines.append(f"| {arm.name} | {len(accuracies)} | {mean:.1f} ± {spread:.1f} | {best:.1f} | {arm.paper:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the stored comparisons into docs/paper.md.")
    parser.add_argument("--output", type=Path, default=PAGE, help="write the page to this file")
    output = parser.parse_args().output
    text = PAGE.read_text(encoding="utf-8")
    for name, made in (("variants", table()), ("seeds", seeds())):
        begin = BEGIN.format(name)
        if text.count(begin) != 1 or END not in text.split(begin)[1]:
            sys.exit(f"{PAGE}: the marks {begin.strip()} and {END} must be there, once each, in this order")
        before, rest = text.split(begin)
        text = before + begin + made + END + rest.split(END, 1)[1]
    output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
