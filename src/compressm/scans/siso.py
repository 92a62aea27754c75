"""The scan of one diagonal linear time-invariant system per channel (S4D, DSS): single input, single output.

    x_k = lam x_{k-1} + u_k,   y_k = Re(sum_i c_i x_{k,i})

for every channel, with ``n`` states each. ``c`` is the elementwise product of output and input vector; a single-input
single-output system depends on them only through ``c``.

As in `lti_chunked` all large operations are real matrix products, here one per channel: a Toeplitz matrix of the
impulse response inside chunks of T steps, and a chain of states between chunks. (Convolution with the whole
response by FFT, as in the publications of these layers, took two to nine times as long on a CPU at n = 32 and 64, and
returns no state.)
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.scans.chain import chain, chain_engine
from compressm.scans.frame import check_engine, check_shapes, empty, empty_scan, in_form, without_autocast
from compressm.scans.lti_chunked import powers

Engine = Literal["auto", "chunked", "loop", "graph"]


@overload
def siso_scan(
    u: Tensor, log_radius: Tensor, phase: Tensor, c_re: Tensor, c_im: Tensor, initial_state: Tensor | None = None,
    return_state: Literal[False] = False, engine: Engine = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def siso_scan(
    u: Tensor, log_radius: Tensor, phase: Tensor, c_re: Tensor, c_im: Tensor, initial_state: Tensor | None = None,
    *, return_state: Literal[True], engine: Engine = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@without_autocast
def siso_scan(
    u: Tensor,
    log_radius: Tensor,
    phase: Tensor,
    c_re: Tensor,
    c_im: Tensor,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    engine: Engine = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run every channel's system over a batch of sequences; differentiable in every tensor argument.

    Args:
        u: real input, shape ``(batch, length, channels)``; half precision is widened to float32 inside.
        log_radius: ``log |lam|``, negative, shape ``(channels, n)``.
        phase: ``arg lam`` in radians, shape ``(channels, n)``.
        c_re, c_im: real and imaginary part of ``c``, shape ``(channels, n)``.
        initial_state: ``x_{-1}`` as real and imaginary part, shape ``(batch, 2, channels, n)``; zero by default.
        return_state: also return the state after the last step.
        engine: ``"chunked"``; ``"loop"``, the definition, for reference; or ``"graph"`` (one loop node). ``"auto"`` is
            ``"graph"`` while `torch.export` traces, and ``"chunked"`` otherwise.

    Returns:
        ``y``, shape and dtype of ``u``; with ``return_state`` also the last state, shape ``(batch, 2, channels, n)``.

    Raises:
        ValueError: shapes that do not fit together, or an unknown engine.
    """
    check_engine(engine, "auto", "chunked", "loop", "graph")
    _check(u, log_radius, phase, c_re, c_im, initial_state)
    dtype = torch.promote_types(torch.promote_types(u.dtype, c_re.dtype), torch.float32)
    state = u.new_zeros(u.shape[0], 2, *c_re.shape) if initial_state is None else initial_state
    system = (log_radius.to(dtype), phase.to(dtype), c_re.to(dtype), c_im.to(dtype))
    if empty(u):
        y, state = empty_scan(tuple(u.shape), state.to(dtype), u, *system)
        return (y, state) if return_state else y
    y, state = in_form(
        engine,
        lambda u, state: _chunked(u, *system, state),
        lambda state, u: siso_step(state, u, *system),
        state.to(dtype),
        u.to(dtype),
    )
    return (y.to(u.dtype), state) if return_state else y.to(u.dtype)


def siso_step(
    state: Tensor, u: Tensor, log_radius: Tensor, phase: Tensor, c_re: Tensor, c_im: Tensor
) -> tuple[Tensor, Tensor]:
    """One step, for generation and control.

    Args:
        state: real and imaginary part, shape ``(batch, 2, channels, n)``.
        u: shape ``(batch, channels)``.
        log_radius, phase, c_re, c_im: shape ``(channels, n)``.

    Returns:
        ``y`` of shape ``(batch, channels)`` and the next state.
    """
    radius = log_radius.exp()
    lam_re, lam_im = radius * phase.cos(), radius * phase.sin()
    re, im = state[:, 0], state[:, 1]
    re, im = lam_re * re - lam_im * im + u[..., None], lam_re * im + lam_im * re
    return (c_re * re - c_im * im).sum(-1), torch.stack([re, im], 1)


