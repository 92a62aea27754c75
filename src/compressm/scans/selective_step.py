"""One step of the selective recurrence (S6)."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_step(state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, for generation and control.

    Args:
        state: shape ``(batch, d, n)``.
        u, delta: shape ``(batch, d)``.
        A: shape ``(d, n)``.
        B, C: shape ``(batch, n)``.

    Returns:
        ``y`` of shape ``(batch, d)`` and the next state.
    """
    state = torch.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None, :]
    return (state * C[:, None, :]).sum(-1).to(u.dtype), state
