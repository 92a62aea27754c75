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
    prediction: Any = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(prediction, Tensor) or prediction.ndim < 2 or not prediction.is_floating_point():
        raise ConfigError(
            "the model must return a tensor of shape (batch, ..., classes or channels), or an object with such logits; "
            f"got {type(output).__name__}: pass a function that returns the loss of every sequence"
        )
    prediction = prediction.float() if prediction.dtype in (torch.float16, torch.bfloat16) else prediction
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


__all__ = ["Likelihood", "sampled_losses"]
