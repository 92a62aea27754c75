"""The picture that `compressm demo` draws: four panels beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressm.runtime.files import replacing

WAYS = ("full", "shrunk", "small")
LABELS = {"full": "big all the way", "shrunk": "big, then shrunk", "small": "small from the start"}
COLOURS = {"full": "#8d99ae", "shrunk": "#0b6e4f", "small": "#c8553d"}

Runs = Mapping[tuple[str, int], Mapping[str, Any]]


def draw(result: Mapping[str, Any], runs: Runs, picture: Path) -> None:
    """Draw Hankel spectra at the cuts, state dimension and accuracy over the steps, and accuracy against time.

    Args:
        result: what `compressm.lab.demo.run_demo` returns.
        runs: `RunResult.to_dict` of every run, by way and seed.
        picture: the file; its ending says the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (spectra, dimension, accuracy, times) = plt.subplots(1, 4, figsize=(15, 3.7), layout="constrained")
    _spectra(spectra, runs)
    _dimensions(dimension, runs)
    _accuracies(accuracy, runs)
    _times(times, result)
    for axis in (spectra, dimension, accuracy, times):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    with replacing(picture) as new:
        figure.savefig(new, dpi=130, format=picture.suffix[1:] or None)
    plt.close(figure)


def _spectra(axis: Any, runs: Runs) -> None:
    """The first layer's Hankel singular values before each cut, later cuts darker; dotted, where it was cut."""
    from matplotlib import pyplot as plt

    cuts = _cuts(runs["shrunk", 0])
    shades = plt.get_cmap("viridis_r")
    for index, event in enumerate(cuts):
        layer = event["layers"][0]
        values, before, after = layer["hsv"], layer["states_before"], layer["states_after"]
        colour = shades(0.25 + 0.7 * index / max(1, len(cuts) - 1))
        position = [(i + 1) * before / len(values) for i in range(len(values))]
        axis.semilogy(position, values, color=colour, label=f"cut {index + 1}: {before} → {after}")
        axis.axvline(after, color=colour, linewidth=0.8, linestyle=":")
    largest = max(layer["hsv"][0] for event in cuts for layer in event["layers"])
    axis.set(title="Hankel singular values before each cut", xlabel="state", ylim=(1e-10 * largest, 3 * largest))
    axis.legend(frameon=False, fontsize=8)


def _dimensions(axis: Any, runs: Runs) -> None:
    """The state dimension of the whole model over the steps, as stairs."""
    steps = int(runs["shrunk", 0]["steps"])
    for way in WAYS:
        dims, at = [float(_initial_states(runs[way, 0]))], [0.0]
        for event in _cuts(runs[way, 0]):
            dims += [dims[-1], float(sum(layer["states_after"] for layer in event["layers"]))]
            at += [float(event["step"])] * 2
        axis.plot([*at, steps], [*dims, dims[-1]], color=COLOURS[way], linewidth=2, label=LABELS[way])
    axis.set(title="State dimension", xlabel="training step", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8, loc="center right")


def _accuracies(axis: Any, runs: Runs) -> None:
    """The accuracy on validation data over the steps, the mean over the seeds."""
    for way in WAYS:
        curves = [run["curve"] for (kind, _), run in runs.items() if kind == way]
        at = [point["step"] for point in curves[0]]
        mean = [statistics.fmean(c[i]["validation_accuracy"] for c in curves) * 100 for i in range(len(at))]
        axis.plot(at, mean, color=COLOURS[way], linewidth=2)
    axis.set(title="Validation accuracy (mean), %", xlabel="training step", ylim=(50, 100))


def _times(axis: Any, result: Mapping[str, Any]) -> None:
    """The accuracy on test data against the computing time of the training, with the deviation over the seeds."""
    for way in WAYS:
        row = result[way]
        axis.errorbar(
            row["computing_seconds"],
            100 * row["accuracy_mean"],
            yerr=100 * row["accuracy_std"],
            fmt="o",
            markersize=9,
            capsize=3,
            color=COLOURS[way],
            label=f"{sum(row['state_dims'])} states, {LABELS[way]}: {row['accuracy_mean']:.1%}",
        )
    longest = max(result[way]["computing_seconds"] for way in WAYS)
    lowest = min(100 * (result[way]["accuracy_mean"] - result[way]["accuracy_std"]) for way in WAYS)
    axis.set(title="Test accuracy, %, against computing time", xlabel="seconds of computing")
    axis.set(xlim=(0, 1.1 * longest), ylim=(lowest - 0.5 * (100 - lowest), 100))
    axis.legend(frameon=False, fontsize=8, loc="lower left")


def _cuts(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [event for event in run["history"] if event["kind"] == "cut"]


def _initial_states(run: Mapping[str, Any]) -> int:
    states = run["config"]["model"]["d_state"]
    return states if isinstance(states, int) else sum(states)


__all__ = ["LABELS", "WAYS", "draw"]
