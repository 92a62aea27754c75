"""What a run learns: classes, numbers, or the next token; and how well it does, by its loss and a metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.cutting.metrics import Better
from compressm.errors import ConfigError
from compressm.lab.data.sequences import SequenceData, Split, Task
from compressm.layers.padding import within
from compressm.observing.scores import Metric, better


@dataclass(frozen=True)
class Quality:
    """How well a model does on a split.

    Attributes:
        loss: mean cross-entropy in nats per prediction, or mean squared error.
        metric: name of the metric.
        score: its value.
    """

    loss: float
    metric: Metric
    score: float

    @property
    def sign(self) -> int:
        """1 if a higher score is better, -1 if a lower one is."""
        return 1 if better(self.metric) == "max" else -1

    def __str__(self) -> str:
        return f"{self.metric} {self.score:.4f} (loss {self.loss:.4f})"


@dataclass(frozen=True)
class Score:
    """What one sequence is judged by.

    Attributes:
        name: in words.
        mode: ``"max"`` if a higher score is better, ``"min"`` if a lower one is.
    """

    name: str
    mode: Better


class Learning(Protocol):
    """A kind of task. ``prediction`` is the model's output, ``y`` what it should be; see `SequenceData`."""

    metric: Metric
    score: Score

    def loss(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """The mean loss of a batch, a scalar."""
        ...

    def sums(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """Sums over a batch, float64 of shape ``(k,)``; those of batches and processes are added."""
        ...

    def quality(self, sums: Tensor) -> Quality:
        """The quality on all that was summed."""
        ...

    def scores(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """The `Score` of every sequence of a batch, shape ``(N,)``."""
        ...


class Classes:
    """Cross entropy of one class per sequence; the metric is the share that is classified correctly."""

    metric: Metric = "accuracy"
    score = Score("accuracy", "max")

    def loss(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """See `Learning`."""
        return F.cross_entropy(prediction, y)

    def sums(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """Sequences, their cross entropies, and how many are right."""
        each = F.cross_entropy(prediction, y, reduction="none").double()
        return torch.stack([torch.ones_like(each).sum(), each.sum(), (prediction.argmax(-1) == y).double().sum()])

    def quality(self, sums: Tensor) -> Quality:
        """See `Learning`."""
        count, loss, right = sums.tolist()
        return Quality(loss / count, self.metric, right / count)

    def scores(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """1 where the class is right, 0 elsewhere."""
        return (prediction.argmax(-1) == y).float()


class NextToken:
    """Cross entropy of every next token, except where ``y`` is below 0, which asks for none. The metric is the
    perplexity, its exponential, or the share that is predicted correctly, the accuracy."""

    score = Score("nats a token", "min")

    def __init__(self, metric: Metric) -> None:
        self.metric: Metric = metric

    def loss(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """See `Learning`."""
        return F.cross_entropy(*_asked(prediction, y))

    def sums(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """Predictions, their cross entropies, and how many are right."""
        logits, answers = _asked(prediction, y)
        each = F.cross_entropy(logits, answers, reduction="none").double()
        return torch.stack([torch.ones_like(each).sum(), each.sum(), (logits.argmax(-1) == answers).double().sum()])

    def quality(self, sums: Tensor) -> Quality:
        """See `Learning`."""
        count, loss, right = sums.tolist()
        score = right / count if self.metric == "accuracy" else math.exp(min(loss / count, 700.0))
        return Quality(loss / count, self.metric, score)

    def scores(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """The mean cross entropy of a sequence's tokens that are asked for, in nats."""
        answers, there = y[:, 1:].clamp_min(0), y[:, 1:] >= 0
        losses = F.cross_entropy(prediction[:, :-1].transpose(1, 2), answers, reduction="none")
        return (losses * there).sum(1) / there.sum(1).clamp_min(1)


def _asked(prediction: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, shape ``(count, vocabulary)``, and the next tokens that they should give, where any is asked for."""
    answers = y[:, 1:]
    there = answers >= 0
    return prediction[:, :-1][there], answers[there]


class Numbers:
    """The mean squared error of numbers, per sequence or per step; padding does not count.

    The metric is ``r2``, ``fit`` or ``mse``; see `compressm.observing.scores`.
    """

    score = Score("squared error", "min")

    def __init__(self, metric: Metric) -> None:
        self.metric: Metric = metric

    def loss(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """See `Learning`."""
        prediction, y = _present(prediction, y, lengths)
        return F.mse_loss(prediction, y)

    def sums(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """Targets, and per output the squared errors, the values and their squares."""
        prediction, y = (one.double() for one in _present(prediction, y, lengths))
        count = torch.full((1,), float(len(y)), dtype=torch.float64, device=y.device)
        return torch.cat([count, (y - prediction).square().sum(0), y.sum(0), y.square().sum(0)])

    def quality(self, sums: Tensor) -> Quality:
        """See `Learning`."""
        count, (error, total, squares) = float(sums[0]), sums[1:].view(3, -1)
        mse = float(error.mean()) / count
        unexplained = error / (squares - total.square() / count)
        scores: dict[Metric, Callable[[], float]] = {
            "r2": lambda: float((1 - unexplained).mean()),
            "fit": lambda: float((100 * (1 - unexplained.sqrt())).mean()),
            "mse": lambda: mse,
        }
        return Quality(mse, self.metric, scores[self.metric]())

    def scores(self, prediction: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """The mean squared error of a sequence's numbers."""
        error = (y - prediction).square().mean(-1)
        if error.ndim == 1:
            return error
        if lengths is None:
            return error.mean(1)
        return torch.where(within(lengths, y.shape[1]), error, 0.0).sum(1) / lengths


_METRICS: dict[Task, tuple[Metric, ...]] = {
    "classification": ("accuracy",),
    "regression": ("r2", "fit", "mse"),
    "language": ("perplexity", "accuracy"),
}


def learning_of(task: Task, metric: Metric | None) -> Learning:
    """The task of a data set, measured by a metric; None for the usual one.

    Raises:
        ConfigError: a metric of another task.
    """
    known = _METRICS[task]
    if metric is not None and metric not in known:
        raise ConfigError(f"run.metric = {metric!r}: the task is {task}; choose {' or '.join(known)}, or leave it out")
    if task == "regression":
        return Numbers(metric or known[0])
    return Classes() if task == "classification" else NextToken(metric or known[0])


@torch.no_grad()
def sums_on(
    learning: Learning, model: nn.Module, data: SequenceData, split: Split, size: int, rank: int = 0, world: int = 1
) -> Tensor:
    """The sums of a split, or of every ``world``-th sequence of it; the model is left in evaluation mode.

    Args:
        size: sequences per batch.
    """
    model.eval()
    found: Tensor | None = None
    for indices in data.shares(split, size, rank, world):
        (u, y), lengths = data.batch(split, indices), data.lengths(split, indices)
        sums = learning.sums(model(u) if lengths is None else model(u, lengths), y, lengths)
        found = sums if found is None else found + sums
    if found is None:
        raise ConfigError(f"{len(split)} sequences to evaluate on are fewer than the {world} processes: start fewer")
    return found


@torch.no_grad()
def scores_on(learning: Learning, model: nn.Module, data: SequenceData, split: Split, size: int) -> Tensor:
    """The `Score` of every sequence of a split, shape ``(N,)``; the model is left in evaluation mode.

    Args:
        size: sequences per batch.
    """
    model.eval()
    found: list[Tensor] = []
    for indices in data.shares(split, size):
        (u, y), lengths = data.batch(split, indices), data.lengths(split, indices)
        found.append(learning.scores(model(u) if lengths is None else model(u, lengths), y, lengths))
    return torch.cat(found)


def _present(prediction: Tensor, y: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Predictions and targets, shape ``(count, outputs)``, without padding."""
    if y.ndim < 3:
        return prediction, y
    if lengths is None:
        return prediction.flatten(0, 1), y.flatten(0, 1)
    there = within(lengths, y.shape[1])
    return prediction[there], y[there]


__all__ = ["Learning", "Quality", "Score", "learning_of", "scores_on", "sums_on"]
