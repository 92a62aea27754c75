"""The element-wise parts of a block, each in one pass over memory where the compiled kernels are available.

On a CPU a block spends as much time on element-wise operations as on matrix products. Most of this time is dropout,
since PyTorch draws the random numbers one by one. The kernels draw only a seed from PyTorch's generator and hash it
with the position of each element. The backward pass computes the hash again. Other devices use the ordinary PyTorch
functions, and so does `torch.compile`, which fuses these operations itself. For the same generator state kernels and
PyTorch functions drop different elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.errors import DifferentiationError
from compressm.layers.packing import steps_since
from compressm.layers.parts import shifted_products
from compressm.scans import native
from compressm.scans.transforms import gradients, transformed, twice

_FEW = 8  # mamba.h multiplies matrices of at most so many columns itself; for wider ones PyTorch is fast


def gelu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``dropout(GELU(x))``, GELU in its tanh form; any shape.

    Args:
        x: floating point tensor.
        p: probability of dropping an element, in [0, 1).
        training: whether to drop at all.
    """
    if not takes(x):
        return F.dropout(F.gelu(x, approximate="tanh"), p, training)
    return applied(_Gelu, x.contiguous(), *drawn(p, training))


def glu_residual(u: Tensor, v: Tensor, p: float, training: bool) -> Tensor:
    """``u + dropout(a sigmoid(b))`` with ``v = (a, b)`` along the last dimension.

    Args:
        u: shape ``(..., d)``.
        v: shape ``(..., 2 d)``, of the dtype of ``u``.
        p, training: see `gelu_dropout`.
    """
    if not takes(u, v):
        return u + F.dropout(F.glu(v, dim=-1), p, training)
    return applied(_Glu, u.contiguous(), v.contiguous(), *drawn(p, training))


def gated(y: Tensor, u: Tensor, D: Tensor, z: Tensor) -> Tensor:
    """``(y + D u) SiLU(z)``, the gate of a Mamba block.

    Args:
        y, u, z: shape ``(batch, length, d)``.
        D: shape ``(d,)``.
    """
    if not takes(y, u, D, z):
        return _gated(y, u, D, z)
    return applied(_Gate, y.contiguous(), u.contiguous(), D.contiguous(), _rows(z))


def step_sizes(projection: nn.Linear, dt: Tensor) -> Tensor:
    """``softplus(projection(dt))``, Mamba's step sizes.

    Args:
        projection: with a bias; or a module around one, such as an adapter, which is called as it is.
        dt: shape ``(..., rank)``.
    """
    if type(projection) is not nn.Linear or not unhooked(projection):
        return F.softplus(projection(dt))
    weight, bias = projection.weight, projection.bias
    if dt.ndim != 3 or not 1 <= dt.shape[-1] <= _FEW or not takes(dt, weight, bias):
        return F.softplus(projection(dt))
    return applied(_StepSizes, _rows(dt), weight.T.contiguous(), bias.contiguous())


def causal_conv(conv: nn.Conv1d, u: Tensor, starts: Tensor | None = None) -> Tensor:
    """SiLU of a causal depthwise convolution over time.

    Args:
        conv: depthwise; its last tap belongs to the present input. Its ``padding`` is ignored.
        u: shape ``(batch, length, channels)``.
        starts: True where a sequence begins, before which nothing is read, shape ``(batch, length)``; None for one
            sequence a row.
    """
    bias = u.new_zeros(u.shape[2]) if conv.bias is None else conv.bias
    return silu_conv(u, conv.weight[:, 0], bias, starts)


def silu_conv(u: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None) -> Tensor:
    """`causal_conv` with its weight, shape ``(channels, taps)``, and bias, shape ``(channels,)``."""
    since = None if starts is None else steps_since(starts)
    if takes(u, weight, bias):
        return applied(_Convolution, _rows(u), weight.flip(1).T.contiguous(), bias.contiguous(), since)
    return F.silu(shifted_products(u, weight.T, bias, since))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def unhooked(module: nn.Module) -> bool:
    """Whether the module has no hooks. A module with hooks must be called, or its hooks do not run."""
    return not any(getattr(module, hooks) for hooks in _HOOKS)


def _rows(x: Tensor) -> Tensor:
    """``x`` itself if its rows are contiguous and evenly spaced, as in one half of a projection; otherwise a copy."""
    regular = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if regular else x.contiguous()


def takes(*tensors: Tensor) -> bool:
    """Whether the compiled kernels accept these tensors."""
    whole = tensors[0].dtype in (torch.float32, torch.float64) and all(t.dtype == tensors[0].dtype for t in tensors)
    ordinary = not torch.compiler.is_compiling() and not transformed()
    return whole and ordinary and tensors[0].numel() > 0 and native.usable(*tensors)


