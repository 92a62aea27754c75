"""Tells damage from noise: what a metric lost by a cut, and the standard error of this loss.

The evaluations before a cut say where the uncut training stands, with its trend, and how much its metric fluctuates.
With times t and metrics y (higher is better) of k evaluations before the cut, the last of them at the cut's time c, and
the mean time h after the cut of m later evaluations,

    a, b = line through (t, y)                      robust: the median of all slopes between two evaluations (Theil-Sen)
    s² = 2 sum of squared residuals / freedom       of the lines before and after; successive evaluations are correlated
    reference = a + b (c + θ h)                     a trend is expected to go on with the share θ of its slope
    loss = reference - mean of the m evaluations
    error² = s² (1 / k + 1 / m + (c + θ h - mean t)² / S_tt) + (δ b h)² + ((b' - b) h / 2)² + var(d) / N

The slope b' of three evaluations after the cut says how far the trend has turned. The last term is there if `evaluate`
returns one score per example: d are the N differences, example by example, between the mean scores before and after the
cut. It is the error that a finite validation set makes, judged in pairs.

The factor 2, θ and δ were chosen so that errors on trainings without cuts have the size that is stated
(`benchmarks/cushion.py`). Confidence follows Student's distribution with the residuals' degrees of freedom.

Source: P. K. Sen, Estimates of the regression coefficient based on Kendall's tau, JASA 63 (1968).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

WINDOW = 6  # the last so many evaluations say where the uncut training stands
_CORRELATED = 2.0  # by how much the variance of residuals understates that of forecasts
_GOES_ON, _GOES_ON_ERROR = 0.7, 0.6  # share of a trend's slope that is expected to continue, and its standard error
_TURNED = 0.5  # a slope that changes evenly from the one before to the one after is half way on average
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Look:
    """One evaluation.

    Attributes:
        step: training steps done.
        value: the metric, higher is better.
        scores: one score per validation example, higher is better; None if `evaluate` returns one number.
    """

    step: int
    value: float
    scores: Tensor | None = None  # shape: (N,)

    def shifted(self, steps: int = 0, loss: float = 0.0) -> Look:
        """The same evaluation some steps later, on a training whose metric is lower by ``loss``."""
        return replace(self, step=self.step + steps, value=self.value - loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {"step": self.step, "value": self.value, "scores": self.scores}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Look:
        """The inverse of `to_dict`."""
        return Look(int(values["step"]), float(values["value"]), values["scores"])


@dataclass(frozen=True)
class Loss:
    """What a metric lost by a cut.

    Attributes:
        value: the loss; negative if the metric is better than expected.
        reference: where the uncut training would stand.
        training: standard error by the training's own fluctuation and trend; None if it cannot be known from so few
            evaluations.
        sampling: standard error by the finite validation set; 0 without scores per example.
        freedom: degrees of freedom of ``training``.
        examples: number of examples; 0 without scores.
    """

    value: float
    reference: float
    training: float | None
    sampling: float
    freedom: int
    examples: int

    @property
    def error(self) -> float | None:
        """The standard error; None if nothing is known about it."""
        if self.training is None:
            return self.sampling or None
        return math.hypot(self.training, self.sampling)

    def noise(self, confidence: float) -> float:
        """The loss that noise alone stays below, with this confidence. 0 if nothing is known about the noise."""
        return (self.error or 0.0) * quantile(confidence, self.freedom)

    def exceeds(self, allowed: float, confidence: float) -> bool:
        """Whether the loss is larger than allowed, and the excess larger than noise explains."""
        rounding = _ROUNDING * max(1.0, abs(self.reference))
        return self.value > allowed + self.noise(confidence) + rounding


def quantile(confidence: float, freedom: int) -> float:
    """The quantile of Student's distribution; of the normal distribution if ``freedom`` is 0."""
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(freedom, confidence) if freedom else ndtri(confidence))


