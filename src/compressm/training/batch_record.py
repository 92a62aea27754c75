"""Records which batches a model is trained on, so that trainings can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_RECORDED = 64  # so many of the first batches


class BatchRecord:
    """Checksums of the first inputs of a model in training mode, and how many there were. A context manager.

    Where a model's training calls a part of it and not the model itself, as in Lightning, the part is observed.

    Args:
        model: is only observed.
        called: is called with every input.

    Attributes:
        calls: number of inputs.
        checksums: of the first of them.
    """

    def __init__(self, model: nn.Module, called: Callable[[], None]) -> None:
        self._model, self._called = model, called
        self._observed: nn.Module | None = None
        self._hooks: list[Any] = []
        self.calls, self.checksums = 0, tuple[float, ...]()

    def __enter__(self) -> BatchRecord:
        for module in (self._model, *self._model.children()):
            self._hooks.append(module.register_forward_pre_hook(self._look, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        self._observed = self._observed or module  # the first one that is called, which has the others in it
        if module is not self._observed:
            return
        self.calls += 1
        if len(self.checksums) < _RECORDED:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.checksums += (sum(_checksum(one) for one in tensors),)
        self._called()


def _checksum(tensor: Tensor) -> float:
    """A number that depends on the entries and on their order."""
    values = tensor.detach().abs() if tensor.is_complex() else tensor.detach()
    values = values.reshape(-1).double()
    return float(values @ torch.linspace(1, 2, len(values), dtype=torch.float64, device=values.device))


__all__ = ["BatchRecord"]
