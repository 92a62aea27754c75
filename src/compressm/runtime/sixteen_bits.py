"""Linear layers in 16 bits on processors without instructions for them, where PyTorch's own are several times slower
than in float32.

The product is computed in float32, of slices of the weight, so that never more than a slice exists twice, and rounded
once at its end, as PyTorch's own kernel does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

HALVES = (torch.bfloat16, torch.float16)
_SLICE = 2**23  # entries of a weight that are converted at a time: 32 MB


@contextmanager
def quick_products(model: nn.Module) -> Generator[None]:
    """While the block runs, compute linear layers in 16 bits by float32 where this processor is faster so."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.device.type == "cpu"}
    if not any(slower(dtype) for dtype in dtypes.intersection(HALVES)):
        yield
        return
    with _ByFloat32():
        yield


@cache
def slower(dtype: torch.dtype) -> bool:
    """Whether products of matrices in a dtype take this processor more than twice as long as in float32, by trial."""
    times = {one: _seconds(one) for one in (dtype, torch.float32)}
    return times[dtype] > 2 * times[torch.float32]


def _seconds(dtype: torch.dtype) -> float:
    matrix, best = torch.ones(256, 256, dtype=dtype), float("inf")
    for _ in range(3):
        started = time.perf_counter()
        F.linear(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return best


class _ByFloat32(TorchFunctionMode):
    """Linear layers in 16 bits on the CPU by float32; nothing else changes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and _in_halves(*args, **kwargs):
            return linear(*args, **kwargs)
        return func(*args, **kwargs)


def _in_halves(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return input.device.type == "cpu" and input.dtype in HALVES and input.dtype == weight.dtype


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight^T + bias`` in 16 bits, computed in float32.

    Args:
        input: shape ``(..., m)``.
        weight: shape ``(n, m)``, same dtype.
        bias: shape ``(n,)``.

    Returns:
        shape ``(..., n)``, same dtype. Gradients are computed in float32 too.
    """
    made: Any = _Linear.apply(input, weight, bias)
    return made


class _Linear(torch.autograd.Function):
    """Saves what it was given, and nothing in float32."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        rows, made = input.float(), input.new_empty(*input.shape[:-1], len(weight))
        for part in _slices(weight):
            added = None if bias is None else bias[part].float()
            made[..., part] = F.linear(rows, weight[part].float(), added)
        return made

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,), (input, weight) = grad_outputs, ctx.saved_tensors
        rows = gradient.float()
        to_input = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            parts = (rows[..., part] @ weight[part].float() for part in _slices(weight))
            to_input = sum(parts, torch.zeros((), dtype=torch.float32)).to(input.dtype)
        if ctx.needs_input_grad[1]:
            to_weight = (rows.flatten(0, -2).mT @ input.float().flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = rows.flatten(0, -2).sum(0).to(weight.dtype)
        return to_input, to_weight, to_bias


def _slices(weight: Tensor) -> list[slice]:
    """Slices of rows with at most `_SLICE` entries."""
    count = max(1, _SLICE // max(1, weight.shape[1]))
    return [slice(start, min(start + count, len(weight))) for start in range(0, len(weight), count)]


__all__ = ["HALVES", "linear", "quick_products", "slower"]
