"""Sequences and labels from files of arrays; `compressm.lab.data.files` says which files and folders.

The arrays of an ``.npz`` file are found by their names (``x``, ``inputs``, ``tokens`` and so on; ``y``, ``labels``,
``targets``; ``lengths`` or ``mask``; in upper case too, and with a common ending such as ``_train``), or in the order
in which `numpy.savez` got them without names. Arrays of other names are not looked at. Labels are converted to classes
0 to n - 1 where their meaning is clear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressm.errors import ConfigError
from compressm.lab.data.class_names import are_names, as_text, guessed, numbered
from compressm.observing.expected import (
    Expected,
    by_role,
    described,
    lengths_of,
    numeric,
    one_hot_rows,
    prepared,
    role_of,
)

_TAKEN = ("", "_val", "_validation", "_train", "_test")  # endings of splits, the one to take first


@dataclass(frozen=True)
class Arrays:
    """What a file holds, as the model takes it.

    Attributes:
        x: sequences, shape ``(N, length, channels)`` or ``(N, length)``.
        y: labels, int64, shape ``(N,)``, or for models that compressm does not know of any shape and type; None where
            they were not asked for, or there are none.
        lengths: of the sequences, where rows are padded, int64, shape ``(N,)``.
    """

    x: Tensor
    y: Tensor | None = None
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, expected: Expected, start: int, stop: int) -> dict[str, Tensor]:
        """Some of the sequences as keyword arguments of the model."""
        inputs = {expected.argument: self.x[start:stop]}
        if self.lengths is None:
            return inputs
        lengths = self.lengths[start:stop]
        if expected.own or "lengths" in expected.keywords:
            return inputs | {"lengths": lengths}
        if expected.kind == "anything" and "attention_mask" not in expected.keywords:
            raise ConfigError(
                f"the data are padded, and {expected.model}.forward takes neither lengths nor attention_mask: give it "
                "one of these arguments, or sequences of one length"
            )
        within = torch.arange(self.x.shape[1]) < lengths[:, None]
        return inputs | {"attention_mask": within.long()}


def arranged(
    content: Mapping[str, Any], expected: Expected, labelled: bool, where: str, class_names: Sequence[str] | None = None
) -> Arrays:
    """Named arrays as the model takes them. Of several splits the validation split is taken, else that for training.

    Args:
        content: the arrays.
        expected: by the model.
        labelled: whether the labels are needed.
        where: what messages are to call the data.
        class_names: that the model was trained with, by number; None if they are not known.

    Raises:
        ConfigError: they are something else.
    """
    found = _found(content, where)
    lengths = lengths_of(found, where)
    x = prepared(_on_cpu(expected), found["x"], f"x in {where}", lengths)
    if not labelled or (not expected.classes and "y" not in found):
        return Arrays(x, None, lengths)
    if "y" not in found:
        raise ConfigError(f"{where} holds no labels: save them as y, shape ({len(x)},), to measure the loss on")
    y, what = found["y"], f"y in {where}"
    if are_names(y):
        names = as_text(y, what)
        y = guessed(names, expected.classes, what) if class_names is None else numbered(names, class_names, what)
    if not expected.classes:
        return Arrays(x, _targets(expected, y, len(x), what), lengths)
    return Arrays(x, labels(y, expected.classes, len(x), what), lengths)


def labels(y: Any, classes: int, count: int, where: str) -> Tensor:
    """Labels as classes, 0 to ``classes - 1``, int64, shape ``(count,)``.

    These forms are understood: whole numbers of any type; one column of them; one-hot rows; and
    numbers from 1 to ``classes``, if every one occurs.

    Args:
        y: array or tensor.
        classes: of the model.
        count: of sequences.
        where: what messages are to call it.

    Raises:
        ConfigError: their meaning is not clear.
    """
    values = numeric(Expected("the model"), y, where)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if tuple(values.shape) not in ((count,), (count, classes)):
        raise ConfigError(
            f"{where} has shape {tuple(values.shape)}: expected one label for each of the {count} sequences, shape "
            f"({count},), or one-hot rows, ({count}, {classes})"
        )
    if values.ndim == 2:
        return _from_one_hot(values, where)
    if values.is_floating_point() and not bool((values == values.round()).all()):
        odd = values[values != values.round()][0]
        raise ConfigError(
            f"{where} holds {float(odd):g}: labels must be classes, whole numbers from 0 to {classes - 1}"
        )
    whole = values.long()
    if bool((whole >= 0).all() & (whole < classes).all()):
        return whole
    kinds = whole.unique().tolist()
    if kinds == list(range(1, classes + 1)):
        return whole - 1
    raise ConfigError(
        f"{where} holds labels from {kinds[0]} to {kinds[-1]}: the model's {classes} classes are 0 to {classes - 1}; "
        "number them in the order that the model was trained with"
    )


def _targets(expected: Expected, y: Any, count: int, where: str) -> Tensor:
    """Labels of a model of no known classes: classes, int64, or numbers in the model's dtype."""
    values = numeric(expected, y, where)
    if values.ndim == 0 or len(values) != count:
        raise ConfigError(f"{where} has shape {tuple(values.shape)}: expected one label for each of {count} sequences")
    return values if values.is_floating_point() else values.long()


def _is_x(name: str, ending: str) -> bool:
    return name.lower().endswith(ending) and role_of(name[: len(name) - len(ending)]) == "x"


def _on_cpu(expected: Expected) -> Expected:
    return replace(expected, device=torch.device("cpu"))


def _found(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arrays by what they are for."""
    positional = [f"arr_{i}" for i in range(len(content))]
    if 1 <= len(content) <= 2 and sorted(content) == positional:
        return dict(zip(("x", "y"), (content[name] for name in positional), strict=False))
    ending = next((e for e in _TAKEN if any(_is_x(name, e) for name in content)), "")
    plain = {name[: len(name) - len(ending)]: value for name, value in content.items() if name.lower().endswith(ending)}
    found = by_role({name: value for name, value in plain.items() if role_of(name) is not None}, where)
    if "x" not in found:
        named = ", ".join(f"{name} ({described(value)})" for name, value in content.items()) or "nothing"
        raise ConfigError(f"{where} holds {named}: name the sequences x and the labels y")
    return found


def _from_one_hot(values: Tensor, where: str) -> Tensor:
    if not one_hot_rows(values):
        raise ConfigError(f"{where} has rows that are not one-hot: give one 1 in each and 0 elsewhere, or the classes")
    return (values == 1).long().argmax(1)


__all__ = ["Arrays", "arranged", "labels"]
