"""Derivatives other than one backward pass: forward mode, `torch.func`, and gradients of gradients.

The compiled kernels know one backward pass and nothing else. PyTorch does not always notice: a tangent that reaches a
custom operator is dropped, and the result looks constant. So

- while forward-mode differentiation or a transform of `torch.func` (``grad``, ``jvp``, ``vmap``, ...) is at work, the
  scans and the layers' element-wise parts are composed of PyTorch's own operations (`transformed`), which is slower;
- a backward pass that is to be differentiated itself (``create_graph=True``) computes its gradients by such a
  composition (`gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` is at work."""
    # Both are private names; there are no public ones. `_current_level` is -1 outside of `forward_ad.dual_level`.
    level: Any = forward_ad._current_level  # pyright: ignore[reportPrivateUsage]
    return level >= 0 or _untyped(torch._C)._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]


def twice() -> bool:
    """Inside a backward pass: whether its result is to be differentiated again."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()  # compiled graphs have no second derivative


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The backward pass of ``function``, differentiable: one gradient for each input, None where there is none.

    Args:
        function: composed of differentiable operations.
        inputs: its arguments; those that require a gradient get one.
        grads: of its outputs.
    """
    # One input may depend on another one. Views cut these paths: each gradient is a partial derivative.
    views = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
    outputs = function(*views)
    pairs = zip((outputs,) if isinstance(outputs, Tensor) else outputs, grads, strict=True)
    used = [(y, grad) for y, grad in pairs if grad is not None and y.requires_grad]
    wanted = [i for i, x in enumerate(views) if isinstance(x, Tensor) and x.requires_grad]
    found: list[Tensor | None] = [None] * len(views)
    if used and wanted:
        ys, given = zip(*used, strict=True)
        results = torch.autograd.grad(ys, [views[i] for i in wanted], given, create_graph=True, allow_unused=True)
        for i, result in zip(wanted, results, strict=True):
            found[i] = result
    return tuple(found)


def _untyped(module: Any) -> Any:
    return module


__all__ = ["gradients", "transformed", "twice"]
