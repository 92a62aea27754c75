"""The delta rule: a matrix-valued state that removes the value stored under a key before it writes a new one.

    S_t = exp(log_decay_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,   y_t = S_t q_t

with ``S`` (p, n) per head: DeltaNet (Schlag, Irie, Schmidhuber 2021) without decay, Gated DeltaNet (Yang, Kautz,
Hatamizadeh 2025) with one.

The ``chunked`` engine is made of matrix products and a triangular solve (Yang et al., Parallelizing Linear Transformers
with the Delta Rule, 2024). With the written values ``u_i = beta_i (v_i - exp(log_decay_i) S_{i-1} k_i)`` the recurrence
is ``S_i = exp(log_decay_i) S_{i-1} + u_i k_i^T``. Let S be the state at the start of a chunk, and ``g_i`` the decay
since then. The ``u`` of the chunk solve

    u_i + beta_i sum_{j<i} (g_i / g_j) (k_i . k_j) u_j = beta_i (v_i - g_i S k_i)

The ``native`` engine computes the same chunk by chunk in the processor's cache, forward and backward. For the backward
pass it keeps ``u_i / beta_i``, as large as ``v``, and the state once every 64 steps.
"""

from __future__ import annotations

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
from compressm.scans.ssd_chunked import by_chunk, elapsed_in_chunk
from compressm.scans.transforms import gradients, transformed, twice

Engine = Literal["auto", "native", "chunked", "loop", "graph", "fla"]

CHUNK = 64


