"""The scan with one decay per head and a matrix-valued state: Mamba-2 (SSD), RetNet, linear attention.

    S_t = exp(log_decay_t) S_{t-1} + x_t B_t^T,   y_t = S_t C_t

with ``S`` (p, n) per head (Dao, Gu 2024, section 6).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

Engine = Literal["auto", "loop"]


@overload
def ssd_scan(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    return_state: Literal[False] = False, engine: Engine = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def ssd_scan(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    *, return_state: Literal[True], engine: Engine = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def ssd_scan(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    engine: Engine = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of sequences; differentiable in every tensor argument.

    Args:
        x: input (values), shape ``(batch, length, heads, p)``.
        log_decay: logarithm of the decay, at most 0, shape ``(batch, length, heads)``. Mamba-2: ``delta A``, with
            ``delta x`` for ``x``.
        B, C: input and output vectors (keys and queries), shape ``(batch, length, groups, n)``; ``groups`` divides
            ``heads``, and head ``h`` uses group ``h // (heads // groups)``.
        initial_state: shape ``(batch, heads, p, n)``; zero by default.
        return_state: also return the state after the last step.
        engine: ``"auto"``, or ``"loop"``: the definition, for reference.

    Returns:
        ``y``, shape and dtype of ``x``; with ``return_state`` also the last state, shape ``(batch, heads, p, n)``.
    """
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        y, state = ssd_step(state, x[:, t], log_decay[:, t], B[:, t], C[:, t])
        outputs.append(y)
    y = torch.stack(outputs, 1)
    return (y, state) if return_state else y


def ssd_step(state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, for generation and control.

    Args:
        state: shape ``(batch, heads, p, n)``.
        x: shape ``(batch, heads, p)``.
        log_decay: shape ``(batch, heads)``.
        B, C: shape ``(batch, groups, n)``.

    Returns:
        ``y`` of shape ``(batch, heads, p)`` and the next state.
    """
    repeats = x.shape[1] // B.shape[1]
    key, query = (v.repeat_interleave(repeats, 1)[:, :, None, :] for v in (B, C))
    state = torch.exp(log_decay)[..., None, None] * state + x[..., None] * key
    return (state * query).sum(-1).to(x.dtype), state
