"""The compiled engine of `ssd_scan`: its operators, their gradients, and the choice of the chunk length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressm.scans import native
from compressm.scans.ssd_chunked import chunked, with_factors
from compressm.scans.transforms import gradients, twice

# At least so many tasks, if there are as many heads: enough for a few threads, and the same for one and for two, whose
# sums then agree bit by bit.
_TASKS = 8


def native_scan(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, delta: Tensor | None, D: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` of floating tensors; outputs in the dtype of ``x``, and the last state."""
    inputs = (x, log_decay, B, C, delta, D, state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, after, _ = _forward(*inputs, keep)
    return y, after


@torch.library.custom_op("compressm::ssd_scan", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    delta: Tensor | None,
    D: Tensor | None,
    state: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    *given, initial = native.widened(x, log_decay, B, C, delta, D, state)
    y, after, checkpoints = _outputs(given[0], B, keep)
    initial = None if initial is None else initial.contiguous()
    kept = checkpoints if keep else None
    native.call("ssd_forward", given[0], *_arguments(*given), initial, y, kept, after)
    return y.to(x.dtype), after, checkpoints


def _outputs(x: Tensor, B: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, heads, p), n = x.shape, B.shape[3]
    chunks = -(-length // chunk_length(n))
    checkpoints = (batch, chunks, heads, n, p) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(batch, heads, p, n), x.new_empty(checkpoints)


@_forward.register_fake
def _(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, delta: Any, D: Any, state: Any, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, after, checkpoints = _outputs(*native.widened(x, B), keep=keep)
    return y.to(x.dtype), after, checkpoints


@torch.library.custom_op("compressm::ssd_scan_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    delta: Tensor | None,
    D: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, log_decay, B, C, delta, D, incoming, last = native.widened(x, log_decay, B, C, delta, D, grad_y, grad_state)
    parts = _parts(x, B)
    grads = _gradients(x, log_decay, B, delta, D)
    to_x, to_log_decay, _, _, to_delta, _, to_state = grads
    to_B, to_C = B.new_empty(parts, *B.shape), C.new_empty(parts, *C.shape)
    to_D = None if D is None else x.new_empty(x.shape[0], x.shape[2])
    native.call(
        "ssd_backward", x, *_arguments(x, log_decay, B, C, delta, D), checkpoints, incoming, last, to_x,
        to_log_decay, None if delta is None else to_delta, to_B, to_C, to_D, to_state,
    )  # fmt: skip
    sum_D = x.new_empty(0) if to_D is None else to_D.sum(0)
    return to_x, to_log_decay, _sum(to_B), _sum(to_C), to_delta, sum_D, to_state


def _gradients(
    x: Tensor, log_decay: Tensor, B: Tensor, delta: Tensor | None, D: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tensors for the gradients; empty for an argument that is absent."""
    (batch, _, heads, p), n = x.shape, B.shape[3]
    of_delta = (0,) if delta is None else log_decay.shape
    of_D = (0,) if D is None else (heads,)
    shapes = (x.shape, log_decay.shape, B.shape, B.shape, of_delta, of_D, (batch, heads, p, n))
    to_x, to_log_decay, to_B, to_C, to_delta, to_D, to_state = (x.new_empty(shape) for shape in shapes)
    return to_x, to_log_decay, to_B, to_C, to_delta, to_D, to_state


@_backward.register_fake
def _(
    grad_y: Tensor, grad_state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, delta: Any, D: Any,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(*native.widened(x, log_decay, B, delta, D))


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _arguments(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, delta: Tensor | None, D: Tensor | None
) -> list[Tensor | int | None]:
    """The kernels' common arguments: sizes, views with their strides, and contiguous tensors."""
    (batch, length, heads, p), (groups, n) = x.shape, B.shape[2:]
    arguments: list[Tensor | int | None] = [batch, length, heads, groups, p, n, chunk_length(n), _parts(x, B)]
    for tensor in (x, B, C):
        view = _with_whole_steps(tensor)
        arguments += [view, view.stride(0), view.stride(1)]
    return [*arguments, *(None if tensor is None else tensor.contiguous() for tensor in (log_decay, delta, D))]


def _with_whole_steps(tensor: Tensor) -> Tensor:
    """The tensor itself if all numbers of one step lie side by side, as in a part of a projection; otherwise a copy."""
    return tensor if tensor[:1, :1].is_contiguous() else tensor.contiguous()


def _parts(x: Tensor, B: Tensor) -> int:
    """Parts into which the heads of a group are divided, so that few sequences keep several threads busy. Each part has
    its own sums for the gradients of B and C."""
    batch, groups = B.shape[0], B.shape[2]
    wanted = -(-max(_TASKS, 2 * torch.get_num_threads()) // (batch * groups))
    return min(wanted, x.shape[2] // groups)


def chunk_length(n: int) -> int:
    """Steps of a chunk: where the triangles inside chunks and the traffic of the states between them take least time,
    as measured for p = 32 and 64."""
    return 32 if n < 48 else 64


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], output[2])


def _differentiate(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, checkpoints = ctx.saved_tensors
    if twice():
        return *gradients(_composed, inputs, (grad_y, grad_state)), None
    grads = _backward(grad_y.contiguous(), grad_state.contiguous(), *inputs[:6], checkpoints)
    present = (value if given is not None else None for given, value in zip(inputs, grads, strict=True))
    return *present, None


def _composed(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, delta: Tensor | None, D: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide_x, *others, start = native.widened(x, log_decay, B, C, delta, D, state)
    if start is None:
        start = wide_x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    y, after = with_factors(chunked, wide_x, *others, state=start)
    return y.to(x.dtype), after


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