@overload
def delta_scan(
    v: Tensor, log_decay: Tensor, beta: Tensor, k: Tensor, q: Tensor, initial_state: Tensor | None = None,
    return_state: Literal[False] = False, engine: Engine = "auto", *, starts: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def delta_scan(
    v: Tensor, log_decay: Tensor, beta: Tensor, k: Tensor, q: Tensor, initial_state: Tensor | None = None,
    *, return_state: Literal[True], engine: Engine = "auto", starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@without_autocast
def delta_scan(
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    k: Tensor,
    q: Tensor,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    engine: Engine = "auto",
    *,
    starts: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of sequences; differentiable in every tensor argument.

    Args:
        v: values, shape ``(batch, length, heads, p)``.
        log_decay: logarithm of the decay, at most 0, shape ``(batch, length, heads)``.
        beta: share of the value stored under a key that is replaced, in [0, 1], shape ``(batch, length, heads)``.
        k, q: keys, of norm at most 1, and queries, shape ``(batch, length, heads, n)``. The recurrence would diverge
            if ``beta |k|^2 > 2``.
        initial_state: shape ``(batch, heads, p, n)``; zero by default.
        return_state: also return the state after the last step.
        engine: ``"native"`` (compiled, CPU); ``"chunked"`` (matrix products of PyTorch, anywhere); ``"loop"``, the
            definition, for reference; ``"graph"`` (one loop node); or a CUDA kernel of `compressm.scans.engines`.
            ``"auto"`` is ``"graph"`` while `torch.export` traces, and otherwise the first available one.
        starts: True where a sequence begins in a row that holds several, bool, shape ``(batch, length)``. Before such a
            step the state is zero, the initial one included.

    Returns:
        ``y``, shape and dtype of ``v``; with ``return_state`` also the last state, shape ``(batch, heads, p, n)``.
        Half precision is widened to float32 inside.

    Raises:
        ValueError: shapes that do not fit together, or an unknown engine, or one that is not installed.
    """
    if v.ndim != 4 or k.ndim != 4:
        raise ValueError(
            "v must be (batch, length, heads, p) and k (batch, length, heads, n); "
            f"got {tuple(v.shape)} and {tuple(k.shape)}"
        )
    (batch, length, heads, p), n = v.shape, k.shape[3]
    numbers, vectors = (batch, length, heads), (batch, length, heads, n)
    check_shapes(
        {"v": v, "k": k},
        {
            "log_decay": (log_decay, numbers),
            "beta": (beta, numbers),
            "k": (k, vectors),
            "q": (q, vectors),
            "initial_state": (initial_state, (batch, heads, p, n)),
        },
    )
    check_engine(engine, "auto", "native", "chunked", "loop", "graph", *engines.NAMES["delta"])
    dtype = torch.promote_types(v.dtype, torch.float32)
    log_decay = restarted(log_decay, starts)
    state = v.new_zeros(batch, heads, p, n) if initial_state is None else initial_state
    if empty(v):
        y, state = empty_scan(tuple(v.shape), state.to(dtype), v, log_decay, beta, k, q)
        return (y, state) if return_state else y
    kernel = engines.cuda_kernel("delta", engine, v, n, initial_state is not None, return_state)
    if kernel is not None:
        y, state = kernel(v, log_decay, beta, k, q, state)
        return (y, state) if return_state else y
    if engine == "auto" and not exporting() and native.usable(v, log_decay, beta, k, q, state, scan="delta"):
        engine = "native"
    if engine == "native" and transformed():
        engine = "chunked"
    if engine == "native":
        y, state = _native(v, log_decay, beta, k, q, state)
    else:
        *sequences, start = native.widened(v, log_decay, beta, k, q, state)
        y, state = in_form(engine, _chunked, delta_step, start, *sequences)
    return (y.to(v.dtype), state) if return_state else y.to(v.dtype)


def delta_step(
    state: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, k: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, for generation and control.

    Args:
        state: shape ``(batch, heads, p, n)``.
        v: shape ``(batch, heads, p)``.
        log_decay, beta: shape ``(batch, heads)``.
        k, q: shape ``(batch, heads, n)``.

    Returns:
        ``y`` of shape ``(batch, heads, p)`` and the next state.
    """
    state = torch.exp(log_decay)[..., None, None] * state
    stored = (state * k[..., None, :]).sum(-1)
    state = state + (beta[..., None] * (v - stored))[..., None] * k[..., None, :]
    return (state * q[..., None, :]).sum(-1).to(v.dtype), state


def _chunked(v: Tensor, log_decay: Tensor, beta: Tensor, k: Tensor, q: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    (batch, length, heads, p), n = v.shape, k.shape[3]
    Q = min(length, CHUNK)
    values, keys, queries = (by_chunk(tensor, Q) for tensor in (v, k, q))
    share = by_chunk(beta[..., None], Q)  # (batch, chunks, heads, Q, 1); zero after the end
    elapsed = elapsed_in_chunk(log_decay, Q)
    ones = torch.ones(Q, Q, dtype=torch.bool, device=v.device)
    between = (elapsed[..., :, None] - elapsed[..., None, :]).to(v.dtype)
    decays = between.masked_fill(ones.triu(1), -torch.inf).exp()
    since_start, to_end = (e.to(v.dtype).exp()[..., None] for e in (elapsed, elapsed[..., -1:] - elapsed))

    among = (share * (keys @ keys.transpose(-1, -2)) * decays).masked_fill(ones.triu(), 0.0)
    # u = alone - taken S^T: the values written from a zero state, and a part linear in the state S at the start.
    right = torch.cat([share * values, share * since_start * keys], -1)
    alone, taken = torch.linalg.solve_triangular(
        among + torch.eye(Q, dtype=v.dtype, device=v.device), right, upper=False, unitriangular=True
    ).split([p, n], -1)
    mixing = (queries @ keys.transpose(-1, -2)) * decays
    kept = since_start[..., -1:, :]
    reading, storing, outputs = queries * since_start, keys * to_end, list[Tensor]()
    for c in range(values.shape[1]):
        written = alone[:, c] - taken[:, c] @ state.transpose(-1, -2)
        outputs.append(reading[:, c] @ state.transpose(-1, -2) + mixing[:, c] @ written)
        state = kept[:, c] * state + written.transpose(-1, -2) @ storing[:, c]
    y = torch.stack(outputs, 1)
    return y.transpose(2, 3).reshape(batch, -1, heads, p)[:, :length], state


def _native(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    y, last, _, _ = _native_forward(*(tensor.contiguous() for tensor in tensors), keep)
    return y, last


@torch.library.custom_op("compressm::delta_scan", mutates_args=(), device_types="cpu")
def _native_forward(
    v: Tensor, log_decay: Tensor, beta: Tensor, k: Tensor, q: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = native.widened(v, log_decay, beta, k, q, state)
    y, last, states, written = _results(given[0], given[-1], keep)
    kept = (states, written) if keep else (None, None)
    native.call("delta_forward", y, *v.shape, k.shape[3], *given, y, last, *kept)
    return y.to(v.dtype), last, states, written


@_native_forward.register_fake
def _(v: Tensor, log_decay: Tensor, beta: Tensor, k: Tensor, q: Tensor, state: Tensor, keep: bool) -> Any:
    y, *others = _results(*native.widened(v, state), keep=keep)
    return y.to(v.dtype), *others


def _results(v: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for outputs, the last state, and what the backward pass needs: states and written values."""
    (batch, length, heads, p), n = v.shape, state.shape[3]
    states = v.new_empty((batch, heads, native.kept_states(length), n, p) if keep else (0,))
    return torch.empty_like(v), torch.empty_like(state), states, v.new_empty(v.shape if keep else (0,))


@torch.library.custom_op("compressm::delta_scan_backward", mutates_args=(), device_types="cpu")
def _native_backward(
    grad_y: Tensor, grad_state: Tensor, log_decay: Tensor, beta: Tensor, k: Tensor, q: Tensor, states: Tensor,
    written: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _, *given, incoming = native.widened(written, log_decay, beta, k, q, grad_y)
    grad_v, grad_log_decay, grad_beta, grad_k, grad_q = (torch.empty_like(tensor) for tensor in (written, *given))
    grads, carry = (grad_v, grad_log_decay, grad_beta, grad_k, grad_q), grad_state.clone()
    sizes = (*written.shape, k.shape[3])
    native.call("delta_backward", written, *sizes, *given, states, written, incoming, *grads, carry)
    return *grads, carry


@_native_backward.register_fake
def _(
    grad_y: Tensor, grad_state: Tensor, log_decay: Tensor, beta: Tensor, k: Tensor, q: Tensor, states: Tensor,
    written: Tensor,
) -> Any:  # fmt: skip
    return tuple(torch.empty_like(tensor) for tensor in native.widened(written, log_decay, beta, k, q, grad_state))


def _composed(v: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    y, last = _chunked(*native.widened(v, *others))
    return y.to(v.dtype), last


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[2:])
    ctx.set_materialize_grads(True)


def _differentiate(ctx: Any, grad_y: Tensor, grad_state: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, states, written = ctx.saved_tensors
    if twice():
        return *gradients(_composed, inputs, (grad_y, grad_state)), None
    _v, *sequences, _state = inputs
    return *_native_backward(grad_y.contiguous(), grad_state.contiguous(), *sequences, states, written), None


_native_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
