"""Draw docs/images/which-rule.svg: what you know decides which rule to give. ``python scripts/which_rule.py``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "which-rule.svg"

# Question, answer if yes: the rule, and what it promises. Asked from top to bottom, so that a phone shows it legibly.
QUESTIONS = (
    ("Do you know\nthe size?", "states, fraction,\ntotal_states", "the size"),
    ("Do you have a\nvalidation metric?", "max_drop\n+ evaluate", "the metric"),
    ("A loss, and data\nto measure it?", "max_loss\n+ loss", "the loss"),
    ("An error budget\nper layer?", "max_error", "H∞ error"),
)
LAST = ("tolerance", "Hankel energy")
BLUE, GREEN, ORANGE = "#dbe7f3", "#d9eee4", "#f6e3d4"


def box(axis: Any, x: float, y: float, text: str, colour: str, mono: bool = False) -> None:
    """A rounded box with text."""
    axis.text(
        x, y, text, ha="center", va="center", fontsize=10, family="monospace" if mono else "sans-serif",
        bbox={"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "#5a6b7b"},
    )  # fmt: skip


def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    """An arrow with a word beside it."""
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "#5a6b7b"})
    axis.text((start[0] + end[0]) / 2 + 0.05, (start[1] + end[1]) / 2 + 0.06, text, fontsize=9, color="#5a6b7b")


def draw(picture: Path) -> None:
    """Draw the decision, one question after the other."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "compressm"
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(4.6, 6.0), layout="constrained")
    for index, (question, rule, promise) in enumerate(QUESTIONS):
        y = -1.5 * index
        box(axis, 0, y, question, BLUE)
        box(axis, 2.6, y, rule, GREEN if index == 0 else ORANGE, mono=True)
        axis.text(2.6, y - 0.66, f"keeps: {promise}", ha="center", fontsize=10)
        arrow(axis, (0.95, y), (1.7, y), "yes")
        arrow(axis, (0, y - 0.36), (0, y - (1.12 if index < len(QUESTIONS) - 1 else 1.24)), "no")
    end = -1.5 * len(QUESTIONS)
    box(axis, 0, end, LAST[0], ORANGE, mono=True)
    axis.text(0, end - 0.55, f"keeps: {LAST[1]}", ha="center", fontsize=10)
    axis.text(2.6, end - 0.2, "orange: at most half\nof the states\nper cut", ha="center", fontsize=10, color="#8a5a33")
    axis.set(xlim=(-1, 3.7), ylim=(end - 0.7, 0.5))
    axis.axis("off")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/images/which-rule.svg.")
    parser.add_argument("--output", type=Path, default=PICTURE, help="draw it into this file")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
