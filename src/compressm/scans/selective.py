"""The selective scan of Mamba (S6): a diagonal recurrence whose step, input and output vectors vary in time.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,   y_t = C_t . h_t

per channel, with ``A`` (d, n) negative and ``B_t``, ``C_t`` (n) shared by all channels (Gu, Dao 2023, eq. 2 and
algorithm 2). What the layer does around it (``D u``, gate, softplus of delta) is the layer's matter.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

Engine = Literal["auto", "loop"]


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    return_state: Literal[False] = False, engine: Engine = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    *, return_state: Literal[True], engine: Engine = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    engine: Engine = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of sequences; differentiable in every tensor argument.

    Args:
        u: input, shape ``(batch, length, d)``.
        delta: step sizes, non-negative, shape ``(batch, length, d)``.
        A: decay rates, negative, shape ``(d, n)``.
        B, C: input and output vectors, shape ``(batch, length, n)``.
        initial_state: ``h_{-1}``, shape ``(batch, d, n)``; zero by default.
        return_state: also return the state after the last step.
        engine: ``"auto"``, or ``"loop"``: the definition, for reference.

    Returns:
        ``y``, shape and dtype of ``u``; with ``return_state`` also ``h`` after the last step, shape ``(batch, d, n)``.
    """
    state = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    outputs = []
    for t in range(u.shape[1]):
        y, state = selective_step(state, u[:, t], delta[:, t], A, B[:, t], C[:, t])
        outputs.append(y)
    y = torch.stack(outputs, 1)
    return (y, state) if return_state else y


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
