"""The element-wise tails of a block, each in one pass over memory where the compiled kernels can be had.

On a CPU a block's time goes to its element-wise operations as much as to its matrix products, and most of that to
dropout, whose random numbers PyTorch draws one by one. Here a seed is drawn from PyTorch's generator, and the rest is a
hash, computed anew in the backward pass. Elsewhere, and under `torch.compile`, which fuses by itself, these are the
ordinary PyTorch functions. The two draw different numbers from the same generator state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compressm.scans import native


def gelu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``dropout(GELU(x))``, GELU in its tanh form; any shape.

    Args:
        x: floating point tensor.
        p: probability of dropping an element, in [0, 1).
        training: whether to drop at all.
    """
    if not _native(x):
        return F.dropout(F.gelu(x, approximate="tanh"), p, training)
    return _apply(_Gelu, x.contiguous(), *_seed(p, training))


def glu_residual(u: Tensor, v: Tensor, p: float, training: bool) -> Tensor:
    """``u + dropout(a sigmoid(b))`` with ``v = (a, b)`` along the last dimension.

    Args:
        u: shape ``(..., d)``.
        v: shape ``(..., 2 d)``, of the dtype of ``u``.
        p, training: see `gelu_dropout`.
    """
    if not _native(u, v):
        return u + F.dropout(F.glu(v, dim=-1), p, training)
    return _apply(_Glu, u.contiguous(), v.contiguous(), *_seed(p, training))


def _native(*tensors: Tensor) -> bool:
    whole = tensors[0].dtype in (torch.float32, torch.float64) and all(t.dtype == tensors[0].dtype for t in tensors)
    return whole and not torch.compiler.is_compiling() and native.usable(*tensors)


def _seed(p: float, training: bool) -> tuple[int, float]:
    if not training or p == 0:
        return 0, 0.0
    return int(torch.randint(-(2**63), 2**63 - 1, ())), p


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Any = function.apply(*arguments)
    return result


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: int, p: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.draw = seed, p
        out = torch.empty_like(x)
        native.call("gelu", x, x.numel(), x, None, out, seed, p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        native.call("gelu", x, x.numel(), x, grad.contiguous(), out, *ctx.draw)
        return out, None, None


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, seed: int, p: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.draw = seed, p
        out, d = torch.empty_like(u), u.shape[-1]
        native.call("glu", u, u.numel() // d, d, u, v, None, out, seed, p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (v,) = ctx.saved_tensors
        out, d = torch.empty_like(v), grad.shape[-1]
        native.call("glu", v, grad.numel() // d, d, None, v, grad.contiguous(), out, *ctx.draw)
        return grad, out, None, None
