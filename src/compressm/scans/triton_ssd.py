# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Kernels are written in Triton's language, whose types a Python type checker does not understand.)
"""The scan with one decay per head (SSD) on CUDA devices, forward and backward, in Triton.

Time is divided into chunks of 64 steps, or 32 in float32, whose products need more registers. One kernel carries the
state from chunk to chunk and stores it before each of them; a program has a block of the state of one head. A second
one computes the outputs of all chunks at once: matrix products inside a chunk, masked by the decays, and the output of
the state before it. Backward the same two steps run in reverse: the first kernel carries the gradient of the state, and
two more compute the gradients of all chunks.

With ``e`` the running sum of the logarithms inside a chunk, decays are ``exp(e_i - e_j)``. The sums are made in float64
and stored as two float32 numbers, so that a strong decay at one step costs no accuracy at the next. Products have the
precision of float32 (three TF32 products) for float32 inputs, and of TF32, which holds half precision exactly, for half
precision; sums and states are float32.

Every head writes its own gradients of ``B`` and ``C``, which are added in a fixed order: results are the same in every
run. This takes ``heads / groups`` times the memory of ``B`` and ``C``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressm.scans.frame import loop
from compressm.scans.transforms import gradients, twice


def ssd_scan_triton(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """Run ``S_t = exp(log_decay_t) S_{t-1} + x_t B_t^T``, ``y_t = S_t C_t``; differentiable in every argument.

    Args:
        x: shape ``(batch, length, heads, p)``, with batch and length at least 1; float32, bfloat16 or float16.
        log_decay: at most 0, shape ``(batch, length, heads)``.
        B, C: shape ``(batch, length, groups, n)``, of the dtype of ``x``; ``groups`` divides ``heads``.
        initial_state: shape ``(batch, heads, p, n)``.

    Returns:
        ``y``, shape and dtype of ``x``, and the state after the last step, float32, shape ``(batch, heads, p, n)``.
    """
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return _SSD.apply(x, log_decay, B, C, initial_state)  # pyright: ignore[reportReturnType]  (apply is untyped)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        given = (x, log_decay, B, C, initial_state)
        x, B, C = (tensor.contiguous() for tensor in (x, B, C))
        high, low = _elapsed(log_decay, _blocks(x, B)["Q"])
        kept, last = _chain(x, B, high, low, initial_state, reverse=False)
        y = torch.empty_like(x)
        sizes, blocks = _sizes(x, B), _blocks(x, B)
        grid = triton.cdiv(x.shape[3], blocks["BP"]), kept.shape[2], x.shape[0] * x.shape[2]
        _outputs_kernel[grid](x, B, C, high, low, kept, y, *sizes, **blocks)
        ctx.save_for_backward(x, B, C, high, low, kept, *given)
        return y, last

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        x, B, C, high, low, kept, *given = ctx.saved_tensors
        if twice():
            return gradients(_composed, given, (grad_y, grad_last))  # pyright: ignore[reportReturnType]
        (batch, length, heads, _), (groups, n) = x.shape, B.shape[2:]
        grad_y = grad_y.contiguous()
        adjoint, grad_initial = _chain(grad_y, C, high, low, grad_last, reverse=True)
        grad_x = torch.empty_like(x)
        grad_B, grad_C = (x.new_empty(batch, length, heads, n, dtype=torch.float32) for _ in range(2))
        grad_elapsed, grad_total = torch.empty_like(high), high.new_empty(kept.shape[:3])
        tensors, sizes, blocks = (x, B, C, grad_y, high, low, kept, adjoint), _sizes(x, B), _blocks(x, B)
        grid = kept.shape[2], batch * heads
        _values_kernel[grid](*tensors, grad_x, grad_elapsed, grad_total, *sizes, **blocks)
        _keys_kernel[(triton.cdiv(n, blocks["BN"]), *grid)](*tensors, grad_B, grad_C, *sizes, **blocks)
        by_group = (tensor.unflatten(2, (groups, -1)).sum(3).to(B.dtype) for tensor in (grad_B, grad_C))
        # Every decay of a chunk is part of the sums at and after its step, and of the whole chunk's.
        later = grad_elapsed.unflatten(2, (kept.shape[2], -1)).double()
        to_decay = later.flip(-1).cumsum(-1).flip(-1) + grad_total[..., None]
        to_decay = to_decay.flatten(2)[..., :length].transpose(1, 2)
        return grad_x, to_decay.to(given[1].dtype), *by_group, grad_initial.to(given[4].dtype)


def _elapsed(log_decay: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The running sum inside each chunk as two float32 numbers, shape ``(batch, heads, chunks * chunk)``."""
    finite = log_decay.double().clamp_min(-800.0)  # where exp is zero: a decay of exactly zero has a finite sum
    rows = torch.nn.functional.pad(finite.transpose(1, 2), (0, -log_decay.shape[1] % chunk))
    sums = rows.unflatten(2, (-1, chunk)).cumsum(-1).flatten(2)
    high = sums.float()
    return high.contiguous(), (sums - high.double()).float().contiguous()


