"""In which numbers the runs of an experiment are shown and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from compressm.lab.runs.result import RunResult
from compressm.observing.scores import Metric, better


@dataclass(frozen=True)
class Scale:
    """How a metric is shown, and what one model is worth more than another.

    Attributes:
        name: in words.
        unit: " %", or nothing.
        shown: the number in a table, of a score.
        worth: of a score, so that more is better: percentage points of a share; hundredths of the logarithm of a
            perplexity or an error, which are percent of it where they are few.
    """

    name: str
    unit: str
    shown: Callable[[float], float]
    worth: Callable[[float], float]

    @property
    def heading(self) -> str:
        """The name with its unit."""
        return f"{self.name}, %" if self.unit else self.name


def scale(runs: Iterable[RunResult]) -> Scale:
    """That of the metric of some runs, which all have the same; of accuracies where there are none."""
    metrics: list[Metric] = [run.metric for run in runs] or ["accuracy"]
    metric = metrics[0]
    if better(metric) == "min":
        return Scale(_NAMES[metric], "", lambda score: score, lambda score: -100 * math.log(score))
    if metric == "fit":  # is measured in percent
        return Scale(_NAMES[metric], " %", float, float)
    return Scale(_NAMES[metric], " %", lambda score: 100 * score, lambda score: 100 * score)


_NAMES: dict[Metric, str] = {
    "accuracy": "accuracy", "r2": "R²", "fit": "FIT", "mse": "mean square error", "perplexity": "perplexity",
}  # fmt: skip

__all__ = ["Scale", "scale"]
