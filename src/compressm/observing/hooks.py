"""The base of hooks that observe a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class OwnHook:
    """A hook that copies of the model do not inherit, since copies are not trained and must not be observed.

    A pickled model is a copy too. Without this, ``torch.save(model, path)`` would also write what is observed: inputs.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _idle, ()


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


def _idle() -> Callable[..., None]:
    """The hook that takes the place of one in a pickled model."""
    return _nothing


__all__ = ["OwnHook"]
