"""The perplexity of a language model on calls of it, a sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.observing.expected import role_of
from compressm.observing.inputs import Call
from compressm.observing.labels import prediction_of
from compressm.runtime.modes import modes_kept

_NO_TOKENS = ("position_ids", "token_type_ids", "seq_idx")  # arguments of transformers of the tokens' shape


def tokens_of(call: Call) -> Tensor | None:
    """The tokens of a call, integers of shape ``(batch, length)``; None if there are none.

    They may come after their mask, as in a data set whose columns are in alphabetical order.
    """
    named = {name: role_of(name) for name in call.kwargs}
    inputs = [value for name, value in call.kwargs.items() if named[name] == "x"]
    others = [value for name, value in call.kwargs.items() if named[name] is None and name not in _NO_TOKENS]
    values = (*call.args, *inputs, *others)
    return next(
        (one for one in values if isinstance(one, Tensor) and one.ndim == 2 and not one.is_floating_point()), None
    )


def present_in(model: nn.Module, call: Call) -> Tensor | None:
    """False at padding, shape ``(batch, length)``; None without padding."""
    mask = call.kwargs.get("attention_mask")
    if mask is None and hasattr(model, "present"):
        return cast("Any", model).present(*call.args, **call.kwargs)
    return mask


def next_tokens(tokens: Tensor, present: Tensor) -> Tensor:
    """The tokens that are to be predicted, with -100, which cross-entropy ignores, in place of padding and of the first
    token behind padding: no token comes before it that it could be predicted from.

    Args:
        tokens, present: shape ``(batch, length)``; False or 0 at padding.
    """
    there = present.bool().to(tokens.device)
    before = torch.cat([torch.ones_like(there[:, :1]), there[:, :-1]], 1)
    return tokens.masked_fill(~(there & before), -100)


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Call]) -> float:
    """``exp`` of the mean cross-entropy of the next token, without padding.

    Args:
        model: a language model.
        batches: calls of it.
    """
    nats, count = 0.0, 0
    with modes_kept(model):
        model.eval()
        for call in batches:
            tokens, present = cast("Tensor", tokens_of(call)), present_in(model, call)
            wanted = tokens if present is None else next_tokens(tokens, present)
            # Sequence by sequence, since logits in float32 over a large vocabulary take much memory.
            for logits, row in zip(prediction_of(call(model)), wanted, strict=True):
                nats += float(F.cross_entropy(logits[:-1], row[1:], reduction="sum", ignore_index=-100))
                count += int((row[1:] != -100).sum())
    return math.exp(nats / max(count, 1))


__all__ = ["next_tokens", "perplexity", "present_in", "tokens_of"]
