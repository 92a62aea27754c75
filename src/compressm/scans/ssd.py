"""The scan with one decay per head and a matrix-valued state: Mamba-2 (SSD), RetNet, linear attention.

    S_t = exp(log_decay_t) S_{t-1} + delta_t x_t B_t^T,   y_t = S_t C_t + D x_t

with ``S`` (p, n) per head (Dao, Gu 2024, section 6).

Both engines for training are made of matrix products. Inside a chunk of Q steps the output is ``(C B^T * decays) x``, a
masked Q x Q matrix per head; between chunks only the state goes on. ``native`` runs chunk by chunk on tiles in the
processor's caches, forward and backward, and keeps one state per chunk; ``chunked`` takes one pass through memory for
each operation, on every device.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from compressm.scans import engines, native
from compressm.scans.frame import (
    check_engine,
    check_shapes,
    empty,
    empty_scan,
    in_form,
    restarted,
    without_autocast,
)
from compressm.scans.graph import exporting
from compressm.scans.ssd_chunked import chunked, with_factors
from compressm.scans.ssd_native import native_scan
from compressm.scans.transforms import transformed

Engine = Literal["auto", "native", "chunked", "loop", "graph", "fla", "triton"]


@overload
def ssd_scan(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    return_state: Literal[False] = False, engine: Engine = "auto", *,
    delta: Tensor | None = None, D: Tensor | None = None, starts: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def ssd_scan(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    *, return_state: Literal[True], engine: Engine = "auto",
    delta: Tensor | None = None, D: Tensor | None = None, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@without_autocast
def ssd_scan(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    engine: Engine = "auto",
    *,
    delta: Tensor | None = None,
    D: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of sequences; differentiable in every tensor argument.

    Args:
        x: input (values), shape ``(batch, length, heads, p)``.
        log_decay: logarithm of the decay, at most 0, shape ``(batch, length, heads)``. Mamba-2: ``delta A``.
        B, C: input and output vectors (keys and queries), shape ``(batch, length, groups, n)``; ``groups`` divides
            ``heads``, and head ``h`` uses group ``h // (heads // groups)``.
        initial_state: shape ``(batch, heads, p, n)``; zero by default.
        return_state: also return the state after the last step.
        engine: ``"native"`` (compiled, CPU); ``"chunked"`` (matrix products of PyTorch, anywhere); ``"loop"``, the
            definition, for reference; ``"graph"`` (one loop node); or a CUDA kernel of `compressm.scans.engines`.
            ``"auto"`` is ``"graph"`` while `torch.export` traces, and otherwise the first available one.
        delta: factors of the inputs (step sizes), shape ``(batch, length, heads)``; one by default.
        D: weights of the inputs in the outputs, shape ``(heads,)``; zero by default.
        starts: True where a sequence begins in a row that holds several, bool, shape ``(batch, length)``. Before such a
            step the state is zero, the initial one included.

    Returns:
        ``y``, shape and dtype of ``x``; with ``return_state`` also the last state, shape ``(batch, heads, p, n)``.
        Half precision is widened to float32 inside.

    Raises:
        ValueError: shapes that do not fit together, or an unknown engine, or one that is not installed.
    """
    _check(x, log_decay, B, C, initial_state, delta, D)
    check_engine(engine, "auto", "native", "chunked", "loop", "graph", *engines.NAMES["ssd"])
    dtype = torch.promote_types(x.dtype, torch.float32)
    log_decay = restarted(log_decay, starts)
    start = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if initial_state is None else initial_state
    if empty(x):
        y, state = empty_scan(tuple(x.shape), start.to(dtype), x, log_decay, B, C, delta, D)
        return (y, state) if return_state else y
    if engine == "auto" and not exporting() and native.usable(x, log_decay, B, C, initial_state, delta, D, scan="ssd"):
        engine = "native"
    kernel = engines.cuda_kernel("ssd", engine, x, B.shape[-1], initial_state is not None, return_state)
    if kernel is not None:
        y, state = with_factors(kernel, x, log_decay, B, C, delta, D, start)
        return (y, state) if return_state else y
    if engine == "native" and not transformed():
        y, state = native_scan(x, log_decay, B, C, delta, D, initial_state)
    else:
        form = "chunked" if engine == "native" else engine
        composed = lambda *tensors: in_form(form, chunked, ssd_step, tensors[-1], *tensors[:-1])  # noqa: E731
        y, state = with_factors(composed, *native.widened(x, log_decay, B, C, delta, D, start))
    return (y.to(x.dtype), state) if return_state else y.to(x.dtype)


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


def _check(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    delta: Tensor | None,
    D: Tensor | None,
) -> None:
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(
            "x must be (batch, length, heads, p) and B (batch, length, groups, n); "
            f"got {tuple(x.shape)} and {tuple(B.shape)}"
        )
    (batch, length, heads, p), (groups, n) = x.shape, B.shape[2:]
    if heads % groups:
        raise ValueError(f"the groups of B must divide the heads of x; got {groups} groups and {heads} heads")
    check_shapes(
        {"x": x, "B": B},
        {
            "log_decay": (log_decay, (batch, length, heads)),
            "B": (B, (batch, length, groups, n)),
            "C": (C, (batch, length, groups, n)),
            "initial_state": (initial_state, (batch, heads, p, n)),
            "delta": (delta, (batch, length, heads)),
            "D": (D, (heads,)),
        },
    )
