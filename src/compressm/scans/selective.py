"""The selective scan of Mamba (S6): a diagonal recurrence whose step, input and output vectors vary in time.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,   y_t = C_t . h_t

per channel, with ``A`` (d, n) negative and ``B_t``, ``C_t`` (n) shared by all channels (Gu, Dao 2023, eq. 2 and
algorithm 2). The operations around it (``D u``, gate, softplus of delta) belong to the layer.

Only the reference engine stores the states of all steps (batch x length x d x n). The others store the state once per
chunk of steps, and their backward pass computes every chunk again from there.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from compressm.scans import engines, native
from compressm.scans.frame import check_engine, check_shapes, check_starts, empty, empty_scan, loop, without_autocast
from compressm.scans.graph import exporting, graph_scan
from compressm.scans.selective_step import selective_step
from compressm.scans.transforms import gradients, transformed, twice

Engine = Literal["auto", "native", "mamba_ssm", "triton", "torch", "loop", "graph"]


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    return_state: Literal[False] = False, engine: Engine = "auto", *, starts: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    *, return_state: Literal[True], engine: Engine = "auto", starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@without_autocast
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
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
        u: input, shape ``(batch, length, d)``; float32, float64 or half precision, for which states are float32.
        delta: step sizes, non-negative, shape ``(batch, length, d)``.
        A: decay rates, negative, shape ``(d, n)``.
        B, C: input and output vectors, shape ``(batch, length, n)``.
        initial_state: ``h_{-1}``, shape ``(batch, d, n)``; zero by default.
        return_state: also return the state after the last step.
        engine: ``"native"`` (compiled, CPU), ``"mamba_ssm"`` or ``"triton"`` (CUDA, see `compressm.scans.engines`),
            ``"torch"`` (plain PyTorch, anywhere), ``"loop"``
            (the definition, for reference) or ``"graph"`` (one loop node). ``"auto"`` is ``"graph"`` while
            `torch.export` traces, and otherwise the first available one.
        starts: True where a sequence begins in a row that holds several, bool, shape ``(batch, length)``. Before such a
            step the state is zero, the initial one included.

    Returns:
        ``y``, shape and dtype of ``u``; with ``return_state`` also ``h`` after the last step, shape ``(batch, d, n)``.

    Raises:
        ValueError: shapes that do not fit together, or an unknown engine.
    """
    check_engine(engine, "auto", "native", "torch", "loop", "graph", *engines.NAMES["selective"])
    _check(u, delta, A, B, C, initial_state)
    check_starts(starts, u)
    tensors = (u, delta, A, B, C, initial_state)
    if engine == "auto" and exporting():
        engine = "graph"
    elif transformed():
        engine = "loop"
    if engine == "auto":
        engine = "native" if native.usable(*tensors) else engine
    dtype, precision = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32), u.dtype
    if starts is not None:
        u, delta = _restarted(u.to(dtype), delta.to(dtype), starts)
    start = u.new_zeros(u.shape[0], *A.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    args = u, delta, A.to(dtype), B, C, start
    if empty(u):
        y, state = empty_scan(tuple(u.shape), start, u, delta, A, B, C)
        return (y, state) if return_state else y
    kernel = engines.cuda_kernel("selective", engine, u, A.shape[1], initial_state is not None, return_state)
    if kernel is not None:
        # Tensors are not widened here: the kernels widen half precision in registers, and so read half the memory.
        y, state = kernel(u, delta, A, B, C, start)
    elif engine == "native":
        y, state = _native(*args)
    else:
        form = {"auto": _chunks, "torch": _chunks, "loop": _loop}.get(engine, _graph)
        y, state = form(*(tensor.to(dtype) for tensor in args))
    return (y.to(precision), state) if return_state else y.to(precision)


def _restarted(u: Tensor, delta: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and step sizes of packed sequences: where one begins, the step is so long that nothing is left of the
    state of the one before, and the input so much smaller that ``delta u`` stays what it is."""
    first, long = starts[..., None], 2.0**40  # a power of two, so that no digit is lost
    return torch.where(first, delta * u / long, u), delta.masked_fill(first, long)


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None) -> None:
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f"u must be (batch, length, d) and A (d, n); got {tuple(u.shape)} and {tuple(A.shape)}")
    (batch, length, d), n = u.shape, A.shape[1]
    check_shapes(
        {"u": u, "A": A},
        {
            "delta": (delta, (batch, length, d)),
            "A": (A, (d, n)),
            "B": (B, (batch, length, n)),
            "C": (C, (batch, length, n)),
            "initial_state": (initial_state, (batch, d, n)),
        },
    )


def _loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return loop(lambda h, u, delta, B, C: selective_step(h, u, delta, A, B, C), state, u, delta, B, C)


def _chunks(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The loop in chunks of about sqrt(length) steps. Only the states between chunks are stored."""
    steps = math.isqrt(u.shape[1] - 1) + 1
    outputs = []
    for at in range(0, u.shape[1], steps):
        now = slice(at, at + steps)
        y, state = checkpoint(
            _loop,
            u[:, now],
            delta[:, now],
            A,
            B[:, now],
            C[:, now],
            state,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _graph(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return graph_scan(lambda h, u, delta, B, C: selective_step(h, u, delta, A, B, C), state, u, delta, B, C)


def _native(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Prepare the kernels' arguments: channels last, padded to whole vectors. A and the state are wide."""
    d = u.shape[-1]
    missing = -d % (native.vector_bytes() // A.element_size())
    states = state.transpose(1, 2)
    if missing:
        u, delta, states = (F.pad(tensor, (0, missing)) for tensor in (u, delta, states))
    rates = F.pad(A, (0, 0, 0, missing)).T
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (u, delta, A, B, C, state))
    y, after, _ = _native_forward(*(t.contiguous() for t in (u, delta, rates, B, C, states)), keep)
    return y[..., :d], after[..., :d].transpose(1, 2)


@torch.library.custom_op("compressm::selective_scan", mutates_args=(), device_types="cpu")
def _native_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, after, checkpoints = _results(u, A, state, keep)
    _, *given, start = native.widened(A, *_with_rates(u, delta, A, B, C), state)
    native.call("selective_forward", y, *u.shape, len(A), *given, start, y, checkpoints if keep else None, after)
    return y.to(u.dtype), after, checkpoints


def _with_rates(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    """The kernels' arguments: decay rates to the base 2."""
    return u, delta, A * math.log2(math.e), B, C


def _results(u: Tensor, A: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for outputs, the last state, and the states that the backward pass needs, in the dtype of A."""
    (batch, length, d), n = u.shape, A.shape[0]
    checkpoints = A.new_empty((batch, -(-length // _chunk()), n, d) if keep else (0,))
    return A.new_empty(u.shape), torch.empty_like(state), checkpoints


@_native_forward.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, keep: bool) -> Any:
    y, after, checkpoints = _results(u, A, state, keep)
    return y.to(u.dtype), after, checkpoints


@torch.library.custom_op("compressm::selective_scan_backward", mutates_args=(), device_types="cpu")
def _native_backward(
    grad_y: Tensor, grad_state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, checkpoints: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, length, d), n = u.shape, A.shape[0]
    # Enough groups of channels for all threads. Each group has its own sums for the gradients of B and C.
    groups = max(1, min(d * A.element_size() // native.vector_bytes(), -(-torch.get_num_threads() // batch)))
    grad_u, grad_delta = A.new_empty(u.shape), A.new_empty(u.shape)
    grad_A = A.new_zeros(batch, n, d)
    grad_B, grad_C = A.new_empty(groups, *B.shape), A.new_empty(groups, *C.shape)
    carry = grad_state.clone()
    _, *given, incoming = native.widened(A, *_with_rates(u, delta, A, B, C), grad_y)
    native.call(
        "selective_backward", A, batch, length, d, n, *given, checkpoints, incoming, grad_u, grad_delta, grad_A,
        grad_B, grad_C, carry, groups,
    )  # fmt: skip
    return grad_u, grad_delta, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), carry


@_native_backward.register_fake
def _(
    grad_y: Tensor, grad_state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, checkpoints: Tensor
) -> Any:
    return tuple(torch.empty_like(tensor, dtype=A.dtype) for tensor in (u, delta, A, B, C, grad_state))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], output[2])
    ctx.set_materialize_grads(True)


def _differentiate(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, state, checkpoints = ctx.saved_tensors
    if twice():
        return *gradients(_composed, (*inputs, state), (grad_y, grad_state)), None
    return *_native_backward(grad_y.contiguous(), grad_state.contiguous(), *inputs, checkpoints), None


def _composed(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    _, *given, start = native.widened(A, u, delta, A.T, B, C, state.transpose(1, 2))
    y, after = _loop(*given, state=start)
    return y.to(u.dtype), after.transpose(1, 2)


_native_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _chunk() -> int:
    """Steps between two kept states: the constant ``chunk`` of selective.h."""
    return 32
