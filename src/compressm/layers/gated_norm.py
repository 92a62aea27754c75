"""The root mean square norm with a SiLU gate, behind the scans with matrix-valued states, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.layers.parts import at_least_float32
from compressm.scans import native
from compressm.scans.transforms import gradients, transformed, twice

# Rows are divided into at most so many parts, each with its own sum for the weight's gradient. This does not depend on
# the number of threads, so that the sums agree bit by bit.
_PARTS, _ROWS_OF_PART = 64, 8


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, *, gate_last: bool) -> Tensor:
    """``weight * norm(x * SiLU(z))``, or with ``gate_last`` ``weight * norm(x) * SiLU(z)``.

        norm(v) = v / sqrt(mean(v^2) + eps)    over each of ``groups`` parts of the last axis (Zhang, Sennrich 2019)

    It is computed in float32 or float64; half precision is rounded at the end. On a CPU a compiled kernel reads ``x``
    and ``z`` once, forward and backward, without a copy if their last axis is contiguous.

    Args:
        x: shape ``(..., d)``.
        z: shape ``(..., d)``, the gate.
        weight: shape ``(d,)``.
        groups: divides ``d``.
        eps: added to the mean square.
        gate_last: whether the gate comes after the norm, as in gated linear attention, or before it, as in Mamba-2.

    Returns:
        shape ``(..., d)``, in the wider one of the dtypes of ``x`` and ``z``.
    """
    if not _takes(x, z, weight, groups):
        return _composed(x, z, weight, groups, eps, gate_last)
    if not torch.is_grad_enabled():  # a single token waits for autograd longer than for the kernel
        return _kernel(x, z, weight, groups, eps, gate_last)
    result: Any = _GatedNorm.apply(x, z, weight, groups, eps, gate_last)
    return result


def _takes(x: Tensor, z: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether the compiled kernel accepts these tensors."""
    if torch.compiler.is_compiling() or transformed() or not native.usable(x, z, weight, scan="norm"):
        return False
    return x.numel() > 0 and x.shape == z.shape and weight.shape == x.shape[-1:] and x.shape[-1] % groups == 0


def _composed(x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, gate_last: bool) -> Tensor:
    wide, gate = at_least_float32(x), F.silu(at_least_float32(z))
    v = (wide if gate_last else wide * gate).unflatten(-1, (groups, x.shape[-1] // groups))
    out = weight * F.rms_norm(v, v.shape[-1:], None, eps).flatten(-2)
    return (out * gate if gate_last else out).to(torch.promote_types(x.dtype, z.dtype))


def _kernel(x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, gate_last: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, z.dtype)
    stored = _stored_as(dtype)
    out = x.new_empty(x.shape, dtype=stored)
    native.call("norm_forward", out, *_arguments(stored, x, z, weight, groups, eps, gate_last), out)
    return out.to(dtype)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, gate_last: bool) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.options = groups, eps, gate_last
        return _kernel(x, z, weight, groups, eps, gate_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = (*ctx.saved_tensors, *ctx.options)
        if twice():
            return gradients(_composed, inputs, (grad,))
        x, _, weight = ctx.saved_tensors
        stored = _stored_as(grad.dtype)
        parts = min(-(-x.shape[:-1].numel() // _ROWS_OF_PART), _PARTS)
        grad_x, grad_z = (x.new_empty(x.shape, dtype=stored) for _ in "xz")
        grad_weight = weight.new_zeros(parts, x.shape[-1], dtype=torch.promote_types(stored, torch.float32))
        given = (*_arguments(stored, *inputs), *_rows(grad, stored))
        native.call("norm_backward", grad_x, *given, grad_x, grad_z, grad_weight, parts)
        return grad_x, grad_z, grad_weight[0], None, None, None


def _stored_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the kernel reads and writes. It knows bfloat16, but not float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def _arguments(
    stored: torch.dtype, x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, gate_last: bool
) -> list[Tensor | int | float]:
    """The arguments that the kernels share."""
    d = x.shape[-1]
    computed = torch.promote_types(stored, torch.float32)
    return [
        int(gate_last), x.numel() // d, groups, d // groups, float(eps), *_rows(x, stored), *_rows(z, stored),
        weight.to(computed).contiguous(),
    ]  # fmt: skip


def _rows(x: Tensor, dtype: torch.dtype) -> list[Tensor | int]:
    """``x`` with a contiguous last axis, the length of the axis before it, and the strides of the two before."""
    x = x.to(dtype)
    if x.ndim > 3:
        x = x.reshape(-1, *x.shape[-2:])
    if x.stride(-1) != 1:
        x = x.contiguous()
    over_outer, over_inner = (0, 0, *x.stride()[:-1])[-2:]
    return [x, 1 if x.ndim == 1 else x.shape[-2], over_outer, over_inner]
