"""Losses of single sequences against targets that are drawn from the model's own prediction.

The gradients of such losses are scores, and their second moments are Fisher information. It measures how far the
predictions move, and does not vanish once a model has fitted its training data.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.errors import ConfigError

Likelihood = Literal["classification", "regression"]


def sampled_losses(output: Any, likelihood: Likelihood, present: Tensor | None = None) -> Tensor:
    """The loss of every sequence against targets drawn from the model's prediction for it.

    ``"classification"``: the output is logits, ``(batch, classes)``, or ``(batch, length, classes)`` with a target for
    every token; the loss is the cross-entropy, summed over the tokens. ``"regression"``: targets are drawn from
    ``N(output, 1)``; the loss is ``1/2 (output - target)^2``, summed over everything but the batch.

    Args:
        output: a tensor, or an object with ``logits``. Targets come from torch's random state.
        likelihood: see above.
        present: 1 for tokens and 0 for padding, shape ``(batch, length)``; padding has no targets.

    Returns:
        shape ``(batch,)``, in nats.

    Raises:
        ConfigError: an unknown likelihood, or an output that is no such tensor.
    """
    prediction = prediction_of(output)
    if likelihood == "classification":
        flat = prediction.flatten(0, -2)
        targets = torch.multinomial(flat.detach().softmax(-1), 1)[:, 0]
        losses = F.cross_entropy(flat, targets, reduction="none").view(prediction.shape[:-1])
    elif likelihood == "regression":
        targets = prediction.detach() + torch.randn_like(prediction)
        losses = (prediction - targets).square().sum(-1) / 2
    else:
        raise ConfigError(f"likelihood must be 'classification' or 'regression'; got {likelihood!r}")
    if present is not None and losses.shape == present.shape:
        losses = losses * present.to(losses)
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses


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


def divergences(before: Any, after: Any, likelihood: Likelihood, present: Tensor | None = None) -> Tensor:
    """The Kullback-Leibler divergence of one model's predictions from another's, for every prediction.

    Args:
        before, after: outputs of both models on the same inputs; see `sampled_losses` for their forms.
        likelihood: see `sampled_losses`. ``"regression"``: both predict a normal distribution of unit variance.
        present: see `sampled_losses`.

    Returns:
        float64, in nats, one entry for every prediction that is not padding, shape ``(predictions,)``.
    """
    old, new = prediction_of(before).double(), prediction_of(after).double()
    if likelihood == "classification":
        old, new = old.log_softmax(-1), new.log_softmax(-1)
        each = old.exp() * (old - new)
        found = each.where(old > -torch.inf, 0.0).sum(-1)  # of a class that a mask excludes: 0 log 0 = 0
    else:
        found = (old - new).square().sum(-1) / 2
    if present is not None and found.shape == present.shape:
        return found[present.bool()]
    return found.flatten()


__all__ = ["Likelihood", "divergences", "prediction_of", "sampled_losses"]
