"""The operations of a narrow block that act on each time step by itself, in compiled passes over memory.

In a block of few channels linear maps, batch norm, GELU, GLU and dropout cost more than the recurrence if each is a
separate call, since a library's matrix product is slow for matrices of 8 columns. Wider blocks, and other devices than
CPUs, use PyTorch's functions and those of `activations`.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.layers.activations import applied, drawn, gelu_dropout, glu_residual, takes, unhooked, without_draw
from compressm.scans import native
from compressm.scans.transforms import gradients, twice

# Largest numbers of channels for which these are faster than the general functions.
_WIDEST_TAIL = 32
_WIDEST_LINEAR = 8
_WIDEST_NORM = 16


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``. A narrow `nn.Linear` is computed by a compiled kernel.

    Args:
        module: any module, of shape ``(..., p)`` to ``(..., q)``.
        x: its input.
    """
    if not _plain(module, x, _WIDEST_LINEAR):
        return module(x)
    return applied(_Linear, x.contiguous(), module.weight.contiguous(), module.bias.contiguous())


def gated_residual(u: Tensor, x: Tensor, module: nn.Module, p: float, training: bool) -> Tensor:
    """``u + dropout(a sigmoid(b))`` with ``(a, b) = module(dropout(GELU(x)))``, GELU in its tanh form.

    Args:
        u, x: shape ``(..., d)``.
        module: linear, from d to 2 d channels.
        p: probability of dropping an element, in [0, 1).
        training: whether elements are dropped.
    """
    same = takes(u, x) and u.shape == x.shape
    if not (same and _plain(module, x, 2 * _WIDEST_TAIL) and module.out_features == 2 * module.in_features):
        return glu_residual(u, module(gelu_dropout(x, p, training)), p, training)
    tensors = (u.contiguous(), x.contiguous(), module.weight.contiguous(), module.bias.contiguous())
    return applied(_Tail, *tensors, *drawn(p, training))


def batch_norm(module: nn.BatchNorm1d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Batch norm over all but the last dimension, and ``x`` itself.

    Other uses of ``x``, for example a residual connection, should take the second result. The backward pass then adds
    their gradient in the same pass over memory.

    Args:
        module: with weights and running statistics, which training updates.
        x: shape ``(..., d)``.
    """
    weight, bias, mean, var = module.weight, module.bias, module.running_mean, module.running_var
    if x.numel() == 0:  # there are no statistics to take or to update
        return (torch.addcmul(bias, x, weight) if module.affine else x), x
    few = x.numel() > x.shape[-1] == module.num_features <= _WIDEST_NORM and module.affine  # more than one row
    if not (module.training and few and mean is not None and var is not None and takes(x, weight, bias, mean, var)):
        return nn.BatchNorm1d.forward(module, x.reshape(-1, x.shape[-1])).view_as(x), x  # rows without a copy
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    momentum = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
    tensors = (x.contiguous(), weight.contiguous(), bias.contiguous(), mean, var)
    result: Any = _BatchNorm.apply(*tensors, float(momentum), float(module.eps))
    return result


def _plain(module: nn.Module, x: Tensor, widest: int) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is an `nn.Linear` itself, without hooks, of at most ``widest`` channels, and takes ``x``."""
    if not takes(x) or type(module) is not nn.Linear or max(module.weight.shape) > widest:
        return False
    if not isinstance(module.bias, Tensor) or not unhooked(module):
        return False
    return x.numel() > 0 and x.shape[-1] == module.in_features and takes(x, module.weight, module.bias)


def _tail(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.glu(F.linear(F.gelu(x, approximate="tanh"), weight, bias), dim=-1)


def _normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return F.batch_norm(flat, None, None, weight, bias, training=True, eps=eps).view_as(x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        (q, p), out = weight.shape, x.new_empty(*x.shape[:-1], weight.shape[0])
        native.call("linear_forward", x, x.numel() // p, p, q, x, weight, bias, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias = ctx.saved_tensors
        if twice():
            return gradients(F.linear, (x, weight, bias), (grad,))
        (q, p), grad_weight, grad_bias = weight.shape, torch.empty_like(weight), weight.new_empty(weight.shape[0])
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        native.call(
            "linear_backward", x, x.numel() // p, p, q, x, weight, grad.contiguous(), grad_x, grad_weight, grad_bias
        )
        return grad_x, grad_weight, grad_bias


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, weight: Tensor, bias: Tensor, seed: int, p: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.draw = seed, p
        out, d = torch.empty_like(u), u.shape[-1]
        native.call("tail_forward", x, x.numel() // d, d, x, weight, bias, u, out, seed, p)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias = ctx.saved_tensors
        if twice():
            without_draw(ctx.draw[1])
            return grad, *gradients(_tail, (x, weight, bias), (grad,)), None, None
        grad_x, grad_weight, grad_bias, d = (*(torch.empty_like(t) for t in (x, weight, bias)), x.shape[-1])
        grad = grad.contiguous()
        native.call(
            "tail_backward", x, x.numel() // d, d, x, weight, bias, grad, grad_x, grad_weight, grad_bias, *ctx.draw
        )
        return grad, grad_x, grad_weight, grad_bias, None, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, d = torch.empty_like(x), x.shape[-1]
        statistics = x.new_empty(2, d)
        native.call(
            "batch_norm_forward", x, x.numel() // d, d, x, weight, bias, mean, var, momentum, eps, statistics, out
        )
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return passed, *[None] * 6
        x, weight, bias, statistics = ctx.saved_tensors
        if twice():
            to_x, *others = gradients(_normalised, (x, weight, bias, ctx.eps), (grad,))
            return (to_x if to_x is None or passed is None else to_x + passed), *others[:2], *[None] * 4
        grad_x, grad_weight, grad_bias, d = (*(torch.empty_like(t) for t in (x, weight, weight)), x.shape[-1])
        passed = None if passed is None else passed.contiguous()
        native.call(
            "batch_norm_backward", x, x.numel() // d, d, x, weight, statistics, grad.contiguous(), passed,
            grad_x, grad_weight, grad_bias,
        )  # fmt: skip
        return grad_x, grad_weight, grad_bias, *[None] * 4
