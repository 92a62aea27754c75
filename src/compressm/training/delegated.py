"""Attributes of an object that are stored in one of its parts."""

from __future__ import annotations

from typing import Any


def attribute_of(part: str, name: str) -> Any:
    """A property that reads and sets an attribute of one of the object's parts."""
    return property(
        lambda self: getattr(getattr(self, part), name),
        lambda self, value: setattr(getattr(self, part), name, value),
    )


__all__ = ["attribute_of"]
