"""The layers that `compressm.adapters.find_layers` leaves out, for the duration of a block."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import nn

_IDS: ContextVar[frozenset[int]] = ContextVar("left_out", default=frozenset())


@dataclass(frozen=True)
class Choice:
    """A choice of a model's layers.

    Attributes:
        left_out: the layers that were not chosen. They are neither observed nor cut, and nothing is asked of them.
    """

    left_out: tuple[nn.Module, ...] = ()

    @contextmanager
    def scope(self) -> Generator[None]:
        """Leave the layers out while the block runs."""
        token = _IDS.set(_IDS.get() | {id(layer) for layer in self.left_out})
        try:
            yield
        finally:
            _IDS.reset(token)


@contextmanager
def none_left_out() -> Generator[None]:
    """Leave out no layer while the block runs, whatever was chosen around it."""
    token = _IDS.set(frozenset())
    try:
        yield
    finally:
        _IDS.reset(token)


def is_left_out(layer: nn.Module) -> bool:
    """Whether a layer is left out now."""
    return id(layer) in _IDS.get()


__all__ = ["Choice", "is_left_out", "none_left_out"]
