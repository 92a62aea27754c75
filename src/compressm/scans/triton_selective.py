# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Kernels are written in Triton's language, whose types a Python type checker does not understand.)
"""The selective scan on CUDA devices, forward and backward, in Triton.

A program computes 64 channels of one sequence. It processes time in tiles of eight steps, which are held in registers,
and states in blocks of four, so work is proportional to ``n`` rounded up to a multiple of four. Between tiles the
states are stored in a buffer that fits in the cache, so the main memory traffic is only what the recurrence reads and
writes. Every 64 steps the forward pass also stores the states, and the backward pass computes the steps between them
again.

If batch and channels alone do not fill the device, time is divided into parts too. A first kernel runs every part from
zero, a second one links the parts by their decays, and then all parts run at once from their true initial states. This
computes every exponential twice, so it is done only when needed.

Gradients of ``B`` and ``C`` are sums over channels. Each block of channels writes its own sum, and these are added in a
fixed order, so that results are the same in every run. This takes ``d / 64`` times the memory of ``B`` and ``C``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressm.scans.frame import loop
from compressm.scans.selective_step import selective_step
from compressm.scans.transforms import gradients, twice

_TILE = 8  # steps in registers at a time
_KEEP = 64  # steps between stored states; a multiple of _TILE
_GROUPS, _LANES = 2, 32  # channels of a program; two per lane halve the cost of sums over channels
_CHANNELS = _GROUPS * _LANES


def selective_scan_triton(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t``, ``y_t = C_t . h_t``; differentiable in every argument.

    Args:
        u, delta: shape ``(batch, length, d)``, ``delta`` non-negative. These and the others may be float16, bfloat16,
            float32 or float64, in any mixture.
        A: negative, shape ``(d, n)``.
        B, C: shape ``(batch, length, n)``.
        initial_state: shape ``(batch, d, n)``.

    Returns:
        ``y``, shape and dtype of ``u``, and the state after the last step, shape ``(batch, d, n)``. The state is
        float64 if any argument is, otherwise float32, like all states and sums inside.
    """
    tensors = (u, delta, A, B, C, initial_state)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.cuda.device_of(u):  # Triton launches on the current device
        return _SelectiveScan.apply(*tensors, keep)  # pyright: ignore[reportReturnType]  (apply is untyped)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor]:
        (batch, length, d), n = u.shape, A.shape[1]
        dtype = torch.float32
        for tensor in (u, delta, A, B, C, initial_state):
            dtype = torch.promote_types(dtype, tensor.dtype)
        given = (u, delta, A, B, C, initial_state)
        u, delta, B, C = (tensor.contiguous() for tensor in (u, delta, B, C))
        rates = (A.T.to(dtype) * math.log2(math.e)).contiguous()  # exp(delta A) = 2^(delta rate)
        parts, segment = _parts(u)
        grid, sizes = (triton.cdiv(d, _CHANNELS), parts, batch), (length, d, segment, n)

        states = u.new_zeros(batch, parts, n, d, dtype=dtype)
        states[:, 0] = initial_state.mT
        if parts > 1:
            _run_parts(states, u, delta, rates, B, sizes, reverse=False)
        kept = u.new_empty((batch, triton.cdiv(length, _KEEP), n, d) if keep else (1,), dtype=dtype)
        y = torch.empty_like(u)
        _forward_kernel[grid](u, delta, rates, B, C, y, states, kept, *sizes, KEEP=_KEEP if keep else 0, **_options(n))
        if keep:
            ctx.save_for_backward(u, delta, rates, B, C, kept, *given)
            ctx.dtypes = A.dtype, initial_state.dtype
        return y, states[:, -1].mT.contiguous()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, rates, B, C, kept, *given = ctx.saved_tensors
        if twice():
            return *gradients(_composed, given, (grad_y, grad_state)), None
        (batch, length, d), n, dtype = u.shape, len(rates), rates.dtype
        grad_y = grad_y.contiguous()
        parts, segment = _parts(u)
        grid, sizes = (triton.cdiv(d, _CHANNELS), parts, batch), (length, d, segment, n)

        adjoint = u.new_zeros(batch, parts, n, d, dtype=dtype)
        adjoint[:, -1] = grad_state.mT
        if parts > 1:
            _run_parts(adjoint, grad_y, delta, rates, C, sizes, reverse=True)
        replay = u.new_empty(batch, parts, _KEEP // _TILE, n, d, dtype=dtype)
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
        grad_A = torch.zeros_like(adjoint)
        grad_B, grad_C = (u.new_empty(grid[0], *B.shape, dtype=dtype) for _ in range(2))
        _backward_kernel[grid](
            u, delta, rates, B, C, grad_y, kept, replay, adjoint, grad_u, grad_delta, grad_A, grad_B, grad_C,
            *sizes, KEEP=_KEEP, **_options(n),
        )  # fmt: skip
        dtype_A, dtype_state = ctx.dtypes
        return (
            grad_u,
            grad_delta,
            grad_A.sum((0, 1)).T.to(dtype_A),
            grad_B.sum(0).to(B.dtype),
            grad_C.sum(0).to(C.dtype),
            adjoint[:, 0].mT.to(dtype_state),
            None,
        )


def _composed(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """`_SelectiveScan` composed of PyTorch operations."""
    dtype = torch.float32
    for tensor in (u, delta, A, B, C, initial_state):
        dtype = torch.promote_types(dtype, tensor.dtype)
    wide = [tensor.to(dtype) for tensor in (u, delta, B, C)]
    rates = A.to(dtype)

    def step(state: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        return selective_step(state, u, delta, rates, B, C)

    y, state = loop(step, initial_state.to(dtype), *wide)
    return y.to(u.dtype), state


def _options(n: int) -> dict[str, Any]:
    """Kernel options: blocks of up to four states, one state per warp; always with fused multiply-add."""
    block = min(triton.next_power_of_2(n), 4)
    sizes = {"TILE": _TILE, "GROUPS": _GROUPS, "BLOCK": block, "LANES": _LANES}
    return {**sizes, "num_warps": block, "enable_fp_fusion": True}


def _parts(u: Tensor) -> tuple[int, int]:
    """The number of parts that time is divided into, and the steps in each, a multiple of ``_KEEP``."""
    batch, length, d = u.shape
    processors = torch.cuda.get_device_properties(u.device).multi_processor_count if u.is_cuda else 4
    parts = max(1, 2 * processors // (batch * triton.cdiv(d, _CHANNELS)))
    segment = triton.cdiv(triton.cdiv(length, parts), _KEEP) * _KEEP
    return triton.cdiv(length, segment), segment


def _run_parts(
    states: Tensor, inputs: Tensor, delta: Tensor, rates: Tensor, vectors: Tensor, sizes: tuple[int, ...], reverse: bool
) -> None:
    """Compute the initial states of all parts from that of the first part (in reverse, of the last)."""
    batch, parts, n, d = states.shape
    ends, span = torch.zeros_like(states), states.new_empty(batch, parts, d)
    grid = (triton.cdiv(d, _CHANNELS), parts, batch)
    _local_kernel[grid](inputs, delta, rates, vectors, ends, span, *sizes, REVERSE=reverse, **_options(n))
    grid = (triton.cdiv(d, 128), n, batch)
    _link_kernel[grid](ends, span, rates, states, parts, d, n, REVERSE=reverse, LANES=128, enable_fp_fusion=True)


# In the kernels a tile has the axes (step, group of channels, state, channel in the group). Lanes run along channels
# and warps along states, so that a thread holds all steps of its states, and `_row` is a register. In this layout
# threads exchange only sums. Three things make the compiler choose it: pointers are broadcast over states or channels
# before a load; d is not a constant; and states count downwards in a block, which hides that they are neighbours in B
# and C. Steps beyond the end load as zero, and a step with delta = 0 and u = 0 changes nothing.


@triton.jit
def _axes(TILE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Steps of a tile, states of a block, channels of this program. (In 64 bits the compiler sees constant offsets.)"""
    rows = tl.arange(0, TILE)[:, None, None, None].to(tl.int64)
    lines = BLOCK - 1 - tl.arange(0, BLOCK)[None, None, :, None].to(tl.int64)
    lanes = tl.program_id(0) * (GROUPS * LANES) + tl.arange(0, LANES)[None, None, None, :]
    return rows, lines, lanes.to(tl.int64) + tl.arange(0, GROUPS)[None, :, None, None].to(tl.int64) * LANES


@triton.jit
def _load(pointers, mask, like):
    """Entries of the shape and dtype of ``like``, zero where masked."""
    shape: tl.constexpr = like.shape
    return tl.load(tl.broadcast_to(pointers, shape), tl.broadcast_to(mask, shape), other=0.0).to(like.dtype)


@triton.jit
def _row(tile, rows, s: tl.constexpr):
    """Row ``s`` of a tile. Adding -0.0, unlike 0.0, changes no number, so the compiler removes the sum."""
    return tl.sum(tl.where(rows == s, tile, -0.0), 0, keep_dims=True)


@triton.jit(do_not_specialize=["length", "d", "segment"])
def _local_kernel(
    inputs, delta, rates, vectors, ends, span, length, d, segment, n: tl.constexpr, REVERSE: tl.constexpr,
    TILE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Run one part from a zero state: ``x = a_t x + delta_t u_t B_t``, or ``x = a_t (x + grad_y_t C_t)`` in reverse."""
    part, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, lines, channels = _axes(TILE, GROUPS, BLOCK, LANES)
    like = tl.zeros([TILE, GROUPS, BLOCK, LANES], ends.dtype.element_ty)
    like_vectors = tl.zeros([TILE, 1, BLOCK, LANES], ends.dtype.element_ty)
    begin = part.to(tl.int64) * segment
    end = tl.minimum(begin + segment, length)
    tiles = tl.cdiv(end - begin, TILE).to(tl.int32)
    ends += (batch * tl.num_programs(1) + part) * n * d
    span += (batch * tl.num_programs(1) + part) * d
    time = like
    for i in range(tiles):
        at = begin + (tiles - 1 - i if REVERSE else i) * TILE
        inside = rows < end - at
        wide = (batch * length + at) * d + (rows * d + channels)
        step = _load(delta + wide, inside & (channels < d), like)
        value = _load(inputs + wide, inside & (channels < d), like)
        time += step
        if not REVERSE:
            value *= step
        for first in range(0, n, BLOCK):
            index = first + lines
            here = (index < n) & (channels < d)
            place = index * d + channels
            narrow = (batch * length + at) * n + (rows * n + index)
            decay = tl.exp2(step * tl.load(rates + place, here, other=0.0))
            drive = value * _load(vectors + narrow, inside & (index < n), like_vectors)
            x = tl.load(ends + place, here, other=0.0)
            for k in tl.static_range(TILE):
                if REVERSE:
                    x = _row(decay, rows, TILE - 1 - k) * (x + _row(drive, rows, TILE - 1 - k))
                else:
                    x = _row(decay, rows, k) * x + _row(drive, rows, k)
            tl.store(ends + place, x, here)
        tl.debug_barrier()  # what is stored here is loaded in the next tile
    total = tl.sum(time, 0, keep_dims=True)  # the same for all states
    tl.store(tl.broadcast_to(span + channels, total.shape), total, (lines == 0) & (channels < d))


@triton.jit(do_not_specialize=["parts", "d"])
def _link_kernel(ends, span, rates, starts, parts, d, n: tl.constexpr, REVERSE: tl.constexpr, LANES: tl.constexpr):
    """The initial state of every part: that of the part before, decayed over its span, plus its end from zero."""
    state, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels = tl.program_id(0) * LANES + tl.arange(0, LANES)
    here = channels < d
    rate = tl.load(rates + state * d + channels, here, other=0.0)
    first = parts - 1 if REVERSE else 0
    x = tl.load(starts + ((batch * parts + first) * n + state) * d + channels, here, other=0.0)
    for i in range(parts - 1):
        part = batch * parts + (parts - 1 - i if REVERSE else i)
        time = tl.load(span + part * d + channels, here, other=0.0)
        x = tl.exp2(rate * time) * x + tl.load(ends + (part * n + state) * d + channels, here, other=0.0)
        part = part - 1 if REVERSE else part + 1
        tl.store(starts + (part * n + state) * d + channels, x, here)


@triton.jit(do_not_specialize=["length", "d", "segment"])
def _forward_kernel(
    u, delta, rates, B, C, y, states, kept, length, d, segment, n: tl.constexpr, KEEP: tl.constexpr,
    TILE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Run one part: outputs to ``y``, states at multiples of KEEP to ``kept`` and the last ones to ``states``."""
    part, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, lines, channels = _axes(TILE, GROUPS, BLOCK, LANES)
    like = tl.zeros([TILE, GROUPS, BLOCK, LANES], states.dtype.element_ty)
    like_vectors = tl.zeros([TILE, 1, BLOCK, LANES], states.dtype.element_ty)
    begin = part.to(tl.int64) * segment
    end = tl.minimum(begin + segment, length)
    states += (batch * tl.num_programs(1) + part) * n * d
    for i in range(tl.cdiv(end - begin, TILE).to(tl.int32)):
        at = begin + i * TILE
        inside = rows < end - at
        wide = (batch * length + at) * d + (rows * d + channels)
        step = _load(delta + wide, inside & (channels < d), like)
        value = _load(u + wide, inside & (channels < d), like) * step
        output = like
        for first in range(0, n, BLOCK):
            index = first + lines
            here = (index < n) & (channels < d)
            place = index * d + channels
            narrow = (batch * length + at) * n + (rows * n + index)
            decay = tl.exp2(step * tl.load(rates + place, here, other=0.0))
            drive = value * _load(B + narrow, inside & (index < n), like_vectors)
            x = tl.load(states + place, here, other=0.0)
            if KEEP > 0:  # noqa: SIM102  (that is decided when compiling, the next in every tile)
                if at % KEEP == 0:
                    tl.store(kept + (batch * tl.cdiv(length, KEEP) + at // KEEP) * n * d + place, x, here)
            history = like
            for s in tl.static_range(TILE):
                x = _row(decay, rows, s) * x + _row(drive, rows, s)
                history = tl.where(rows == s, x, history)
            tl.store(states + place, x, here)
            output += history * _load(C + narrow, inside & (index < n), like_vectors)
        tl.store(y + wide, tl.sum(output, 2, keep_dims=True).to(y.dtype.element_ty), inside & (channels < d))
        tl.debug_barrier()  # what is stored here is loaded in the next tile


@triton.jit(do_not_specialize=["length", "d", "segment"])
def _backward_kernel(
    u, delta, rates, B, C, grad_y, kept, replay, adjoint, grad_u, grad_delta, grad_A, grad_B, grad_C,
    length, d, segment, n: tl.constexpr, KEEP: tl.constexpr,
    TILE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Run backwards through one part, with the gradient ``g_t = grad_y_t C_t + a_{t+1} g_{t+1}`` of ``h_t``.

    For every stretch of KEEP steps the states before each of its tiles are computed again, into ``replay``.
    ``adjoint`` holds ``a_t g_t`` of the following tile, and at the end the gradient of the state before the part.
    """
    block, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, lines, channels = _axes(TILE, GROUPS, BLOCK, LANES)
    dtype = adjoint.dtype.element_ty
    like = tl.zeros([TILE, GROUPS, BLOCK, LANES], dtype)
    like_vectors = tl.zeros([TILE, 1, BLOCK, LANES], dtype)
    grad_B += block * tl.num_programs(2).to(tl.int64) * length * n
    grad_C += block * tl.num_programs(2).to(tl.int64) * length * n
    replay += (batch * tl.num_programs(1) + part) * (KEEP // TILE) * n * d
    adjoint += (batch * tl.num_programs(1) + part) * n * d
    grad_A += (batch * tl.num_programs(1) + part) * n * d
    begin = part.to(tl.int64) * segment
    end = tl.minimum(begin + segment, length)
    stretches = tl.cdiv(end - begin, KEEP).to(tl.int32)
    for i in range(stretches):
        start = begin + (stretches - 1 - i) * KEEP
        tiles = tl.minimum(tl.cdiv(end - start, TILE), KEEP // TILE).to(tl.int32)
        for first in range(0, n, BLOCK):
            index = first + lines
            here = (index < n) & (channels < d)
            place = index * d + channels
            rate = tl.load(rates + place, here, other=0.0)
            x = tl.load(kept + (batch * tl.cdiv(length, KEEP) + start // KEEP) * n * d + place, here, other=0.0)
            tl.store(replay + place, x, here)
            for j in range(tiles - 1):
                at = start + j * TILE  # always a full tile, since the last one is left out
                wide = (batch * length + at) * d + (rows * d + channels)
                narrow = (batch * length + at) * n + (rows * n + index)
                step = _load(delta + wide, channels < d, like)
                value = _load(u + wide, channels < d, like) * step
                decay = tl.exp2(step * rate)
                drive = value * _load(B + narrow, index < n, like_vectors)
                for s in tl.static_range(TILE):
                    x = _row(decay, rows, s) * x + _row(drive, rows, s)
                tl.store(replay + (j + 1) * n * d + place, x, here)
        tl.debug_barrier()  # what is stored here is loaded below
        for j in range(tiles):
            at = start + (tiles - 1 - j) * TILE
            inside = rows < end - at
            wide = (batch * length + at) * d + (rows * d + channels)
            step = _load(delta + wide, inside & (channels < d), like)
            value = _load(u + wide, inside & (channels < d), like)
            grad = _load(grad_y + wide, inside & (channels < d), like)
            to_rate, to_drive = like, like  # over this thread's states, sums of g_t a_t h_{t-1} rate and of g_t B_t
            for first in range(0, n, BLOCK):
                index = first + lines
                here = (index < n) & (channels < d)
                place = index * d + channels
                narrow = (batch * length + at) * n + (rows * n + index)
                rate = tl.load(rates + place, here, other=0.0)
                decay = tl.exp2(step * rate)
                b = _load(B + narrow, inside & (index < n), like_vectors)
                drive = step * value * b
                x = tl.load(replay + (tiles - 1 - j) * n * d + place, here, other=0.0)
                decayed = like  # a_t h_{t-1}
                for s in tl.static_range(TILE):
                    x = _row(decay, rows, s) * x
                    decayed = tl.where(rows == s, x, decayed)
                    x += _row(drive, rows, s)
                to_c = tl.sum(tl.sum(grad * (decayed + drive), 1, keep_dims=True), 3, keep_dims=True)
                tl.store(grad_C + narrow, to_c, inside & (index < n))
                source = grad * _load(C + narrow, inside & (index < n), like_vectors)
                x = tl.load(adjoint + place, here, other=0.0)
                g = like
                for k in tl.static_range(TILE):
                    x += _row(source, rows, TILE - 1 - k)
                    g = tl.where(rows == TILE - 1 - k, x, g)
                    x = _row(decay, rows, TILE - 1 - k) * x
                tl.store(adjoint + place, x, here)
                to_b = tl.sum(tl.sum(g * step * value, 1, keep_dims=True), 3, keep_dims=True)
                tl.store(grad_B + narrow, to_b, inside & (index < n))
                to_rate += g * decayed * rate
                to_drive += g * b
                to_A = tl.load(grad_A + place, here, other=0.0) + tl.sum(g * decayed * step, 0, keep_dims=True)
                tl.store(grad_A + place, to_A, here)
            to_u = tl.sum(step * to_drive, 2, keep_dims=True)
            to_delta = tl.sum(0.6931471805599453 * to_rate + value * to_drive, 2, keep_dims=True)  # A = ln 2 rate
            tl.store(grad_u + wide, to_u.to(grad_u.dtype.element_ty), inside & (channels < d))
            tl.store(grad_delta + wide, to_delta.to(grad_delta.dtype.element_ty), inside & (channels < d))
            tl.debug_barrier()  # adjoint and grad_A are loaded in the next tile, replay is stored in the next stretch
