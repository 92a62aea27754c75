"""Figures of an experiment, from its stored results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressm.lab.reproduce.equal_compute import tuned
from compressm.lab.reproduce.experiments import Experiment
from compressm.lab.reproduce.scale import Scale, scale
from compressm.lab.reproduce.tables import Results, Row, rows
from compressm.lab.runs.result import RunResult
from compressm.runtime.files import replacing


def draw(experiment: Experiment, results: Results, picture: Path) -> None:
    """Draw the metric on validation data over the steps, and that on test data over the whole run's computing time.

    Where Hankel singular values were recorded, a third panel shows those of one run over the steps. The panels stand
    below each other, and their words stay legible on a phone. Experiments that compare in one setting after the other,
    each with a big model of its own, have one panel instead: small, cut and big in every setting.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if experiment.in_settings:
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        _settings(axis, experiment, results)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        _save(figure, [axis], experiment, picture)
        return
    looked = next((run.spectra for run in results.values() if run.spectra), None)
    timed = _timed(experiment, results)
    panels = 1 + bool(timed) + bool(looked)
    figure, grid = plt.subplots(panels, squeeze=False, figsize=(6, 3.2 * panels + 0.5), layout="constrained")
    axes = list(grid[:, 0])
    _scores(axes[0], axes[1] if timed else None, experiment, results, timed)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    if looked:
        _trajectories(axes[-1], looked)
    _save(figure, axes, experiment, picture)


def _save(figure: Any, axes: Iterable[Any], experiment: Experiment, picture: Path) -> None:
    import matplotlib
    from matplotlib import pyplot as plt

    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    reproducible = {"Date": None} if picture.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": experiment.name}), replacing(picture) as new:
        figure.savefig(new, dpi=130, metadata=reproducible, format=picture.suffix[1:] or None)
    plt.close(figure)


def _settings(axis: Any, experiment: Experiment, results: Results) -> None:
    """A column for every setting: small, cut and big, and beside the means the single seeds."""
    of = scale(results.values())
    found = {row.arm.name: row.scores for row in rows(experiment, results)}
    cuts = [arm for arm in experiment.arms if arm.big and arm.small and arm.name in found]
    for at, arm in enumerate(cuts):
        trio = {"small from the start": arm.small, "cut while training": arm.name, "big": arm.big}
        means = []
        for (label, name), (colour, mark) in zip(trio.items(), _MARKS, strict=True):
            scores = found.get(str(name), [])
            if not scores:
                continue
            means.append(statistics.fmean(scores))
            axis.plot(at, means[-1], mark, color=colour, markersize=8, label=None if at else label, zorder=3)
            if len(scores) > 1:
                axis.plot([at + 0.18] * len(scores), scores, mark, color=colour, markersize=3, alpha=0.6)
        axis.plot([at, at], [min(means), max(means)], color="0.7", linewidth=1.5, zorder=1)
    names = [arm.name.split("-", 1)[1].replace("-", " ") for arm in cuts]
    axis.set_xticks(range(len(cuts)), names, rotation=30, ha="right", rotation_mode="anchor")
    axis.set(title=f"Test {of.heading}", xlim=(-0.5, len(cuts) - 0.5))
    axis.grid(axis="y", color="0.9")


_MARKS = (("0.45", "s"), ("tab:orange", "o"), ("black", "D"))  # of small, cut and big


def _drawn(experiment: Experiment, results: Results) -> list[Row]:
    """The rows that are drawn: of several learning rates, where they are compared, the best."""
    best = {one.arm.name for one in tuned(experiment, results)}
    return [row for row in rows(experiment, results) if not best or row.arm.name in best]


def _timed(experiment: Experiment, results: Results) -> dict[str, list[tuple[float, float]]]:
    """Relative computing times and scores of the runs of every arm that is drawn, as far as they are known."""
    by_name = {row.arm.name: row for row in rows(experiment, results)}
    found: dict[str, list[tuple[float, float]]] = {}
    for row in _drawn(experiment, results):
        times = _relative_times(row, by_name.get(experiment.big_of(row.arm).name))
        known = [(time, score) for time, score in zip(times, row.scores, strict=True) if time is not None]
        if known:
            found[row.arm.name] = known
    return found


def _scores(
    curve: Any,
    points: Any,
    experiment: Experiment,
    results: Results,
    timed: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Scores over the steps, and against computing time where any is known."""
    from matplotlib import pyplot as plt

    drawn, of = _drawn(experiment, results), scale(results.values())
    shades = plt.get_cmap("tab10" if len(drawn) <= 10 else "tab20")
    for index, row in enumerate(drawn):
        colour = shades(index % shades.N)
        at, values = _mean_curve(row.runs, of)
        curve.plot(at, values, color=colour, linewidth=1.5, alpha=0.8, label=f"{row.arm.name}: {row.score}{of.unit}")
        if known := timed.get(row.arm.name):
            points.scatter(*zip(*known, strict=True), color=colour, s=40, clip_on=False)
    curve.set(title=f"Validation {of.heading}", xlabel="training step")
    if timed:
        points.set(
            title=f"Test {of.heading}, against computing time",
            xlabel="whole training; the big one's is 1",
            xlim=(0, None),
        )


def _relative_times(row: Row, big: Row | None) -> list[float | None]:
    """Computing time of every run over that of the big run of its seed, on the same processor; None unknown, as all are
    before a big one is there."""
    if big is None:
        return [None for _ in row.runs]
    whole = {run.seed: seconds for run, seconds in zip(big.runs, big.seconds, strict=True)}
    pairs = [(seconds, whole.get(run.seed)) for run, seconds in zip(row.runs, row.seconds, strict=True)]
    return [own / other if own is not None and other else None for own, other in pairs]


def _mean_curve(runs: Sequence[RunResult], of: Scale) -> tuple[list[int], list[float]]:
    """Steps at which all runs were evaluated, and the mean over the runs of what is shown of them."""
    curves = [{point["step"]: of.shown(point[f"validation_{run.metric}"]) for point in run.curve} for run in runs]
    steps = sorted(set.intersection(*(set(one) for one in curves)))
    return steps, [statistics.fmean(one[step] for one in curves) for step in steps]


def _trajectories(axis: Any, record: Sequence[Mapping[str, Any]]) -> None:
    """Every second Hankel singular value of the first layer over the steps."""
    from matplotlib import pyplot as plt

    layer = next(iter(record[0]["layers"]))
    steps = [entry["step"] for entry in record if layer in entry["layers"]]
    values = [entry["layers"][layer]["hsv"] for entry in record if layer in entry["layers"]]
    for index in range(0, len(values[0]), 2):
        shade = plt.get_cmap("viridis")(index / len(values[0]))
        line = [max(at[index], 1e-12) if index < len(at) else float("nan") for at in values]
        axis.semilogy(steps, line, color=shade, linewidth=0.6)
    axis.set(title=f"Hankel singular values, {layer}", xlabel="training step")


__all__ = ["draw"]
