"""What short trainings of several sizes say: does the number of states matter for this task?

With m(n, s) the metric (higher is better) that n states reach with seed s, K seeds, N the largest size, and m0 the mean
metric before training,

    behind(n) = mean over s of m(N, s) - m(n, s)          sizes with the same seed have seen the same batches
    error²    = v / K + var(d) / E                        v: variance of the differences, pooled over the smaller sizes
    learnt    = mean over s of m(N, s) - m0

with K - 1 degrees of freedom for every smaller size. The last term of the error is there if `evaluate` returns one
score per example: d are the E differences, example by example, between the mean scores of the two sizes. The pooled
differences have m(N, s) in common; by simulation the intervals of nominally 90 % hold 89 %.

A size is *worse* if it is behind by more than noise explains, and by more than the share ``worth`` of what was learnt.
It is *as good* if noise does not hide that it is behind by so much. Otherwise more steps or seeds must tell.

Sizes that learn at the same pace at first may part later. Where the scores of the examples are right or wrong, the most
that can be learnt is 1 - m0, and "train small" is said only if the largest size has learnt half of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compressm.cutting.metrics import Better, sign_of
from compressm.cutting.plots import Backend, plot_metrics
from compressm.training.noise import Loss

Answer = Literal["state matters", "train small", "not known"]
Verdict = Literal["worse", "as good", "not known"]

CONFIDENCE = 0.95  # of each comparison, one-sided
ENOUGH = 0.5  # of what can be learnt: by less, no smaller size counts as as good for the whole training
_NOTICED = 0.05  # a smaller saving of time may be the machine's doing


@dataclass(frozen=True)
class ShortRun:
    """One short training.

    Attributes:
        states, seed, rate: the size, the seed, and the factor on the learning rates.
        before, metric: the metric before and after it, as `evaluate` returned it, or the mean of its scores. The metric
            after a training that diverged may be NaN or infinite.
        scores: one score per validation example afterwards, shape ``(N,)``; None if `evaluate` returns one number.
        seconds: time that it took.
        parameters: number of the model's parameters.
        batches: a checksum of each of the first batches.
    """

    states: int
    seed: int
    rate: float
    before: float
    metric: float
    scores: Tensor | None
    seconds: float
    parameters: int
    batches: tuple[float, ...] = ()

    @property
    def diverged(self) -> bool:
        """Whether the metric is not finite afterwards."""
        return not math.isfinite(self.metric)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, which knows no NaN: a training that diverged has no metric and no scores there."""
        values = {**self.__dict__, "batches": list(self.batches)}
        if self.diverged:
            return {**values, "metric": None, "scores": None}
        return {**values, "scores": None if self.scores is None else self.scores.tolist()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ShortRun:
        """The inverse of `to_dict`."""
        scores = None if values["scores"] is None else torch.tensor(values["scores"])
        metric = math.nan if values["metric"] is None else values["metric"]
        read: dict[str, Any] = {**values, "metric": metric, "scores": scores, "batches": tuple(values["batches"])}
        return ShortRun(**read)


@dataclass(frozen=True)
class Size:
    """What the trainings of one size say.

    Attributes:
        states: the size.
        rate: the factor on the learning rates with which it learnt best.
        metric: mean metric over the seeds.
        behind: how far it is behind the largest size, with its error; None for the largest one.
        verdict: what that means; ``"as good"`` for the largest one.
        seconds: time of a training step, the shortest of its trainings.
        parameters: number of the model's parameters.
    """

    states: int
    rate: float
    metric: float
    behind: Loss | None
    verdict: Verdict
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Probe:
    """The answer of `probe`. ``print`` shows it in words.

    Attributes:
        steps: steps of each short training.
        total_steps: of the training that was asked about; None if not given.
        sizes: the sizes, from the largest on.
        learnt: what the largest size learnt, in units of the metric, with its error.
        worth: the share of it that a size may be behind and still count as as good.
        runs: the short trainings, those at the best rate of each size.
        seconds: time of all short trainings together, those at other rates too.
        mode: as in `Compressor`.
        metric: its name.
        possible: the most that can be learnt, in units of the metric, if the scores are right or wrong; None otherwise.
    """

    steps: int
    total_steps: int | None
    sizes: tuple[Size, ...]
    learnt: Loss
    worth: float
    runs: tuple[ShortRun, ...]
    seconds: float
    mode: Better = "max"
    metric: str = "metric"
    possible: float | None = None

    @property
    def answer(self) -> Answer:
        """``"state matters"`` if a size is worse; ``"train small"`` if none is, and a smaller one is as good."""
        if not self._has_learnt:
            return "not known"
        if any(size.verdict == "worse" for size in self.sizes):
            return "state matters"
        return "train small" if self.start_from < self.sizes[0].states else "not known"

    @property
    def start_from(self) -> int:
        """The smallest size that is as good as the largest one, as all sizes between them are."""
        best = self.sizes[0].states
        for size in self.sizes[1:] if self._has_learnt and self._has_learnt_enough else ():
            if size.verdict != "as good":
                break
            best = size.states
        return best

    @property
    def share(self) -> float | None:
        """The time of the probe as a share of the time of the training that was asked about; None if not known."""
        return None if self.total_steps is None else self.seconds / (self.total_steps * self.sizes[0].seconds)

    @property
    def _has_learnt(self) -> bool:
        return self.learnt.value > self.learnt.noise(CONFIDENCE)

    @property
    def _has_learnt_enough(self) -> bool:
        return self.possible is None or self.learnt.value >= ENOUGH * self.possible

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, without the scores of examples."""
        return {
            "answer": self.answer,
            "start_from": self.start_from,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "share_of_the_training": self.share,
            "learnt": self.learnt.value,
            "possible": self.possible,
            "worth": self.worth,
            "metric": self.metric,
            "mode": self.mode,
            "seconds": self.seconds,
            "sizes": [self._size_to_dict(size) for size in self.sizes],
            "runs": [
                {key: value for key, value in run.to_dict().items() if key not in ("scores", "batches")}
                for run in self.runs
            ],
        }

    @staticmethod
    def _size_to_dict(size: Size) -> dict[str, Any]:
        behind = size.behind
        values = None if behind is None else {"value": behind.value, "noise": behind.noise(CONFIDENCE)}
        return {**size.__dict__, "behind": values}

    def __str__(self) -> str:
        wide = max(9, len(self.metric))
        head = f"{'states':>8} {self.metric:>{wide}} {'behind':>9} {'90 % interval':>20} "
        rows = [f"{head}{'ms a step':>10} {'parameters':>11}"]
        for size in self.sizes:
            behind, interval = "", ""
            if size.behind is not None:
                noise = size.behind.noise(CONFIDENCE)
                behind = f"{size.behind.value:.4f}"
                interval = f"{size.behind.value - noise:.4f} to {size.behind.value + noise:.4f}"
            rows.append(
                f"{size.states:8d} {size.metric:{wide}.4f} {behind:>9} {interval:>20} {1e3 * size.seconds:10.1f} "
                f"{size.parameters:11,}"
            )
        return "\n".join([*rows, *self.sentences()])

    def sentences(self) -> list[str]:
        """The answer in words."""
        big, seeds = self.sizes[0], len({run.seed for run in self.runs})
        how = f"{seeds} seeds, {self.steps} steps each"
        if self.share is not None:
            how += f"; all of it took {self.share:.1%} of the training's time"
        if self.answer == "train small":
            said = self._train_small(next(size for size in self.sizes if size.states == self.start_from))
        elif self.answer == "state matters":
            said = self._state_matters(big)
        else:
            said = [self._not_known()]
        return [*said, f"({how}. Differences that only a long training shows are not seen.)"]

    def _train_small(self, small: Size) -> list[str]:
        big = self.sizes[0]
        said = [
            f"Train small: {small.states} states learn as much as {big.states}, to within {self.worth:.0%} of what was "
            f"learnt. Start from {small.states}: {_saves(big, small)}."
        ]
        if math.isclose(small.rate, big.rate):
            return said
        return [*said, f"It learnt best with {small.rate / big.rate:g} times the learning rate of {big.states} states."]

    def _state_matters(self, big: Size) -> list[str]:
        worse = next(size for size in reversed(self.sizes) if size.verdict == "worse")
        assert worse.behind is not None
        start = f"Start from {self.start_from}"
        if self.start_from < big.states:
            start = f"{self.start_from} states learn as much as {big.states}: start from these"
        return [
            f"State matters: {worse.states} states are behind by {worse.behind.value:.3g} ± "
            f"{worse.behind.noise(CONFIDENCE):.2g}, {worse.behind.value / self.learnt.value:.0%} of what {big.states} "
            f"learnt. {start}, and shrink while training. With {worse.states} states {_saves(big, worse)}."
        ]

    def _not_known(self) -> str:
        if not self._has_learnt:
            return (
                f"Not known: in {self.steps} steps nothing was learnt that stands out from noise (the metric changed "
                f"by {self.learnt.value:.3g} ± {self.learnt.noise(CONFIDENCE):.2g}). Give more steps."
            )
        open_ = next((size for size in self.sizes[1:] if size.verdict == "not known"), None)
        if open_ is None:
            assert self.possible is not None
            return (
                f"Not known: no size is behind, but {self.sizes[0].states} states have learnt only "
                f"{self.learnt.value / self.possible:.0%} of what there is to learn, and sizes may part later. "
                "Give more steps."
            )
        assert open_.behind is not None
        return (
            f"Not known: {open_.states} states are behind by {open_.behind.value:.3g} ± "
            f"{open_.behind.noise(CONFIDENCE):.2g}, and {self.worth * self.learnt.value:.2g} would be worth a large "
            "state. Give more seeds or steps."
        )

    def plot(self, backend: Backend | None = None) -> Any:
        """Plot the metric of every short training over its number of states, and the means.

        Args:
            backend: ``"plotly"`` or ``"matplotlib"``; by default plotly where it is installed.

        Raises:
            MissingExtraError: the backend is not installed.
            ValueError: another backend.
        """
        points = {size.states: [run.metric for run in self.runs if run.states == size.states] for size in self.sizes}
        title = f"After {self.steps} steps: {self.answer}"
        return plot_metrics(points, title, f"{self.metric} after the short training", backend)


def _saves(big: Size, small: Size) -> str:
    """What the smaller size saves."""
    faster, fewer = 1 - small.seconds / big.seconds, 1 - small.parameters / big.parameters
    time = f"a step takes {faster:.0%} less time" if faster >= _NOTICED else "a step takes about the same time"
    return f"{time}, with {100 * fewer:.3g}% fewer parameters"


def answer_of(
    runs: Sequence[ShortRun],
    steps: int,
    *,
    worth: float,
    mode: Better = "max",
    metric: str = "metric",
    total_steps: int | None = None,
    seconds: float | None = None,
) -> Probe:
    """The answer of short trainings.

    Args:
        runs: at one rate for each size, with the same seeds, two or more.
        steps, worth, mode, metric, total_steps: see `probe`.
        seconds: time of all trainings; by default that of these.
    """
    sign = sign_of(mode)
    by_size: dict[int, list[ShortRun]] = {}
    for run in sorted(runs, key=lambda run: (-run.states, run.seed)):
        by_size.setdefault(run.states, []).append(run)
    big, *smaller = by_size.values()
    differences = [[sign * (one.metric - other.metric) for one, other in zip(big, g, strict=True)] for g in smaller]
    error, freedom = _pooled(differences)
    start = statistics.fmean(run.before for run in runs)
    spread, of_it = _pooled([[run.metric for run in group] for group in by_size.values()])
    learnt = Loss(sign * (_mean(big) - start), _mean(big), spread, 0.0, of_it, 0)
    sizes = [_size(big, steps, None, "as good")]
    for group, values in zip(smaller, differences, strict=True):
        sampling, examples = _sampling(big, group)
        behind = Loss(statistics.fmean(values), _mean(big), error, sampling, freedom, examples)
        sizes.append(_size(group, steps, behind, _verdict(behind, worth * learnt.value)))
    spent = sum(run.seconds for run in runs) if seconds is None else seconds
    possible = 1 - start if mode == "max" and _right_or_wrong(runs) else None
    return Probe(steps, total_steps, tuple(sizes), learnt, worth, tuple(runs), spent, mode, metric, possible)


def _right_or_wrong(runs: Sequence[ShortRun]) -> bool:
    """Whether every example is scored 0 or 1."""
    return all(run.scores is not None and bool(((run.scores == 0) | (run.scores == 1)).all()) for run in runs)


def _pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard error of the mean of a group, by the variance pooled over all of them, and its degrees of freedom."""
    variance = statistics.fmean(statistics.variance(group) for group in groups)
    return math.sqrt(variance / len(groups[0])), sum(len(group) - 1 for group in groups)


def _verdict(behind: Loss, margin: float) -> Verdict:
    noise = behind.noise(CONFIDENCE)
    if behind.value + noise <= margin:
        return "as good"
    return "worse" if behind.value > max(noise, margin) else "not known"


def _size(group: Sequence[ShortRun], steps: int, behind: Loss | None, verdict: Verdict) -> Size:
    seconds = min(run.seconds for run in group) / steps
    return Size(group[0].states, group[0].rate, _mean(group), behind, verdict, seconds, group[0].parameters)


def _mean(group: Sequence[ShortRun]) -> float:
    return statistics.fmean(run.metric for run in group)


def _sampling(big: Sequence[ShortRun], small: Sequence[ShortRun]) -> tuple[float, int]:
    """Standard error of the mean difference over the examples, and their number; zeros without scores."""
    scores = [[run.scores for run in group if run.scores is not None] for group in (big, small)]
    if not all(scores):
        return 0.0, 0
    one, other = (torch.stack(some).double().mean(0) for some in scores)
    return float((one - other).std() / math.sqrt(len(one))), len(one)


__all__ = ["CONFIDENCE", "Answer", "Probe", "ShortRun", "Size", "Verdict", "answer_of"]
