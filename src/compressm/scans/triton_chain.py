# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Kernels are written in Triton's language, whose types a Python type checker does not understand.)
"""The recurrence of a complex diagonal system on CUDA devices, in Triton: one pass over memory in each direction."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressm.scans.plain_chain import chain_gradients
from compressm.scans.transforms import twice
from compressm.scans.triton_selective import _row

_OPTIONS: dict[str, Any] = {"TILE": 16, "LANES": 32, "num_warps": 1, "enable_fp_fusion": True}


def chain_triton(v: Tensor, lam: Tensor) -> Tensor:
    """Run ``s_m = lam s_{m-1} + v_m`` with ``s_{-1} = 0``; differentiable in both arguments.

    Args:
        v: real and imaginary parts, shape ``(batch, m, n, 2)``, float32 or float64.
        lam: real and imaginary parts, shape ``(n, 2)``, of the same dtype.

    Returns:
        ``s``, shape ``(batch, m, n, 2)``.
    """
    with torch.cuda.device_of(v):  # Triton launches on the current device
        return _Chain.apply(v, lam)  # pyright: ignore[reportReturnType]  (apply is untyped)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, lam: Tensor) -> Tensor:
        v, given, lam = v.contiguous(), lam, lam.contiguous()
        batch, length, n, _ = v.shape
        states = torch.empty_like(v)
        _forward_kernel[triton.cdiv(n, _OPTIONS["LANES"]), batch](v, lam, states, length, n, **_OPTIONS)
        ctx.save_for_backward(states, given)  # not a copy, which autograd would not know to depend on the argument
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        states, lam = ctx.saved_tensors
        if twice():
            tensors = (grad.mT, lam.T, torch.zeros_like(states[:, 0].mT), states.mT)
            to_v, to_lam, _ = chain_gradients(*tensors)
            return to_v.mT, to_lam.T
        lam = lam.contiguous()
        batch, length, n, _ = states.shape
        adjoint, grad_lam = torch.empty_like(states), states.new_empty(batch, n, 2)
        grid = triton.cdiv(n, _OPTIONS["LANES"]), batch
        _backward_kernel[grid](grad.contiguous(), lam, states, adjoint, grad_lam, length, n, **_OPTIONS)
        return adjoint, grad_lam.sum(0)


# A program computes 32 entries of the diagonal in one sequence, one per lane. A tile (steps, lanes) is in registers.


@triton.jit(do_not_specialize=["length", "n"])
def _forward_kernel(v, lam, states, length, n, TILE: tl.constexpr, LANES: tl.constexpr):
    rows = tl.arange(0, TILE)[:, None].to(tl.int64)
    lanes = (tl.program_id(0) * LANES + tl.arange(0, LANES))[None, :].to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * length
    lam_re = tl.load(lam + 2 * lanes, lanes < n, other=0.0)
    lam_im = tl.load(lam + 2 * lanes + 1, lanes < n, other=0.0)
    x_re, x_im = tl.zeros_like(lam_re), tl.zeros_like(lam_im)
    for i in range(tl.cdiv(length, TILE)):
        inside = (rows < length - i * TILE) & (lanes < n)
        place = (start + i * TILE) * n * 2 + (rows * n + lanes) * 2
        v_re = tl.load(v + place, inside, other=0.0)
        v_im = tl.load(v + place + 1, inside, other=0.0)
        for s in tl.static_range(TILE):
            carried = lam_re * x_re - lam_im * x_im
            x_im = lam_re * x_im + lam_im * x_re + _row(v_im, rows, s)
            x_re = carried + _row(v_re, rows, s)
            v_re = tl.where(rows == s, x_re, v_re)
            v_im = tl.where(rows == s, x_im, v_im)
        tl.store(states + place, v_re, inside)
        tl.store(states + place + 1, v_im, inside)


@triton.jit(do_not_specialize=["length", "n"])
def _backward_kernel(grad, lam, states, adjoint, grad_lam, length, n, TILE: tl.constexpr, LANES: tl.constexpr):
    """``g_m = grad_m + conj(lam) g_{m+1}``; the gradient of lam is the sum of ``g_m conj(s_{m-1})``."""
    rows = tl.arange(0, TILE)[:, None].to(tl.int64)
    lanes = (tl.program_id(0) * LANES + tl.arange(0, LANES))[None, :].to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    lam_re = tl.load(lam + 2 * lanes, lanes < n, other=0.0)
    lam_im = tl.load(lam + 2 * lanes + 1, lanes < n, other=0.0)
    x_re, x_im = tl.zeros_like(lam_re), tl.zeros_like(lam_im)
    to_lam_re, to_lam_im = tl.zeros_like(lam_re), tl.zeros_like(lam_im)
    tiles = tl.cdiv(length, TILE)
    for i in range(tiles):
        at = (tiles - 1 - i) * TILE
        inside = (rows < length - at) & (lanes < n)
        place = (batch * length + at) * n * 2 + (rows * n + lanes) * 2
        g_re = tl.load(grad + place, inside, other=0.0)
        g_im = tl.load(grad + place + 1, inside, other=0.0)
        before = inside & (rows + at > 0)
        s_re = tl.load(states + place - 2 * n, before, other=0.0)
        s_im = tl.load(states + place - 2 * n + 1, before, other=0.0)
        for k in tl.static_range(TILE):
            carried = lam_re * x_re + lam_im * x_im
            x_im = lam_re * x_im - lam_im * x_re + _row(g_im, rows, TILE - 1 - k)
            x_re = carried + _row(g_re, rows, TILE - 1 - k)
            g_re = tl.where(rows == TILE - 1 - k, x_re, g_re)
            g_im = tl.where(rows == TILE - 1 - k, x_im, g_im)
        tl.store(adjoint + place, g_re, inside)
        tl.store(adjoint + place + 1, g_im, inside)
        to_lam_re += tl.sum(g_re * s_re + g_im * s_im, 0, keep_dims=True)
        to_lam_im += tl.sum(g_im * s_re - g_re * s_im, 0, keep_dims=True)
    tl.store(grad_lam + (batch * n + lanes) * 2, to_lam_re, lanes < n)
    tl.store(grad_lam + (batch * n + lanes) * 2 + 1, to_lam_im, lanes < n)
