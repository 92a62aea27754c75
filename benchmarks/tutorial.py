"""The figure of docs/tutorial.md: the rules that say how far to cut, the uncut model, and small twins, on its task.

    python benchmarks/tutorial.py            # stores results/tutorial.json, and writes figure, table and output
    python benchmarks/tutorial.py --table    # only the latter three, of what is stored

The task and the training are the page's own code: its blocks are run up to the one that defines ``train``. Seeds 0, 1
and 2 give the weights and the batches; validation and test data are the same for all. One thread. Trainings that the
result file has already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stored import between, rewrite, store

ROOT = Path(__file__).parent.parent
PAGE, PICTURE = ROOT / "docs" / "tutorial.md", ROOT / "docs" / "images" / "tutorial.svg"
STATES, SEEDS = 64, (0, 1, 2)
SHOWN: dict[str, Any] = {"states": 8, "max_drop": 0.02}  # the training on the page

Run = dict[str, Any]
TRAININGS: tuple[tuple[int, dict[str, Any]], ...] = (  # states at the start, and the rule
    (STATES, {}),
    (STATES, SHOWN),
    (STATES, {"states": 4, "max_drop": 0.02}),
    (STATES, {"max_drop": 0.02}),
    *((STATES, {"states": size}) for size in (4, 8, 16)),
    *((STATES, {"tolerance": share}) for share in (0.1, 0.3)),
    *((size, {}) for size in (8, 16, 32)),
)

ACCURACIES = (20, 50, 80, 90, 95, 98, 99, 99.5, 99.9)
TONES, NEAR = (697, 770, 852, 941, 1209, 1336, 1477), 25  # Hz
LEAST = 0.00025  # half of one of the 2,000 test sequences


def cut_by(*names: str) -> Callable[[Run], bool]:
    """Whether a training began with all states and had exactly these rules."""
    return lambda run: run["d_state"] == STATES and set(run["rule"]) == set(names)


SERIES: tuple[
    tuple[str, str, str, bool, Callable[[Run], bool]], ...
] = (  # name, colour, marker, whether means are joined
    ("uncut", "#5a6b7b", "s", False, cut_by()),
    ("small from the start", "#c8553d", "x", True, lambda run: run["d_state"] != STATES),
    ("states=…", "#0b6e4f", "o", True, cut_by("states")),
    ("tolerance=…", "#2b6cb0", "^", True, cut_by("tolerance")),
    ("max_drop=0.02 alone", "#8e44ad", "D", False, cut_by("max_drop")),
    ("max_drop and states", "#d68910", "*", False, cut_by("max_drop", "states")),
)


def code_of(page: str) -> dict[str, Any]:
    """The names that the page defines, up to ``train``."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(block, names)
        if "train" in names:
            return names
    raise SystemExit("docs/tutorial.md defines no train")


def measured(page: dict[str, Any], d_state: int, seed: int, rule: dict[str, Any]) -> Run:
    """One training, and what became of it."""
    start = time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, compressor = page["train"](d_state, seed, **rule)
    return {
        "d_state": d_state, "seed": seed, "rule": rule,
        "states": model.blocks[0].ssm.d_state,
        "accuracy": page["accuracy"](model, page["test"]),
        "hertz": resonances(model),
        "cpu_seconds": time.process_time() - start,
        "history": [str(event) for event in compressor.history] if compressor else [],
        "warnings": [str(warning.message) for warning in said],
    }  # fmt: skip


def resonances(model: Any) -> list[float]:
    """The frequencies of the states at 8 kHz, in Hz."""
    phases = model.blocks[0].ssm.theta_log.exp().tolist()
    return sorted(abs(math.remainder(phase, 2 * math.pi)) * 8000 / (2 * math.pi) for phase in phases)


def of(runs: list[Run], d_state: int, rule: dict[str, Any]) -> list[Run]:
    """The trainings that began with so many states and had this rule, by seed."""
    ours = [run for run in runs if (run["d_state"], run["rule"]) == (d_state, rule)]
    return sorted(ours, key=lambda run: run["seed"])