def drawn(p: float, training: bool) -> tuple[int, float]:
    if not training or p == 0:
        return 0, 0.0
    return int(torch.randint(-(2**63), 2**63 - 1, ())), p


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Any = function.apply(*arguments)
    return result


def without_draw(p: float) -> None:
    """Refuse to differentiate dropout twice, since its random numbers are drawn inside the compiled kernel.

    Raises:
        DifferentiationError: something is dropped.
    """
    if p > 0:
        raise DifferentiationError(
            f"a second derivative through compiled dropout (p={p:g}) is not supported: set dropout to 0, call "
            "model.eval(), or set COMPRESSM_NATIVE=0 for plain PyTorch"
        )


def _gelu(x: Tensor, seed: int, p: float) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gated(y: Tensor, u: Tensor, D: Tensor, z: Tensor) -> Tensor:
    return torch.addcmul(y, D, u) * F.silu(z)


def _silu_conv(u: Tensor, taps: Tensor, bias: Tensor, since: Tensor | None) -> Tensor:
    return F.silu(shifted_products(u, taps.flip(0), bias, since))


def _softplus_linear(dt: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.softplus(dt @ weight + bias)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: int, p: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.draw = seed, p
        out = torch.empty_like(x)
        native.call("gelu", x, x.numel(), x, None, out, seed, p)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        if twice():
            without_draw(ctx.draw[1])
            return gradients(_gelu, (x, *ctx.draw), (grad,))
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (v,) = ctx.saved_tensors
        if twice():
            without_draw(ctx.draw[1])
            return grad, *gradients(F.glu, (v,), (grad,)), None, None
        out, d = torch.empty_like(v), grad.shape[-1]
        native.call("glu", v, grad.numel() // d, d, None, v, grad.contiguous(), out, *ctx.draw)
        return grad, out, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor, D: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(y, u, D, z)
        out, d = torch.empty_like(y), y.shape[-1]
        native.call("gate_forward", y, y.numel() // d, d, z.stride(1), y, u, D, z, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, u, D, z = ctx.saved_tensors
        if twice():
            return gradients(_gated, (y, u, D, z), (grad,))
        d, parts = y.shape[-1], torch.get_num_threads()
        grad_y, grad_u, grad_z = torch.empty_like(y), torch.empty_like(y), torch.empty_like(y)
        grad_D = y.new_zeros(parts, d)
        native.call(
            "gate_backward", y, y.numel() // d, d, z.stride(1), y, u, D, z, grad.contiguous(),
            grad_y, grad_u, grad_z, grad_D, parts,
        )  # fmt: skip
        return grad_y, grad_u, grad_D.sum(0), grad_z


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, taps: Tensor, bias: Tensor, since: Tensor | None) -> Tensor:
        ctx.save_for_backward(u, taps, bias, since)
        (batch, length, d), out = u.shape, u.new_empty(u.shape)
        native.call("convolution_forward", u, batch, length, d, u.stride(1), taps.shape[0], u, taps, bias, since, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, taps, bias, since = ctx.saved_tensors
        if twice():
            return gradients(_silu_conv, (u, taps, bias, since), (grad,))
        (batch, length, d), width = u.shape, taps.shape[0]
        grad_u, sums = u.new_empty(u.shape), u.new_empty(batch, width + 1, d)
        native.call(
            "convolution_backward", u, batch, length, d, u.stride(1), width, u, taps, bias, since, grad.contiguous(),
            grad_u, sums,
        )  # fmt: skip
        to_taps, to_bias = sums.sum(0).split([width, 1])
        return grad_u, to_taps, to_bias[0], None


class _StepSizes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dt: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(dt, weight, bias)
        columns, d = weight.shape
        out = dt.new_empty(*dt.shape[:2], d)
        native.call("step_sizes_forward", dt, out.numel() // d, d, dt.stride(1), columns, dt, weight, bias, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dt, weight, bias = ctx.saved_tensors
        if twice():
            return gradients(_softplus_linear, (dt, weight, bias), (grad,))
        (columns, d), parts = weight.shape, torch.get_num_threads()
        grad_dt, sums = dt.new_empty(dt.shape), dt.new_zeros(parts, columns + 1, d)
        native.call(
            "step_sizes_backward", dt, grad.numel() // d, d, dt.stride(1), columns, dt, weight, bias, grad.contiguous(),
            grad_dt, sums, parts,
        )  # fmt: skip
        to_weight, to_bias = sums.sum(0).split([columns, 1])
        return grad_dt, to_weight, to_bias[0]
