"""The quality of a checkpoint on held-out data: its loss, and a metric by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.errors import ConfigError
from compressm.layers import LanguageModel, SequenceRegressor
from compressm.observing.labels import Likelihood
from compressm.observing.perplexity import next_tokens
from compressm.observing.scores import Metric, score

Batches = Sequence[tuple[dict[str, Tensor], Tensor]]


@dataclass(frozen=True)
class Quality:
    """What a model achieves on data.

    Attributes:
        loss: cross-entropy in nats per prediction; the mean squared error where numbers are predicted.
        metric: its name.
        score: its value.
    """

    loss: float
    metric: Metric
    score: float


class Examination:
    """Measures models on the same data.

    Args:
        batches: inputs by the names of the model's arguments, and targets: classes, numbers, or the tokens themselves.
        metric: its name; None for the usual one: accuracy of classes, R² of numbers (the mean squared error if one of
            them never changes), perplexity of tokens.

    Raises:
        ConfigError: a metric that does not belong to such targets.
    """

    def __init__(self, batches: Batches, metric: Metric | None = None) -> None:
        self._batches = batches
        known = _metrics_of(batches)
        if metric is not None and metric not in known:
            fit = f"of these data choose {' or '.join(known)}" if known else "it needs --data with labels"
            raise ConfigError(f"--metric {metric}: {fit}")
        self.metric: Metric | None = metric or (known[0] if known else None)

    def quality(self, model: nn.Module) -> Quality | None:
        """The quality of a model; None without data or labels."""
        if self.metric is None:
            return None
        loss = mean_loss(model, self._batches)
        return Quality(loss, self.metric, math.exp(loss) if self.metric == "perplexity" else self._score(model))

    def score(self, model: nn.Module) -> float:
        """The metric alone."""
        if self.metric == "perplexity":  # out of the loss, which never holds all logits at once
            return math.exp(mean_loss(model, self._batches))
        return self._score(model)

    def _score(self, model: nn.Module) -> float:
        pairs: list[Any] = []
        for inputs, targets in self._batches:
            alone = next(iter(inputs.values()))
            pairs.append((alone, targets) if len(inputs) == 1 else {**inputs, "y": targets})
        return score(self.metric or "", pairs)(model)


def _metrics_of(batches: Batches) -> tuple[Metric, ...]:
    """The metrics of such targets, the usual one first."""
    if not batches or not batches[0][1].numel():
        return ()
    inputs, targets = batches[0]
    if targets.is_floating_point():
        every = torch.cat([y for _, y in batches])
        varied = bool((every.flatten(0, -2) if every.ndim > 1 else every[:, None]).std(0).gt(0).all())
        return ("r2", "fit", "mse") if varied else ("mse",)
    tokens = targets.shape == next(iter(inputs.values())).shape
    return ("perplexity",) if tokens else ("accuracy",)


def likelihood_of(model: nn.Module, batches: Batches) -> Likelihood:
    """Whether a model predicts numbers or classes: what its predictions tell of the loss.

    Args:
        model: a `SequenceRegressor` predicts numbers, whatever the data.
        batches: as for `Examination`. Targets that are numbers tell it of a model of the user's.
    """
    numbers = any(targets.is_floating_point() and targets.numel() for _, targets in batches)
    return "regression" if numbers or isinstance(model, SequenceRegressor) else "classification"


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Cross-entropy of classes and tokens, the mean squared error of numbers, in evaluation mode.

    The mean is over all predictions: batches may hold different numbers of them.
    """
    total, count = 0.0, 0
    for inputs, targets in batches:
        out = model(**inputs)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        if targets.is_floating_point():
            total += float(F.mse_loss(logits.float().reshape(targets.shape), targets.float(), reduction="sum"))
            count += targets.numel()
            continue
        if logits.ndim == 3:
            targets = _without_padding(model, inputs, targets)
            logits, targets = logits[:, :-1], targets[:, 1:]
        # Sequence by sequence, since a large vocabulary makes logits in float32 larger than the model.
        rows = zip(logits, targets, strict=True)
        total += sum(float(F.cross_entropy(one.float(), wanted, reduction="sum")) for one, wanted in rows)
        count += int((targets != -100).sum())
    return total / count


def _without_padding(model: nn.Module, inputs: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The tokens, with padding replaced by the label that cross entropy ignores."""
    present = model.present(**inputs) if isinstance(model, LanguageModel) else inputs.get("attention_mask")
    return tokens if present is None else next_tokens(tokens, present)


__all__ = ["Examination", "Quality", "likelihood_of", "mean_loss"]
