"""Derivatives other than one backward pass: forward mode, `torch.func`, and gradients of gradients.

The compiled kernels support a single backward pass only. PyTorch does not always report other uses: a custom operator
drops tangents, and its result looks constant. Therefore

- under forward-mode differentiation or a transform of `torch.func` (``grad``, ``jvp``, ``vmap``, ...) the scans and the
  layers' element-wise parts are composed of PyTorch's own operations (`transformed`), which is slower;
- a backward pass that is itself differentiated (``create_graph=True``), or that receives tangents or a batch of `vmap`
  (`twice`), computes its gradients by such a composition (`gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` is active."""
    # Both names are private, since there are no public ones. `_current_level` is -1 outside of `forward_ad.dual_level`.
    level: Any = forward_ad._current_level  # pyright: ignore[reportPrivateUsage]
    return level >= 0 or _untyped(torch._C)._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]


def twice() -> bool:
    """Inside a backward pass: whether its result is to be differentiated again, or its input may be a dual number or a
    batch of `vmap`, even after an ordinary forward pass."""
    # Compiled graphs have no second derivative.
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed() or _gradients_batched())


def _gradients_batched() -> bool:
    """Whether `torch.autograd.grad` maps over gradients (``is_grads_batched=True``, `torch.autograd.functional`'s
    ``vectorize=True``). It uses an older `vmap`, whose level can only be read by incrementing it."""
    core = _untyped(torch._C)  # pyright: ignore[reportPrivateUsage]
    level: int = core._vmapmode_increment_nesting()
    core._vmapmode_decrement_nesting()
    return level > 1


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The backward pass of ``function``, differentiable: one gradient for each input, None where there is none.

    If gradients are disabled, as in a backward pass that only carries tangents, the result requires none.

    Args:
        function: composed of differentiable operations.
        inputs: its arguments; those that require a gradient get one.
        grads: gradients of its outputs.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # One input may depend on another. Views cut these paths, so that each gradient is a partial derivative.
        views = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
        outputs = function(*views)
    pairs = zip((outputs,) if isinstance(outputs, Tensor) else outputs, grads, strict=True)
    used = [(y, grad) for y, grad in pairs if grad is not None and y.requires_grad]
    wanted = [i for i, x in enumerate(views) if isinstance(x, Tensor) and x.requires_grad]
    found: list[Tensor | None] = [None] * len(views)
    if used and wanted:
        ys, given = zip(*used, strict=True)
        results = torch.autograd.grad(ys, [views[i] for i in wanted], given, create_graph=again, allow_unused=True)
        for i, result in zip(wanted, results, strict=True):
            found[i] = result
    return tuple(found)


def _untyped(module: Any) -> Any:
    return module


__all__ = ["gradients", "transformed", "twice"]