def _check(
    u: Tensor, log_radius: Tensor, phase: Tensor, c_re: Tensor, c_im: Tensor, initial_state: Tensor | None
) -> None:
    if u.ndim != 3 or c_re.ndim != 2 or u.shape[2] != c_re.shape[0]:
        raise ValueError(
            f"u must be (batch, length, channels) and c_re (channels, n); got {tuple(u.shape)} and {tuple(c_re.shape)}"
        )
    shape = tuple(c_re.shape)
    check_shapes(
        {"u": u, "c_re": c_re},
        {
            "log_radius": (log_radius, shape),
            "phase": (phase, shape),
            "c_im": (c_im, shape),
            "initial_state": (initial_state, (u.shape[0], 2, *shape)),
        },
    )


def _chunked(
    u: Tensor, log_radius: Tensor, phase: Tensor, c_re: Tensor, c_im: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    (batch, length, channels), n = u.shape, c_re.shape[1]
    T = _chunk_length(length, n)
    chunks = -(-length // T)
    missing = chunks * T - length
    padded = F.pad(u, (0, 0, 0, missing)) if missing else u
    inputs = padded.view(batch, chunks, T, channels).permute(3, 0, 1, 2).reshape(channels, batch * chunks, T)

    # lam^j for j = 0..T; then, per channel, the map from a state to the output 0..T steps later, (channels, T + 1, 2n).
    flat = powers(log_radius.reshape(-1), phase.reshape(-1), torch.arange(T + 1, device=u.device))
    power_re, power_im = (power.view(T + 1, channels, n).transpose(0, 1) for power in flat)
    c_re, c_im = c_re[:, None, :], c_im[:, None, :]
    observe = torch.cat([power_re * c_re - power_im * c_im, -(power_re * c_im + power_im * c_re)], -1)
    # Inside a chunk: the Toeplitz matrix with K_{t-s} in entry (s, t), K_j = Re(sum c lam^j).
    kernel = F.pad(observe[:, :T, :n].sum(-1), (T - 1, 0))  # index t - s + T - 1
    steps = torch.arange(T, device=u.device)
    toeplitz = kernel[:, (steps[None, :] - steps[:, None] + T - 1).reshape(-1)].view(channels, T, T)
    y = (inputs @ toeplitz).view(channels, batch, chunks, T)

    # Between chunks: the input at step s adds lam^{T-1-s} times itself to the state at the end of its chunk.
    reach = torch.cat([power_re[:, :T], power_im[:, :T]], -1).flip(1)  # (channels, T, 2n)
    across = torch.stack([power_re[:, T], power_im[:, T]]).reshape(2, channels * n)
    before = initial[:, None]
    if chunks > 1:
        entering = inputs.view(channels, batch, chunks, T)[:, :, :-1].reshape(channels, -1, T)
        added = (entering @ reach).view(channels, batch, chunks - 1, 2, n).permute(1, 2, 3, 0, 4)
        flat_states = chain(
            added.reshape(batch, chunks - 1, 2, channels * n),
            across,
            initial.reshape(batch, 2, channels * n),
            chain_engine(u),
        )
        before = torch.cat([before, flat_states.view(batch, chunks - 1, 2, channels, n)], 1)
    states = before.permute(3, 0, 1, 2, 4).reshape(channels, batch * chunks, 2 * n)
    y = y + (states @ observe[:, 1:].transpose(1, 2)).view(channels, batch, chunks, T)
    y = y.permute(1, 2, 3, 0).reshape(batch, chunks * T, channels)[:, :length]

    rest = T - missing  # steps of the last chunk
    last = inputs.view(channels, batch, chunks, T)[:, :, -1, :rest] @ reach[:, T - rest :]
    entered = last.view(channels, batch, 2, n).permute(1, 2, 0, 3)
    lam_re, lam_im, re, im = power_re[:, rest], power_im[:, rest], before[:, -1, 0], before[:, -1, 1]
    return y, entered + torch.stack([lam_re * re - lam_im * im, lam_re * im + lam_im * re], 1)


def _chunk_length(length: int, n: int) -> int:
    """The T that balances the Toeplitz product (2 T operations per step) against the chain and the memory traffic of
    the states (about 100 n / T)."""
    return min(length, max(8, min(128, 2 ** round(math.log2(math.sqrt(50 * n))))))
