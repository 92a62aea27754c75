"""`compressm demo`: one comparison on embedded data, in a table and a picture.

The same small classifier reads handwritten digits pixel by pixel, three ways and with several seeds: big all the way
(``full``), big and then shrunk in the first fifth of the training (``shrunk``), and small from the start with the
dimension at which the shrunk one ended (``small``). Everything runs through `compressm.lab.runs`, as `compressm
train` does.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compressm.lab.reproduce import Arm, Experiment, plan_runs, run_grid
from compressm.runtime.files import replacing

WAYS = ("full", "shrunk", "small")
LABELS = {"full": "big all the way", "shrunk": "big, then shrunk", "small": "small from the start"}
COLOURS = {"full": "#8d99ae", "shrunk": "#0b6e4f", "small": "#c8553d"}

_BIG = {"compression.enabled": False}
DEMO = Experiment(
    "demo",
    "Handwritten digits, pixel by pixel",
    "demo",
    (Arm("full", _BIG), Arm("shrunk", {}), Arm("small", _BIG, same_states_as="shrunk")),
)


def run_demo(
    seeds: int = 4,
    steps: int | None = None,
    picture: Path | None = Path("demo.png"),
    workers: int | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Train all runs, print the table, draw the picture.

    Args:
        seeds: how many seeds, from 0.
        steps: training steps of each run; by default as many as the comparison needs.
        picture: where to draw it; None for no picture.
        workers: processes; by default one per CPU, with one thread each.
        command: the exact command line, for the record.

    Returns:
        ``full``, ``shrunk`` and ``small``, each with ``accuracy_mean``, ``accuracy_std``, ``seeds``, ``state_dims``,
        ``train_seconds``, ``reduction_seconds``; and ``command``, ``versions``, ``config``.
    """
    with tempfile.TemporaryDirectory(prefix="compressm-demo-") as folder:
        plan = plan_runs(DEMO, range(seeds), results=Path(folder) / "results", runs=Path(folder) / "runs")
        found = run_grid(plan, steps=steps, workers=workers, command=command)
    runs = {key: run.to_dict() for key, run in found.items()}
    result: dict[str, Any] = {way: _summary([runs[way, seed] for seed in range(seeds)]) for way in WAYS}
    result |= {"command": command, "versions": runs["full", 0]["versions"], "config": runs["shrunk", 0]["config"]}
    Console().print(_table(result))
    if picture is not None:
        draw(result, runs, picture)
        Console().print(f"picture: {picture}")
    return result


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracies = [float(run["test_accuracy"]) for run in runs]
    return {
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "accuracies": accuracies,
        "seeds": [int(run["seed"]) for run in runs],
        "state_dims": [max(dims) for dims in zip(*(run["state_dims"] for run in runs), strict=True)],
        "state_dims_per_seed": [list(run["state_dims"]) for run in runs],
        "train_seconds": statistics.fmean(float(run["train_seconds"]) for run in runs),
        "reduction_seconds": statistics.fmean(float(run["reduction_seconds"]) for run in runs),
    }


def _table(result: Mapping[str, Any]) -> Table:
    table = Table(title="Handwritten digits, pixel by pixel: test accuracy", title_justify="left")
    for column in ("", "states", "accuracy", "training", "of it cutting"):
        table.add_column(column, justify="left" if not column else "right")
    for way in WAYS:
        row = result[way]
        table.add_row(
            LABELS[way],
            "+".join(str(n) for n in row["state_dims"]),
            f"{row['accuracy_mean']:.1%} ± {row['accuracy_std']:.1%}",
            f"{row['train_seconds']:.1f} s",
            f"{row['reduction_seconds']:.2f} s",
        )
    return table


def draw(result: Mapping[str, Any], runs: Mapping[tuple[str, int], Mapping[str, Any]], picture: Path) -> None:
    """The picture: Hankel spectra at the cuts, state dimension and accuracy over the steps, accuracy against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.7), layout="constrained")
    history = [event for event in runs["shrunk", 0]["history"] if event["kind"] == "cut"]
    steps = int(runs["shrunk", 0]["steps"])

    spectrum = axes[0]
    shades = plt.get_cmap("viridis_r")
    for index, event in enumerate(history):
        layer = event["layers"][0]
        values = layer["hsv"]
        colour = shades(0.25 + 0.7 * index / max(1, len(history) - 1))
        position = [(i + 1) * layer["states_before"] / len(values) for i in range(len(values))]
        spectrum.semilogy(
            position,
            values,
            color=colour,
            label=f"cut {index + 1}: {layer['states_before']} → {layer['states_after']}",
        )
        spectrum.axvline(layer["states_after"], color=colour, linewidth=0.8, linestyle=":")
    largest = max(layer["hsv"][0] for event in history for layer in event["layers"])
    spectrum.set(title="Hankel singular values before each cut", xlabel="state", ylim=(1e-10 * largest, 3 * largest))
    spectrum.legend(frameon=False, fontsize=8)

    dimension = axes[1]
    for way in WAYS:
        dims, at = [float(_initial_states(runs[way, 0]))], [0.0]
        for event in runs[way, 0]["history"]:
            if event["kind"] == "cut":
                dims += [dims[-1], float(sum(layer["states_after"] for layer in event["layers"]))]
                at += [float(event["step"])] * 2
        dimension.plot([*at, steps], [*dims, dims[-1]], color=COLOURS[way], linewidth=2, label=LABELS[way])
    dimension.set(title="State dimension", xlabel="training step", ylim=(0, None))
    dimension.legend(frameon=False, fontsize=8, loc="center right")

    curve = axes[2]
    for way in WAYS:
        curves = [run["curve"] for (kind, _), run in runs.items() if kind == way]
        at = [point["step"] for point in curves[0]]
        mean = [statistics.fmean(c[i]["validation_accuracy"] for c in curves) * 100 for i in range(len(at))]
        curve.plot(at, mean, color=COLOURS[way], linewidth=2)
    curve.set(title="Validation accuracy (mean), %", xlabel="training step", ylim=(50, 100))

    points = axes[3]
    for way in WAYS:
        row = result[way]
        points.errorbar(
            row["train_seconds"],
            100 * row["accuracy_mean"],
            yerr=100 * row["accuracy_std"],
            fmt="o",
            markersize=9,
            capsize=3,
            color=COLOURS[way],
            label=f"{sum(row['state_dims'])} states, {LABELS[way]}: {row['accuracy_mean']:.1%}",
        )
    longest = max(result[way]["train_seconds"] for way in WAYS)
    lowest = min(100 * (result[way]["accuracy_mean"] - result[way]["accuracy_std"]) for way in WAYS)
    points.set(title="Test accuracy, %, against training time", xlabel="seconds of training")
    points.set(xlim=(0, 1.1 * longest), ylim=(lowest - 0.5 * (100 - lowest), 100))
    points.legend(frameon=False, fontsize=8, loc="lower left")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    with replacing(picture) as new:
        figure.savefig(new, dpi=130, format=picture.suffix[1:] or None)
    plt.close(figure)


def _initial_states(run: Mapping[str, Any]) -> int:
    states = run["config"]["model"]["d_state"]
    return states if isinstance(states, int) else sum(states)
