"""Gradients whose second moments are the Fisher information of a model's own predictions.

It measures how far the predictions move, needs no labels, and does not vanish once a model has fitted its training
data. Gradients of losses against targets drawn from the predictions have the same mean square. But a confident model
draws the targets that count rarely: of a classifier on MNIST a few in 400. Its estimate from so many is off by a factor
of two to eight. `fisher_probes` lets every class count in every sequence.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from compressm.errors import ConfigError

Likelihood = Literal["classification", "regression"]


def fisher_probes(output: Any, likelihood: Likelihood, present: Tensor | None = None) -> Tensor:
    """Random numbers of every sequence whose gradients have the Fisher information of its predictions as their mean
    square.

    Each is the sum over the sequence's predictions ``z`` (logits, or means) of ``v . z``, with a random ``v`` for which
    ``E[v v^T] = F``, independent from prediction to prediction. With signs ``e = +-1`` of equal probability,

    - ``"classification"``: ``F = diag(p) - p p^T = S S^T`` and ``v = S e``, with ``p = softmax(z)`` and ``S =
      diag(p)^1/2 - p (p^1/2)^T``;
    - ``"regression"``, for predictions of a normal distribution of unit variance: ``F = I`` and ``v = e``.

    Args:
        output: logits of shape ``(batch, classes)`` or ``(batch, length, classes)``, or means of shape ``(batch, ...,
            channels)``; a tensor, or an object with ``logits``. The signs come from torch's random state.
        likelihood: see above.
        present: 1 for tokens and 0 for padding, shape ``(batch, length)``; padding predicts nothing.

    Returns:
        shape ``(batch,)``, at least float32.

    Raises:
        ConfigError: an unknown likelihood, or an output that is no such tensor.
    """
    z = _telling(prediction_of(output), likelihood)
    e = torch.empty_like(z, requires_grad=False).bernoulli_().mul_(2).sub_(1)
    if likelihood == "classification":
        p = z.detach().softmax(-1)
        root = p.sqrt() * e
        v = root - p * root.sum(-1, keepdim=True)
        z = z.where(p > 0, 0.0)  # a class that a mask excludes has the logit minus infinity
    elif likelihood == "regression":
        v = e
    else:
        raise ConfigError(f"likelihood must be 'classification' or 'regression'; got {likelihood!r}")
    probes = (v * z).sum(-1)
    if present is not None and probes.shape == present.shape:
        probes = probes * present.to(probes)
    return probes.flatten(1).sum(1) if probes.ndim > 1 else probes


def prediction_of(output: Any) -> Tensor:
    """The logits or means in a model's output, shape ``(batch, ..., classes or channels)``, at least float32.

    Raises:
        ConfigError: there is no such tensor.
    """
    prediction: Any = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(prediction, Tensor) or prediction.ndim < 2 or not prediction.is_floating_point():
        raise ConfigError(
            "the model must return a tensor of shape (batch, ..., classes or channels), or an object with such logits; "
            f"got {type(output).__name__}: pass a function that returns the loss of every sequence"
        )
    return prediction.float() if prediction.dtype in (torch.float16, torch.bfloat16) else prediction


def _telling(prediction: Tensor, likelihood: Likelihood) -> Tensor:
    """The prediction, unless its likelihood is the same whatever it is: one class alone has the probability 1.

    Raises:
        ConfigError: it is.
    """
    if likelihood == "classification" and prediction.shape[-1] == 1:
        raise ConfigError(
            f"the model predicts one number, shape {tuple(prediction.shape)}, and loss='classification' reads its last "
            "axis as classes, of which one alone is always certain: pass loss='regression', or a function that returns "
            "the loss of every sequence"
        )
    return prediction


def divergences(before: Any, after: Any, likelihood: Likelihood, present: Tensor | None = None) -> Tensor:
    """The Kullback-Leibler divergence of one model's predictions from another's, for every prediction.

    Args:
        before, after: outputs of both models on the same inputs; see `fisher_probes` for their forms.
        likelihood: see `fisher_probes`. ``"regression"``: both predict a normal distribution of unit variance.
        present: see `fisher_probes`.

    Returns:
        float64, in nats, one entry for every prediction that is not padding, shape ``(predictions,)``.
    """
    old, new = (_telling(prediction_of(one), likelihood).double() for one in (before, after))
    if likelihood == "classification":
        old, new = old.log_softmax(-1), new.log_softmax(-1)
        each = old.exp() * (old - new)
        found = each.where(old > -torch.inf, 0.0).sum(-1)  # of a class that a mask excludes: 0 log 0 = 0
    else:
        found = (old - new).square().sum(-1) / 2
    if present is not None and found.shape == present.shape:
        return found[present.bool()]
    return found.flatten()


__all__ = ["Likelihood", "divergences", "fisher_probes", "prediction_of"]
