"""The scan with a decay for every key dimension and a matrix-valued state: gated linear attention.

    S_t = S_{t-1} diag(exp(log_decay_t)) + x_t B_t^T,   y_t = S_t C_t

with ``S`` (p, n) per head (Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, 2024).

The ``chunked`` engine is made of matrix products. Inside a chunk the decay from step j to step i is ``exp(e_i - e_j)``
per dimension, with ``e`` the running sum of the logarithms. It is a product of one factor for the query and one for the
key. Both are taken relative to half of the chunk's decay, so they stay in range as long as the decay over a chunk is
above exp(-60). Chunks are halved until this holds.

The ``native`` engine works in chunks too, in the processor's cache, forward and backward. It carries every key's decay
from step to step, so that no decay is too strong. For the backward pass it keeps the state once every 64 steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

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
from compressm.scans.ssd_chunked import by_chunk, chain_of_states
from compressm.scans.transforms import gradients, transformed, twice

Engine = Literal["auto", "native", "chunked", "loop", "graph", "fla"]

LONGEST_CHUNK = 64
# exp(-100) is negligible beside anything that is written at the same step, even in double precision.
STRONGEST = -100.0
# Exponents of up to 30 lose a digit and a half in float32, of up to 60 two.
RANGE = 60.0


@overload
def gla_scan(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    return_state: Literal[False] = False, engine: Engine = "auto", *, starts: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def gla_scan(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    *, return_state: Literal[True], engine: Engine = "auto", starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@without_autocast
def gla_scan(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    engine: Engine = "auto",
    *,
    starts: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of sequences; differentiable in every tensor argument.

    Args:
        x: input (values), shape ``(batch, length, heads, p)``.
        log_decay: logarithm of the decay, at most 0, shape ``(batch, length, heads, n)``.
        B, C: input and output vectors (keys and queries), shape ``(batch, length, heads, n)``.
        initial_state: shape ``(batch, heads, p, n)``; zero by default.
        return_state: also return the state after the last step.
        engine: ``"native"`` (compiled, CPU); ``"chunked"`` (matrix products of PyTorch, anywhere); ``"loop"``, the
            definition, for reference; ``"graph"`` (one loop node); or a CUDA kernel of `compressm.scans.engines`.
            ``"auto"`` is ``"graph"`` while `torch.export` traces, and otherwise the first available one.
        starts: True where a sequence begins in a row that holds several, bool, shape ``(batch, length)``. Before such a
            step the state is zero, the initial one included.

    Returns:
        ``y``, shape and dtype of ``x``; with ``return_state`` also the last state, shape ``(batch, heads, p, n)``.
        Half precision is widened to float32 inside.

    Raises:
        ValueError: shapes that do not fit together, or an unknown engine, or one that is not installed.
    """
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(
            "x must be (batch, length, heads, p) and B (batch, length, heads, n); "
            f"got {tuple(x.shape)} and {tuple(B.shape)}"
        )
    (batch, length, heads, p), n = x.shape, B.shape[3]
    vectors = (batch, length, heads, n)
    check_shapes(
        {"x": x, "B": B},
        {
            "log_decay": (log_decay, vectors),
            "B": (B, vectors),
            "C": (C, vectors),
            "initial_state": (initial_state, (batch, heads, p, n)),
        },
    )
    check_engine(engine, "auto", "native", "chunked", "loop", "graph", *engines.NAMES["gla"])
    dtype = torch.promote_types(x.dtype, torch.float32)
    log_decay = restarted(log_decay, starts)
    state = x.new_zeros(batch, heads, p, n) if initial_state is None else initial_state
    if empty(x):
        y, state = empty_scan(tuple(x.shape), state.to(dtype), x, log_decay, B, C)
        return (y, state) if return_state else y
    kernel = engines.cuda_kernel("gla", engine, x, n, initial_state is not None, return_state)
    if kernel is not None:
        y, state = kernel(x, log_decay, B, C, state)
        return (y, state) if return_state else y
    if engine == "auto" and not exporting() and native.usable(x, log_decay, B, C, state, scan="gla"):
        engine = "native"
    if engine == "native" and not transformed():
        y, state = _native(x, log_decay, B, C, state)
    else:
        y, state = _composed(engine, x, log_decay, B, C, state)
    return (y.to(x.dtype), state) if return_state else y.to(x.dtype)