def estimate(before: Sequence[Look], after: Sequence[Look]) -> Loss:
    """The loss by a cut.

    Args:
        before: evaluations before the cut, the last one at the cut. The last `WINDOW` count.
        after: evaluations after it.
    """
    before = before[-WINDOW:]
    old, new = _Line.through(before), _Line.through(after)
    cut, ahead = before[-1].step, statistics.fmean(look.step for look in after) - before[-1].step
    place = cut + _GOES_ON * ahead
    reference = old.at(place)
    # Two evaluations after a cut differ by trend and noise alike, so they say nothing if others do.
    squares, freedom = old.squares, old.freedom
    if len(after) > 2 or not freedom:
        squares, freedom = squares + new.squares, freedom + new.freedom
    training = None
    if freedom:
        variance = _CORRELATED * squares / freedom
        spread = (place - old.centre) ** 2 / old.spread if old.spread else 0.0
        forecast = variance * (1 / len(before) + 1 / len(after) + spread)
        turned = _TURNED * (new.slope - old.slope) if new.spread else 0.0
        training = math.sqrt(forecast + ((_GOES_ON_ERROR * old.slope) ** 2 + turned**2) * ahead**2)
    loss = reference - statistics.fmean(look.value for look in after)
    sampling, examples = _sampling(before, after)
    return Loss(loss, reference, training, sampling, freedom, examples)


def beside(twins: Sequence[Look], after: Sequence[Look]) -> Loss:
    """The loss by a cut, as the difference from an uncut twin: d is the mean of the k differences d_j, and

        error² = 2 var(d_j) / k + var(d) / N

    Args:
        twins: evaluations of the twin after the cut.
        after: evaluations of the cut model at the same steps.
    """
    differences = [twin.value - look.value for twin, look in zip(twins, after, strict=True)]
    k, training = len(differences), None
    if k > 1:
        training = math.sqrt(_CORRELATED * statistics.variance(differences) / k)
    reference, loss = statistics.fmean(twin.value for twin in twins), statistics.fmean(differences)
    sampling, examples = _sampling(twins, after)
    return Loss(loss, reference, training, sampling, k - 1, examples)


def foreseen(before: Sequence[Look], steps: Sequence[int]) -> Loss:
    """The loss and its errors that `estimate` would find if nothing changed: what the evaluations can resolve.

    Args:
        before: evaluations before the cut, the last one at the cut.
        steps: when the evaluations after it will come.
    """
    ahead = [replace(before[-1], step=step) for step in steps]
    same = estimate(before, [replace(ahead[0], step=round(statistics.fmean(steps)))])
    if same.training is None:
        return same
    line = _Line.through(before[-WINDOW:])
    fewer = _CORRELATED * line.squares / max(1, line.freedom) * (1 - 1 / len(steps))  # a mean fluctuates less than one
    return replace(same, training=math.sqrt(max(0.0, same.training**2 - fewer)))


def _sampling(before: Sequence[Look], after: Sequence[Look]) -> tuple[float, int]:
    """Standard error of the mean difference over examples, and the number of examples."""
    old, new = ([look.scores for look in looks if look.scores is not None] for looks in (before, after))
    if not old or not new:
        return 0.0, 0
    difference = torch.stack(old).double().mean(0) - torch.stack(new).double().mean(0)
    count = len(difference)
    return float(difference.std() / math.sqrt(count)), count


@dataclass(frozen=True)
class _Line:
    """A robust line, and what its residuals say.

    Attributes:
        slope, level: the line is ``level + slope (t - centre)``.
        centre, spread: mean of the times, and the sum of their squared deviations; 0 where no slope is estimated.
        squares, freedom: sum of squared residuals, and their degrees of freedom.
    """

    slope: float
    level: float
    centre: float
    spread: float
    squares: float
    freedom: int

    def at(self, step: float) -> float:
        return self.level + self.slope * (step - self.centre)

    @staticmethod
    def through(looks: Sequence[Look]) -> _Line:
        """The line through evaluations. Through two of them there is no slope: they differ by noise as far as known."""
        times, values = [float(look.step) for look in looks], [look.value for look in looks]
        centre = statistics.fmean(times)
        spread = sum((t - centre) ** 2 for t in times)
        if len(looks) < 3 or not spread:
            level = statistics.fmean(values)
            squares = sum((y - level) ** 2 for y in values)
            return _Line(0.0, level, centre, 0.0, squares, len(looks) - 1)
        pairs = combinations(zip(times, values, strict=True), 2)
        slope = statistics.median((v - y) / (u - t) for (t, y), (u, v) in pairs if u != t)
        level = statistics.median(y - slope * (t - centre) for t, y in zip(times, values, strict=True))
        residuals = (y - level - slope * (t - centre) for t, y in zip(times, values, strict=True))
        return _Line(slope, level, centre, spread, sum(r * r for r in residuals), len(looks) - 2)


__all__ = ["WINDOW", "Look", "Loss", "beside", "estimate", "foreseen", "quantile"]
