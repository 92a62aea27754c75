"""Copies of modules."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def copied_module(module: Module) -> Module:
    """A deep copy of a module. Tensors that a forward pass has left in it are copied without their graph.

    Examples are the states that transformers' RecurrentGemma keeps in its layers, which `copy.deepcopy` refuses.
    """
    left: dict[int, Tensor] = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(module, {**left})


__all__ = ["copied_module"]