def _sizes(x: Tensor, B: Tensor) -> tuple[int, ...]:
    return x.shape[1], x.shape[2], B.shape[2], x.shape[3], B.shape[3]


def _blocks(x: Tensor, B: Tensor) -> dict[str, Any]:
    """Steps of a chunk, sides of the other blocks (16 or 32 values and states), and the precision of products. So
    hardly a thread needs more registers than there are (results/triton.json)."""
    p, n = (max(16, min(32, triton.next_power_of_2(size))) for size in (x.shape[3], B.shape[3]))
    chunk, precision = (32, "tf32x3") if x.dtype == torch.float32 else (64, "tf32")
    return {"Q": chunk, "BP": p, "BN": n, "PRECISION": precision, "num_warps": 8, "num_stages": 1}


def _chain(
    values: Tensor, keys: Tensor, high: Tensor, low: Tensor, start: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The states before all chunks and after the last; in reverse, their gradients after all and before the first."""
    (batch, _, heads, p), n = values.shape, keys.shape[3]
    end, blocks = high.new_empty(batch, heads, p, n), _blocks(values, keys)
    kept = high.new_empty(batch, heads, high.shape[2] // blocks["Q"], p, n)
    grid = triton.cdiv(p, blocks["BP"]), triton.cdiv(n, blocks["BN"]), batch * heads
    start = start.float().contiguous()
    _chain_kernel[grid](
        values, keys, high, low, start, kept, end, *_sizes(values, keys), REVERSE=reverse, **blocks
    )  # fmt: skip
    return kept, end


def _composed(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """`_SSD` composed of PyTorch operations."""
    repeats = x.shape[2] // B.shape[2]

    def step(state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        key, query = (v.repeat_interleave(repeats, 1)[:, :, None] for v in (B, C))
        state = log_decay.exp()[..., None, None] * state + x[..., None] * key
        return (state * query).sum(-1), state

    y, state = loop(step, initial_state, *(tensor.to(torch.float32) for tensor in (x, log_decay, B, C)))
    return y.to(x.dtype), state


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _block(pointer, lines, line_count, stride, columns, column_count):
    """Rows ``lines`` of a matrix, the columns ``columns`` of them; zero outside."""
    inside = (lines[:, None] < line_count) & (columns[None, :] < column_count)
    return tl.load(pointer + lines[:, None] * stride + columns[None, :], inside, other=0.0).to(tl.float32)


@triton.jit
def _places(c, row, length, heads, groups, p, n, Q: tl.constexpr):
    """Of chunk ``c`` of a head and sequence: its number among all chunks, how many steps are left from its start on,
    and where it begins in sequences of the groups' n entries and of the heads' p."""
    batch, head = row // heads, row % heads
    first = batch * length + c * Q
    narrow, wide = (first * groups + head // (heads // groups)) * n, (first * heads + head) * p
    return row * tl.cdiv(length, Q) + c, length - c * Q, narrow, wide


@triton.jit
def _chunk_decays(high, low, steps, Q: tl.constexpr):
    """Decays of a chunk from the running sums, high and low part: the masked matrix of those from step j to step
    i >= j; those since the start, and to the end; and that of the whole chunk."""
    e, f = tl.load(high + steps), tl.load(low + steps)
    total_e, total_f = tl.sum(tl.where(steps == Q - 1, e, 0.0)), tl.sum(tl.where(steps == Q - 1, f, 0.0))
    between = (e[:, None] - e[None, :]) + (f[:, None] - f[None, :])
    masked = tl.exp(tl.where(steps[:, None] >= steps[None, :], between, float("-inf")))
    return masked, tl.exp(e + f), tl.exp((total_e - e) + (total_f - f)), tl.exp(total_e + total_f)


@triton.jit(do_not_specialize=["length", "heads", "groups", "p", "n"])
def _chain_kernel(
    values, keys, high, low, start, kept, end, length, heads, groups, p, n, REVERSE: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry a block of the state: ``S = exp(e_Q) S + sum_j exp(e_Q - e_j) x_j B_j^T``, and in reverse its gradient:
    ``G = exp(e_Q) G + sum_i exp(e_i) grad_y_i C_i^T``. What it is before each of these goes to ``kept``."""
    row = tl.program_id(2).to(tl.int64)
    batch, head = row // heads, row % heads
    group = head // (heads // groups)
    steps = tl.arange(0, Q)
    lines, columns = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1) * BN + tl.arange(0, BN)
    here = (lines[:, None] < p) & (columns[None, :] < n)
    place = lines[:, None] * n + columns[None, :]
    chunks = tl.cdiv(length, Q)
    state = tl.load(start + row * p * n + place, here, other=0.0)
    for i in range(chunks):
        c = chunks - 1 - i if REVERSE else i
        tl.store(kept + (row * chunks + c) * p * n + place, state, here)
        first, left = batch * length + c * Q, length - c * Q
        e, f = tl.load(high + (row * chunks + c) * Q + steps), tl.load(low + (row * chunks + c) * Q + steps)
        total_e, total_f = tl.sum(tl.where(steps == Q - 1, e, 0.0)), tl.sum(tl.where(steps == Q - 1, f, 0.0))
        weight = tl.exp(e + f) if REVERSE else tl.exp((total_e - e) + (total_f - f))
        x = _block(values + (first * heads + head) * p, steps, left, heads * p, lines, p)
        b = _block(keys + (first * groups + group) * n, steps, left, groups * n, columns, n)
        added = _dot(tl.trans(x * weight[:, None]), b, PRECISION)
        state = tl.exp(total_e + total_f) * state + added
    tl.store(end + row * p * n + place, state, here)


