"""Keeping automatic mixed precision out of the recurrences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(scan: F) -> F:
    """A scan that computes in its own precision under `torch.autocast` too: states sum up thousands of steps, and half
    precision cannot."""

    @functools.wraps(scan)
    def wrapped(u: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(u.device.type):
            return scan(u, *args, **kwargs)
        with torch.autocast(u.device.type, enabled=False):
            return scan(u, *args, **kwargs)

    return wrapped  # pyright: ignore[reportReturnType]
