"""Names of classes as the numbers that a model knows them by.

`compressm train` numbers names in order (`in_order`) and saves them with the model, so that every later command reads
the same names as the same classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compressm.errors import ConfigError
from compressm.runtime.warned import warn


def are_names(y: Any) -> bool:
    """Whether labels are text."""
    return not isinstance(y, Tensor) and np.asarray(y).dtype.kind in "USO"


def as_text(y: Any, where: str) -> NDArray[Any]:
    """Names as text, of the same shape.

    Raises:
        ConfigError: a sequence without a name.
    """
    names = np.asarray(y)
    if missing := [row for row, name in enumerate(names.reshape(-1).tolist()) if name is None or name != name]:
        raise ConfigError(f"{where} has no label for sequence {missing[0]}: leave that sequence out, or name its class")
    return names.astype(str)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Different names in alphabetical order; if all are whole numbers, in theirs."""
    different = sorted(set(names))
    return tuple(sorted(different, key=int)) if _are_numbers(different) else tuple(different)


def numbered(names: NDArray[Any], known: Sequence[str], where: str) -> NDArray[np.int64]:
    """The number of every name, its place among the known ones.

    Raises:
        ConfigError: a name that is not known.
    """
    places = {name: number for number, name in enumerate(known)}
    if strange := [name for name in in_order(names.reshape(-1).tolist()) if name not in places]:
        raise ConfigError(
            f"{where} holds the class {strange[0]!r}: the model was trained with {', '.join(known)}; leave its "
            "sequences out, or name them as in training"
        )
    return np.array([places[name] for name in names.reshape(-1).tolist()], np.int64).reshape(names.shape)


def guessed(names: NDArray[Any], classes: int, where: str) -> NDArray[np.int64]:
    """The numbers of names for a model that was saved without any, if they can be told.

    Args:
        names: of the data.
        classes: of the model; 0 if it is not known how many.
        where: what messages are to call the data.

    Raises:
        ConfigError: other names than there are classes.
    """
    known = in_order(names.reshape(-1).tolist())
    if _are_numbers(known):
        return names.astype(np.int64)
    if classes and len(known) != classes:
        raise ConfigError(
            f"{where} holds names ({', '.join(map(repr, known[:3]))}), {len(known)} of them: the model knows its "
            f"classes as 0 to {classes - 1}; save their numbers, in the order that the model was trained with"
        )
    warn(
        f"{where} holds names, and the model was saved without names of its classes: they are numbered in alphabetical "
        f"order, {', '.join(f'{name} = {number}' for number, name in enumerate(known[:5]))}"
        f"{', ...' if len(known) > 5 else ''}; if it was trained with another order, save their numbers",
    )
    return numbered(names, known, where)


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.removeprefix("-").isdecimal() for name in names)


__all__ = ["are_names", "as_text", "guessed", "in_order", "numbered"]