@triton.jit(do_not_specialize=["length", "heads", "groups", "p", "n"])
def _outputs_kernel(
    x, B, C, high, low, kept, y, length, heads, groups, p, n,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk: ``y_i = sum_{j <= i} (C_i . B_j) exp(e_i - e_j) x_j + exp(e_i) S C_i``."""
    c, row, steps = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.arange(0, Q)
    lines = tl.program_id(0) * BP + tl.arange(0, BP)
    place_of_chunk, left, narrow, wide = _places(c, row, length, heads, groups, p, n, Q)
    decays, since_start, _, _ = _chunk_decays(high + place_of_chunk * Q, low + place_of_chunk * Q, steps, Q)
    values = _block(x + wide, steps, left, heads * p, lines, p)
    scores = tl.zeros([Q, Q], tl.float32)
    read = tl.zeros([Q, BP], tl.float32)
    for at in range(0, n, BN):
        columns = at + tl.arange(0, BN)
        queries = _block(C + narrow, steps, left, groups * n, columns, n)
        keys = _block(B + narrow, steps, left, groups * n, columns, n)
        state = _block(kept + place_of_chunk * p * n, lines, p, n, columns, n)
        scores += _dot(queries, tl.trans(keys), PRECISION)
        read += _dot(queries, tl.trans(state), PRECISION)
    output = _dot(scores * decays, values, PRECISION) + since_start[:, None] * read
    place = wide + steps[:, None] * (heads * p) + lines[None, :]
    tl.store(y + place, output.to(y.dtype.element_ty), (steps[:, None] < left) & (lines[None, :] < p))


@triton.jit(do_not_specialize=["length", "heads", "groups", "p", "n"])
def _values_kernel(
    x, B, C, grad_y, high, low, kept, adjoint, grad_x, grad_elapsed, grad_total, length, heads, groups, p, n,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x and of the running sums of one chunk. ``G`` is the gradient of the state after it, ``S`` the state
    before it."""
    c, row, steps = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, Q)
    place_of_chunk, left, narrow, wide = _places(c, row, length, heads, groups, p, n, Q)
    decays, since_start, to_end, total = _chunk_decays(high + place_of_chunk * Q, low + place_of_chunk * Q, steps, Q)
    before, after = kept + place_of_chunk * p * n, adjoint + place_of_chunk * p * n

    mixing, to_mixing = tl.zeros([Q, Q], tl.float32), tl.zeros([Q, Q], tl.float32)
    for at in range(0, n, BN):
        columns = at + tl.arange(0, BN)
        queries = _block(C + narrow, steps, left, groups * n, columns, n)
        mixing += _dot(queries, tl.trans(_block(B + narrow, steps, left, groups * n, columns, n)), PRECISION)
    mixing *= decays
    for at in range(0, p, BP):
        lines = at + tl.arange(0, BP)
        grads = _block(grad_y + wide, steps, left, heads * p, lines, p)
        to_mixing += _dot(grads, tl.trans(_block(x + wide, steps, left, heads * p, lines, p)), PRECISION)
    # The decay from a step to itself is always 1. Those products are left out; their rounding would drown the others.
    pairs = tl.where(steps[:, None] > steps[None, :], mixing * to_mixing, 0.0)
    to_elapsed, to_total = tl.sum(pairs, 1) - tl.sum(pairs, 0), 0.0

    for at in range(0, p, BP):
        lines = at + tl.arange(0, BP)
        written, read = tl.zeros([Q, BP], tl.float32), tl.zeros([Q, BP], tl.float32)  # G B_j and S C_i
        for inner in range(0, n, BN):
            columns = inner + tl.arange(0, BN)
            G = _block(after, lines, p, n, columns, n)
            S = _block(before, lines, p, n, columns, n)
            to_total += total * tl.sum(G * S)
            written += _dot(_block(B + narrow, steps, left, groups * n, columns, n), tl.trans(G), PRECISION)
            read += _dot(_block(C + narrow, steps, left, groups * n, columns, n), tl.trans(S), PRECISION)
        values = _block(x + wide, steps, left, heads * p, lines, p)
        grads = _block(grad_y + wide, steps, left, heads * p, lines, p)
        written *= to_end[:, None]
        by_state = tl.sum(values * written, 1)
        to_elapsed += since_start * tl.sum(grads * read, 1) - by_state
        to_total += tl.sum(by_state)
        result = _dot(tl.trans(mixing), grads, PRECISION) + written
        inside = (steps[:, None] < left) & (lines[None, :] < p)
        place = steps[:, None] * (heads * p) + lines[None, :]
        tl.store(grad_x + wide + place, result.to(grad_x.dtype.element_ty), inside)
    tl.store(grad_elapsed + place_of_chunk * Q + steps, to_elapsed)
    tl.store(grad_total + place_of_chunk, to_total)


