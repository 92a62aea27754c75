"""Metrics by name, as functions of a model: what ``evaluate=`` of `Compressor` and `compress` takes.

"accuracy"    share of predictions whose largest logit is that of the label; higher is better
"r2"          1 - sum (y - p)^2 / sum (y - mean y)^2, averaged over the outputs; higher is better
"fit"         100 (1 - ||y - p|| / ||y - mean y||) %, averaged over the outputs (Ljung 1999); higher is better
"mse"         mean of (y - p)^2; lower is better: pass ``mode="min"`` as well
"perplexity"  exp of the mean cross-entropy of the next token; lower is better: pass ``mode="min"`` as well
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.errors import ConfigError
from compressm.layers.padding import within
from compressm.observing.expected import by_role, is_array, lengths_of
from compressm.observing.inputs import calls_and_batches, refuse_files
from compressm.observing.labels import prediction_of
from compressm.observing.perplexity import tokens_of
from compressm.runtime.modes import modes_kept

Pairs = tuple[Tensor, Tensor]
Metric = Literal["accuracy", "r2", "fit", "mse", "perplexity"]


def score(name: str, data: Any) -> Callable[[nn.Module], float]:
    """A function that evaluates a model on data by a metric.

    Args:
        name: of the metric; see the module's text.
        data: one batch ``(inputs, targets)``, or an iterable of such batches, as ``[(inputs, targets)]``, which is
            needed if both have one shape; a mapping names them, with ``lengths`` where rows are padded. For
            ``"perplexity"`` the inputs alone, tokens. An iterator is read once and kept.

    Returns:
        a function of the model, which it leaves in the mode that it was in.

    Raises:
        ConfigError: an unknown metric, or data that are none.
    """
    if name not in _METRICS:
        close = difflib.get_close_matches(name, _METRICS, 1)
        raise ConfigError(f"metric {name!r} is not known: choose {' or '.join(close) or ', '.join(_METRICS)}")
    refuse_files(data)
    kept = list(cast("Iterable[Any]", data)) if isinstance(data, Iterator) else data

    def evaluate(model: nn.Module) -> float:
        with modes_kept(model), torch.no_grad():
            model.eval()
            return _METRICS[name](_pairs(model, kept, name == "perplexity"))

    evaluate.__name__ = name
    return evaluate


def better(metric: Metric) -> Literal["max", "min"]:
    """Whether a higher or a lower value of a metric is better: ``mode=`` of `Compressor` and `compress`."""
    return "min" if metric in ("mse", "perplexity") else "max"


def _pairs(model: nn.Module, data: Any, tokens: bool) -> Pairs:
    """All predictions, ``(N, outputs)``, and their targets, without padding."""
    predictions, targets = list[Tensor](), list[Tensor]()
    for call, batch in calls_and_batches(model, data):
        prediction = prediction_of(call(model)).cpu()
        target, lengths = _targets(call, batch, tokens)
        if tokens:
            prediction, lengths = prediction[:, :-1], None if lengths is None else (lengths - 1).clamp_min(0)
        if prediction.shape[: target.ndim] != target.shape and prediction.numel() != target.numel():
            raise ConfigError(
                f"the targets have shape {tuple(target.shape)}, and the model's output {tuple(prediction.shape)}: they "
                "do not belong together"
            )
        if prediction.ndim == 3:
            there = torch.ones(prediction.shape[:2], dtype=torch.bool)
            there = there if lengths is None else within(lengths, prediction.shape[1])
            target = target.reshape(*there.shape, *target.shape[2:])[there]
            prediction = prediction[there]
        predictions.append(prediction)
        targets.append(target)
    return torch.cat(predictions), torch.cat(targets)


def _targets(call: Any, batch: Any, tokens: bool) -> tuple[Tensor, Tensor | None]:
    """The targets of a batch, and the lengths of its rows where they are told."""
    found = by_role({str(key): value for key, value in batch.items()}, "data") if isinstance(batch, Mapping) else {}
    lengths = lengths_of(found, "data") if found else None
    if tokens:
        inputs = tokens_of(call)
        if inputs is None:
            raise ConfigError(
                "data hold no tokens, whole numbers of shape (batch, length), and perplexity is of tokens"
            )
        return inputs[:, 1:].cpu(), lengths
    target: Any = found.get("y")
    if isinstance(batch, tuple | list) and len(cast("list[Any]", batch)) > 1:
        target = batch[1]
    if not is_array(target):
        raise ConfigError("data hold no targets: pass batches (inputs, targets), or mappings with x and y")
    return torch.as_tensor(target).cpu(), lengths


def _accuracy(pairs: Pairs) -> float:
    prediction, target = pairs
    return float((prediction.argmax(-1) == target.reshape(prediction.shape[:-1])).double().mean())


def _errors(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Sums of squares of the errors and of the deviations from the mean, per output."""
    prediction, target = pairs[0].double(), pairs[1].double().reshape(pairs[0].shape)
    spread = (target - target.mean(0)).square().sum(0)
    if not bool((spread > 0).all()):
        raise ConfigError("a target is constant over the data, so that its share explained is not defined: use 'mse'")
    return (target - prediction).square().sum(0), spread


def _r2(pairs: Pairs) -> float:
    error, spread = _errors(pairs)
    return float((1 - error / spread).mean())


def _fit(pairs: Pairs) -> float:
    error, spread = _errors(pairs)
    return float((100 * (1 - (error / spread).sqrt())).mean())


def _mse(pairs: Pairs) -> float:
    prediction, target = pairs[0].double(), pairs[1].double().reshape(pairs[0].shape)
    return float((prediction - target).square().mean())


def _perplexity(pairs: Pairs) -> float:
    return math.exp(float(F.cross_entropy(pairs[0].double(), pairs[1].reshape(-1))))


_METRICS: dict[str, Callable[[Pairs], float]] = {
    "accuracy": _accuracy, "r2": _r2, "fit": _fit, "mse": _mse, "perplexity": _perplexity,
}  # fmt: skip

__all__ = ["Metric", "better", "score"]
