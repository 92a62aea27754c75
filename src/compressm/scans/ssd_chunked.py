"""The matrix-product form of `ssd_scan`, in PyTorch's operations, and the parts that other scans share with it.

Inside a chunk of Q steps the output is ``(C B^T * decays) x``, a masked Q x Q matrix per head; between chunks only the
state goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.scans.transforms import transformed, twice


def with_factors(
    recurrence: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    delta: Tensor | None,
    D: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Step sizes and a skip, as arguments of `ssd_scan`, around a recurrence of ``(x, log_decay, B, C, state)`` that
    knows neither. Outputs have the dtype of ``x``."""
    values = x if delta is None else (x * delta[..., None]).to(x.dtype)
    y, state = recurrence(values, log_decay, B, C, state)
    return (y if D is None else (y + D[:, None] * x).to(x.dtype)), state


def by_chunk(tensor: Tensor, Q: int) -> Tensor:
    """``(batch, length, heads, m)`` to ``(batch, chunks, heads, Q, m)``.

    The end is padded with zeros, which add nothing and have no decay, so the last state is right.
    """
    batch, length = tensor.shape[:2]
    chunks = -(-length // Q)
    missing = chunks * Q - length
    padded = F.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor
    return padded.reshape(batch, chunks, Q, *tensor.shape[2:]).transpose(2, 3)


def elapsed_in_chunk(log_decay: Tensor, Q: int) -> Tensor:
    """Logarithm of the decay from the start of each chunk up to and including each of its steps.

    The decays between steps are differences of these sums. If the decay is strong, float32 differences would be
    inaccurate, so the sums are float64 for every dtype. Logarithms are clamped to -800, where exp is zero even in
    float64, so that a decay of exactly zero has a finite sum.

    Args:
        log_decay: shape ``(batch, length, heads)``.

    Returns:
        float64, shape ``(batch, chunks, heads, Q)``.
    """
    return by_chunk(log_decay.double().clamp_min(-800.0)[..., None], Q).squeeze(-1).cumsum(-1)


def chunked(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """`ssd_scan` of tensors of one dtype, from an initial state."""
    (batch, length, heads, p), (groups, n) = x.shape, B.shape[2:]
    Q = _chunk_length(length, heads, groups, p, n)
    chunks = -(-length // Q)
    per_group = heads // groups
    values, keys, queries = (by_chunk(tensor, Q) for tensor in (x, B, C))
    elapsed = elapsed_in_chunk(log_decay, Q)
    since_start, to_end = (e.to(x.dtype).exp()[..., None] for e in (elapsed, elapsed[..., -1:] - elapsed))

    # Inside a chunk: step i reads the value written at step j <= i, decayed over j+1..i.
    later = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    between = (elapsed[..., :, None] - elapsed[..., None, :]).to(x.dtype)
    decays = between.masked_fill(later, -torch.inf).exp()
    scores = (queries @ keys.transpose(-1, -2)).view(batch, chunks, groups, 1, Q, Q)
    mixing = (scores * decays.view(batch, chunks, groups, per_group, Q, Q)).view(batch, chunks, heads, Q, Q)
    y = mixing @ values

    # Between chunks: the state that each chunk adds, the chain of states, and the output of the state before a chunk.
    weighted = (values * to_end).view(batch, chunks, groups, per_group, Q, p)
    added = (weighted.transpose(-1, -2) @ keys[:, :, :, None]).view(batch, chunks, heads, p, n)
    states = chain_of_states(added, since_start[..., -1:, :], initial)
    before = torch.cat([initial[:, None], states[:, :-1]], 1).view(batch, chunks, groups, per_group, p, n)
    read = (queries[:, :, :, None] @ before.transpose(-1, -2)).view(batch, chunks, heads, Q, p)
    y = y + since_start * read
    return y.transpose(2, 3).reshape(batch, chunks * Q, heads, p)[:, :length], states[:, -1]


def _chunk_length(length: int, heads: int, groups: int, p: int, n: int) -> int:
    """The Q that balances the Q x Q matrices (about 30 operations per entry besides the products) against the memory
    traffic of the states (about 100 operations per number and chunk)."""
    ideal = math.sqrt(100 * p * n / (2 * n * groups / heads + 2 * p + 30))
    return min(length, max(8, min(128, 2 ** round(math.log2(ideal)))))


def chain_of_states(added: Tensor, decay: Tensor, initial: Tensor) -> Tensor:
    """``S_c = decay_c * S_{c-1} + added_c`` along dim 1.

    Args:
        added: shape ``(batch, chunks, heads, p, n)``.
        decay: shape ``(batch, chunks, heads, 1, 1)``, or with n for the last 1.
        initial: ``S_{-1}``, shape ``(batch, heads, p, n)``.
    """
    if transformed():
        return _composed_chain(added, decay, initial)
    result: Any = _Chain.apply(added, decay, initial)
    return result


def _composed_chain(added: Tensor, decay: Tensor, initial: Tensor) -> Tensor:
    """`chain_of_states` composed of operations that PyTorch can differentiate and vectorise."""
    states, state = list[Tensor](), initial
    for c in range(added.shape[1]):
        state = torch.addcmul(added[:, c], decay[:, c], state)
        states.append(state)
    return torch.stack(states, 1)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, added: Tensor, decay: Tensor, initial: Tensor) -> Tensor:
        states, before = torch.empty_like(added), initial
        for c in range(added.shape[1]):
            before = torch.addcmul(added[:, c], decay[:, c], before, out=states[:, c])
        ctx.save_for_backward(states, decay, initial)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, decay, initial = ctx.saved_tensors
        if twice():
            return _chain_gradients(grad, states, decay, initial)
        adjoint, after = torch.empty_like(states), torch.zeros_like(initial)
        for c in range(grad.shape[1] - 1, -1, -1):
            torch.add(grad[:, c], after, out=adjoint[:, c])
            after = adjoint[:, c] * decay[:, c]
        before = torch.cat([initial[:, None], states[:, :-1]], 1)
        return adjoint, (adjoint * before).sum_to_size(decay.shape), after


def _chain_gradients(grad: Tensor, states: Tensor, decay: Tensor, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `chain_of_states`, differentiable: ``adjoint_c = grad_c + decay_{c+1} adjoint_{c+1}``."""
    later = torch.cat([decay[:, :1], decay.flip(1)[:, :-1]], 1)  # the first entry is multiplied by zero
    adjoint = _composed_chain(grad.flip(1), later, torch.zeros_like(initial)).flip(1)
    before = torch.cat([initial[:, None], states[:, :-1]], 1)
    return adjoint, (adjoint * before).sum_to_size(decay.shape), adjoint[:, 0] * decay[:, 0]
