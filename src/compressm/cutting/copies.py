"""Copies of optimizer state, of tensor classes too that `copy.deepcopy` cannot copy."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def copied_state(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy of nested dicts, lists and tuples of tensors, numbers and random generators. All else is shared.

    Args:
        value: what to copy.
        memo: what to put in the place of some objects, by their ``id``.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        memo[id(value)] = new = _copied_tensor(value)
        return new
    if isinstance(value, dict):
        memo[id(value)] = new = copy.copy(value)
        new.clear()
        new.update({copied_state(key, memo): copied_state(one, memo) for key, one in value.items()})
        return new
    if isinstance(value, list):
        memo[id(value)] = new = list[Any]()
        new.extend(copied_state(one, memo) for one in value)
        return new
    if type(value) is tuple:
        return tuple(copied_state(one, memo) for one in value)
    if isinstance(value, (random.Random, np.random.Generator, set)):
        return copy.deepcopy(value)
    return value


def _copied_tensor(value: Tensor) -> Tensor:
    """A tensor of its own memory."""
    flatten = getattr(type(value), "__tensor_flatten__", None)
    if flatten is None:
        new = value.detach().clone()
        return nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
    names, settings = flatten(value)  # a wrapper of plain tensors, as torchao's
    inner = {name: _copied_tensor(getattr(value, name)) for name in names}
    with torch.no_grad():
        return type(value).__tensor_unflatten__(inner, settings, value.size(), value.stride())  # type: ignore[attr-defined]


__all__ = ["copied_state"]
