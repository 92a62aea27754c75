"""How the metrics of runs are shown: accuracies in percent, others as they are."""

from __future__ import annotations

from typing import Any

from compressm.lab.runs.result import RunResult
from compressm.observing.scores import Metric, better

_NAMES: dict[Metric, str] = {"r2": "R²", "fit": "FIT", "mse": "mean squared error"}


def name_of(metric: Metric) -> str:
    """A metric's name in a sentence."""
    return _NAMES.get(metric, metric)


def axis_of(metric: Metric) -> str:
    """A metric's name with its unit, for an axis."""
    return f"{name_of(metric)}, %" if metric in ("accuracy", "fit") else name_of(metric)


def scaled(metric: Metric, value: float) -> float:
    """A value in the unit that is shown."""
    return 100 * value if metric == "accuracy" else value


def shown(metric: Metric, value: float) -> str:
    """A value as text."""
    return f"{scaled(metric, value):.2f} %" if metric in ("accuracy", "fit") else f"{value:.4g}"


def validation_of(result: RunResult) -> float | None:
    """The metric of the final model on the validation data."""
    return result.validation_score if result.validation_score is not None else result.validation_accuracy


def curve_of(result: RunResult) -> list[tuple[int, float]]:
    """Steps, and the metric on the validation data there, in the unit that is shown."""
    points: list[dict[str, Any]] = result.curve
    return [(int(one["step"]), scaled(result.metric, one[f"validation_{result.metric}"])) for one in points]


def front(points: list[tuple[float, float]], metric: Metric) -> list[tuple[float, float]]:
    """The Pareto front of (cost, score): no other point costs less and is as good, or is better at the same cost."""
    sign, best = 1 if better(metric) == "max" else -1, float("-inf")
    kept: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if sign * score > best:
            best = sign * score
            kept.append((cost, score))
    return kept


__all__ = ["axis_of", "curve_of", "front", "name_of", "scaled", "shown", "validation_of"]
