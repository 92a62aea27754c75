"""Evidence as sums over tokens or sequences, which add over batches and over processes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar

from torch import Tensor

S = TypeVar("S", bound="Sums")


@dataclass(frozen=True)
class Sums:
    """Tensors that are sums. Those named in ``quadratic`` are sums of squares of weights or of their products. A sum
    that was not gathered is None."""

    quadratic: ClassVar[frozenset[str]] = frozenset()

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def plus(self: S, other: S, memory: float = 1.0) -> S:
        """``memory * self + other``. Older observations weigh less, since the model has changed in the meantime. Sums
        that are quadratic in the weights are multiplied by ``memory**2``."""
        return type(self)(
            **{
                name: (memory**2 if name in self.quadratic else memory) * value + getattr(other, name)
                for name, value in self.tensors().items()
            }
        )

    def after(self: S, before: Sums | None, memory: float = 1.0) -> S:
        """``memory * before + self``; just ``self`` if ``before`` is None or of a layer of another size."""
        if not isinstance(before, type(self)):
            return self
        mine, theirs = ({name: value.shape for name, value in one.tensors().items()} for one in (self, before))
        return before.plus(self, memory) if mine == theirs else self


__all__ = ["Sums"]