def mean(runs: list[Run], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def history(runs: list[Run]) -> str:
    """What the page's own training prints."""
    run = next(run for run in of(runs, STATES, SHOWN) if run["seed"] == 0)
    dims = {"blocks.0.ssm": run["states"]}
    return "\n".join(["```text", *run["history"], f"{run['accuracy']:.1%} right, states {dims}", "```"])


def tones(runs: list[Run]) -> str:
    """Which of the seven tones have a state near them, in the models of the page."""
    near = []
    for d_state, rule in ((STATES, SHOWN), (SHOWN["states"], {})):
        hertz = next(run["hertz"] for run in of(runs, d_state, rule) if run["seed"] == 0)
        near.append(sum(any(abs(state - tone) <= NEAR for state in hertz) for tone in TONES))
    cut, twin = near
    return f"With seed 0 the cut model has a state within {NEAR} Hz of {cut} of the seven tones, the twin of {twin}."


def table(runs: list[Run]) -> str:
    """Every training: states at the end, and accuracy on test data, seed by seed."""
    lines = ["| training | states at the end | accuracy on test data, seeds 0, 1, 2 |", "|---|---:|---|"]
    for d_state, rule in TRAININGS:
        ours = of(runs, d_state, rule)
        given = ", ".join(f"{name}={value}" for name, value in rule.items())
        name = f"`{given}`" if rule else "uncut" if d_state == STATES else "small from the start"
        sizes = [str(run["states"]) for run in ours]
        shares = ", ".join(f"{run['accuracy']:.2%}" for run in ours).replace("%", " %")
        lines.append(f"| {name} | {sizes[0] if len(set(sizes)) == 1 else ', '.join(sizes)} | {shares} |")
    return "\n".join(lines)


def draw(runs: list[Run], picture: Path) -> None:
    """Accuracy against the states at the end, on the logarithmic axis of the wrong answers, which shows both ends."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "compressm", "font.size": 11}
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(4.6, 5.2), layout="constrained")
    for name, colour, marker, joined, belongs in SERIES:
        ours = [run for run in runs if belongs(run)]
        axis.plot([run["states"] for run in ours], [wrong(run["accuracy"]) for run in ours], marker, color=colour,
                  markersize=7, alpha=0.8, label=name)  # fmt: skip
        if joined:
            ends = sorted({run["states"] for run in ours})
            means = [mean([run for run in ours if run["states"] == end], "accuracy") for end in ends]
            axis.plot(ends, [wrong(share) for share in means], color=colour, linewidth=1.5)
    best = min(wrong(run["accuracy"]) for run in runs)
    axis.set(
        xscale="log", yscale="log", ylim=(1, 0.7 * best), xlabel="states at the end", ylabel="accuracy on test data"
    )
    axis.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
    axis.set_yticks([wrong(share / 100) for share in ACCURACIES], [f"{share:g} %" for share in ACCURACIES])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)


def wrong(accuracy: float) -> float:
    """The share of wrong answers; none at all are drawn as half of one."""
    return max(1 - accuracy, LEAST)


def with_table(page: str, runs: list[Run]) -> str:
    """The page docs/tutorial.md with the output, the tones and the table of these trainings."""
    name = "of results/tutorial.json, by benchmarks/tutorial.py -->"
    page = between(page, f"<!-- history: {name}", "<!-- end of history -->", history(runs))
    page = between(page, f"<!-- tones: {name}", "<!-- end of tones -->", tones(runs))
    return between(page, f"<!-- table: {name}", "<!-- end of table -->", table(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure and draw how far the rules cut the model of the tutorial.")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "tutorial.json")
    parser.add_argument("--table", action="store_true", help="train nothing; draw and write what is stored")
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[Run] = json.loads(given.json.read_text(encoding="utf-8"))["runs"] if given.json.exists() else []
    if not given.table:
        page = code_of(PAGE.read_text(encoding="utf-8"))
        wanted = [(seed, d_state, rule) for seed in SEEDS for d_state, rule in TRAININGS]
        for index, (seed, d_state, rule) in enumerate(wanted):
            if any(run["seed"] == seed for run in of(runs, d_state, rule)):
                continue
            run = measured(page, d_state, seed, rule)
            runs.append(run)
            store(given.json, runs=runs)
            print(f"{index + 1}/{len(wanted)}: seed {seed}, {d_state} states, {rule}: {run['states']} states, "
                  f"{run['accuracy']:.4f}", flush=True)  # fmt: skip
    draw(runs, PICTURE)
    rewrite(PAGE, with_table, runs)


if __name__ == "__main__":
    main()
