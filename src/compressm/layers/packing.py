"""Several sequences in one row, one after the other, without padding: states and short convolutions of one do not reach
into the next."""

from __future__ import annotations

import torch
from torch import Tensor


def starts_of(seq_idx: Tensor | None) -> Tensor | None:
    """Where sequences begin: the number of every token's sequence to bool, both of shape ``(batch, length)``; None for
    one sequence a row."""
    if seq_idx is None:
        return None
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    return torch.cat([torch.ones_like(seq_idx[:, :1], dtype=torch.bool), changes], 1)


def steps_since(starts: Tensor) -> Tensor:
    """How many steps of its sequence lie before each token: bool to int64, both of shape ``(batch, length)``."""
    places = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return places - places.masked_fill(~starts, 0).cummax(1).values


__all__ = ["starts_of", "steps_since"]