@triton.jit(do_not_specialize=["length", "heads", "groups", "p", "n"])
def _keys_kernel(
    x, B, C, grad_y, high, low, kept, adjoint, grad_B, grad_C, length, heads, groups, p, n,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C of one chunk and head, for one block of their entries; names as in `_values_kernel`."""
    c, row, steps = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.arange(0, Q)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    place_of_chunk, left, narrow, wide = _places(c, row, length, heads, groups, p, n, Q)
    decays, since_start, to_end, _ = _chunk_decays(high + place_of_chunk * Q, low + place_of_chunk * Q, steps, Q)
    before, after = kept + place_of_chunk * p * n, adjoint + place_of_chunk * p * n

    to_scores = tl.zeros([Q, Q], tl.float32)
    to_keys, to_queries = tl.zeros([Q, BN], tl.float32), tl.zeros([Q, BN], tl.float32)
    for at in range(0, p, BP):
        lines = at + tl.arange(0, BP)
        values = _block(x + wide, steps, left, heads * p, lines, p)
        grads = _block(grad_y + wide, steps, left, heads * p, lines, p)
        to_scores += _dot(grads, tl.trans(values), PRECISION)
        to_keys += _dot(values, _block(after, lines, p, n, columns, n), PRECISION)
        to_queries += _dot(grads, _block(before, lines, p, n, columns, n), PRECISION)
    to_scores *= decays
    place = wide // p * n + steps[:, None] * (heads * n) + columns[None, :]
    inside = (steps[:, None] < left) & (columns[None, :] < n)
    queries = _block(C + narrow, steps, left, groups * n, columns, n)
    tl.store(grad_B + place, to_end[:, None] * to_keys + _dot(tl.trans(to_scores), queries, PRECISION), inside)
    keys = _block(B + narrow, steps, left, groups * n, columns, n)
    tl.store(grad_C + place, since_start[:, None] * to_queries + _dot(to_scores, keys, PRECISION), inside)
