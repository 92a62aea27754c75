"""The base of hooks that observe a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class OwnHook:
    """A hook that copies of the model do not inherit, since copies are not trained and must not be observed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


__all__ = ["OwnHook"]