def gla_step(state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, for generation and control.

    Args:
        state: shape ``(batch, heads, p, n)``.
        x: shape ``(batch, heads, p)``.
        log_decay, B, C: shape ``(batch, heads, n)``.

    Returns:
        ``y`` of shape ``(batch, heads, p)`` and the next state.
    """
    state = torch.exp(log_decay)[..., None, :] * state + x[..., None] * B[..., None, :]
    return (state * C[..., None, :]).sum(-1).to(x.dtype), state


def _composed(engine: str, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """An engine made of PyTorch's own operations; outputs in the dtype of ``x``."""
    if engine != "graph" and transformed():
        engine = "loop"  # the chunk length depends on the data, which vmap does not allow
    *sequences, start = native.widened(x, log_decay, B, C, state)
    y, last = in_form(engine, _chunked, gla_step, start, *sequences)
    return y.to(x.dtype), last


def _chunked(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, p = x.shape
    # Where all dimensions forget the state, a new part begins. Parts are kept apart by masks, so that packed sequences
    # do not shorten the chunks.
    forgotten = log_decay.amax(-1, keepdim=True) <= STRONGEST
    # The decays are differences of long running sums, which would be inaccurate in float32 if the decay is strong.
    log_decay, dtype = log_decay.double().clamp_min(STRONGEST).masked_fill(forgotten, 0.0), x.dtype
    Q = min(length, LONGEST_CHUNK)
    while True:
        elapsed = by_chunk(log_decay, Q).cumsum(-2)  # from the start of the chunk up to and including each step
        if Q == 1 or float(elapsed[..., -1, :].detach().amin()) > -RANGE:
            break
        Q = -(-Q // 2)
    values, keys, queries = (by_chunk(tensor, Q) for tensor in (x, B, C))
    centred = (elapsed - elapsed[..., -1:, :].detach() / 2).to(dtype)
    part = by_chunk(forgotten.int(), Q).cumsum(-2)  # (batch, chunks, heads, Q, 1); 0 goes on from the chunk before
    since_start = elapsed.to(dtype).exp().masked_fill(part > 0, 0.0)
    to_end = (centred[..., -1:, :] - centred).exp().masked_fill(part < part[..., -1:, :], 0.0)

    # Inside a chunk: step i reads the value written at step j <= i, decayed over j+1..i.
    later = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    scores = (queries * centred.exp()) @ (keys * (-centred).exp()).transpose(-1, -2)
    y = scores.masked_fill(later | (part != part.transpose(-1, -2)), 0.0) @ values

    # Between chunks: the state that each chunk adds, the chain of states, and the output of the state before a chunk.
    added = values.transpose(-1, -2) @ (keys * to_end)
    states = chain_of_states(added, since_start[..., -1:, :], initial)
    before = torch.cat([initial[:, None], states[:, :-1]], 1)
    y = y + (queries * since_start) @ before.transpose(-1, -2)
    return y.transpose(2, 3).reshape(batch, -1, heads, p)[:, :length], states[:, -1]


def _native(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    y, last, _ = _native_forward(*(tensor.contiguous() for tensor in tensors), keep)
    return y, last


@torch.library.custom_op("compressm::gla_scan", mutates_args=(), device_types="cpu")
def _native_forward(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    given = native.widened(x, log_decay, B, C, state)
    y, last, states = _results(given[0], given[-1], keep)
    native.call("gla_forward", y, *x.shape, B.shape[3], *given, y, last, states if keep else None)
    return y.to(x.dtype), last, states


@_native_forward.register_fake
def _(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor, keep: bool) -> Any:
    y, last, states = _results(*native.widened(x, state), keep=keep)
    return y.to(x.dtype), last, states


def _results(x: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for outputs, the last state, and the states that the backward pass needs."""
    (batch, length, heads, p), n = x.shape, state.shape[3]
    states = x.new_empty((batch, heads, native.kept_states(length), n, p) if keep else (0,))
    return torch.empty_like(x), torch.empty_like(state), states


@torch.library.custom_op("compressm::gla_scan_backward", mutates_args=(), device_types="cpu")
def _native_backward(
    grad_y: Tensor, grad_state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *given, incoming = native.widened(x, log_decay, B, C, grad_y)
    grad_x, grad_log_decay, grad_B, grad_C = (torch.empty_like(tensor) for tensor in given)
    grads, carry = (grad_x, grad_log_decay, grad_B, grad_C), grad_state.clone()
    native.call("gla_backward", grad_x, *x.shape, B.shape[3], *given, states, incoming, *grads, carry)
    return *grads, carry


@_native_backward.register_fake
def _(grad_y: Tensor, grad_state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, states: Tensor) -> Any:
    return tuple(torch.empty_like(tensor) for tensor in native.widened(x, log_decay, B, C, grad_state))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.set_materialize_grads(True)


def _differentiate(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, state, states = ctx.saved_tensors
    if twice():
        return *gradients(partial(_composed, "chunked"), (*inputs, state), (grad_y, grad_state)), None
    return *_native_backward(grad_y.contiguous(), grad_state.contiguous(), *inputs, states), None


_native_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
