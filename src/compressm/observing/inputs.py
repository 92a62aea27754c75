"""Convert the argument ``data=`` to calls of the model, for every function that takes data.

A **batch** is a tensor or array ``(batch, length, ...)``; or a tuple or list whose first element is one (the labels
after it are ignored); or a mapping of keyword arguments. **Data** are one batch or an iterable of batches:

- A tensor, an array or a mapping is one batch. It is never iterated, since that would give single sequences.
- A tuple or list of inputs followed by elements that cannot be inputs, such as labels, is one batch.
- A list of arrays of the same form holds one batch in each. A tuple of such arrays is ambiguous, and is refused.
- Any other iterable, such as a `DataLoader` or a generator, gives batches.

The model determines the form of a batch: see `compressm.observing.expected`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from compressm.errors import ConfigError
from compressm.observing.expected import (
    Expected,
    by_role,
    described,
    is_array,
    lengths_of,
    numeric,
    one_hot_rows,
    prepared,
)


@dataclass(frozen=True)
class Call:
    """A call of the model: its prepared arguments."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __call__(self, model: nn.Module) -> Any:
        """Call the model and return its output."""
        return model(*self.args, **self.kwargs)


def calls(model: nn.Module, data: Any) -> Iterator[Call]:
    """The calls of a model for some data, one per batch; see the module's text.

    Args:
        model: the model. It is not called here, only its expected input is determined.
        data: one batch, or an iterable of batches.

    Raises:
        ConfigError: data without a batch, or that the model cannot take.
    """
    for call, _ in calls_and_batches(model, data):
        yield call


def calls_and_batches(model: nn.Module, data: Any) -> Iterator[tuple[Call, Any]]:
    """As `calls`, each with the batch that it was made of."""
    expected, count = Expected.of(model), 0
    for batch in _batches(expected, data):
        yield call_of(expected, batch, f"batch {count} of data"), batch
        count += 1
    if not count:
        raise ConfigError(
            "data hold no batch: pass one, or an iterable of them; an iterator that has been used up gives none"
        )


def call_of(expected: Expected, batch: Any, where: str) -> Call:
    """The call for one batch.

    Args:
        expected: the model's expectations.
        batch: see the module's text.
        where: the batch's name in messages.

    Raises:
        ConfigError: it is not a batch for this model.
    """
    if isinstance(batch, PackedSequence):
        raise ConfigError(
            f"{where} is a PackedSequence: pass what pad_packed_sequence(..., batch_first=True) makes of it, as "
            "{'u': inputs, 'lengths': lengths}"
        )
    if isinstance(batch, Mapping):
        return _named(expected, cast("Mapping[str, Any]", batch), where)
    if isinstance(batch, list | tuple):
        parts = cast("list[Any]", list(batch))  # pyright: ignore[reportUnknownArgumentType]
        if parts and is_array(parts[0]):
            if expected.own and len(parts) > 2:
                raise ConfigError(
                    f"{where} has {len(parts)} parts, and only the inputs and labels have a place: name them, "
                    f"{{'{expected.argument}': inputs, 'lengths': lengths}}"
                )
            batch = parts[0]
    if not is_array(batch):
        raise ConfigError(f"{where} is {described(batch)}: {expected.form}; pass a tensor or an array of that shape")
    x = prepared(expected, batch, where)
    return Call((), {expected.argument: x}) if expected.argument else Call((x,))


def refuse_files(data: Any) -> None:
    """Refuse the name of a file in place of data, also where a model would not need them.

    Raises:
        ConfigError: ``data`` is text, bytes or a path.
    """
    if isinstance(data, str | bytes | Path):
        raise ConfigError(
            f"data is {described(data)}: pass tensors or batches of them; files are read by compressm analyze and "
            "compressm compress"
        )


def _batches(expected: Expected, data: Any) -> Iterable[Any]:
    refuse_files(data)
    if is_array(data) or isinstance(data, Mapping | PackedSequence):
        return [data]
    if isinstance(data, list | tuple) and _is_one_batch(expected, cast("Any", data)):
        return [data]
    try:
        return iter(data)
    except TypeError as error:
        raise ConfigError(
            f"data is {described(data)}: pass a batch, or an iterable of batches; {expected.form}"
        ) from error


def _is_one_batch(expected: Expected, data: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a list or tuple is one batch of inputs with labels, not several batches."""
    if len(data) < 2 or not is_array(data[0]):
        return False
    first, rest = data[0], data[1:]
    if any(
        isinstance(part, Mapping) or (isinstance(part, list | tuple) and part and is_array(part[0])) for part in rest
    ):
        return False  # batches of several forms
    if not all(is_array(part) for part in rest):
        return True
    if any(_is_one_hot(part, len(first), expected.classes) for part in rest):
        return True
    if any(not _alike(first, part) for part in rest):
        labels = isinstance(data, tuple) or all(
            part.ndim < first.ndim for part in rest
        )  # otherwise an element is a batch of its own that does not fit
        return labels and all(part.ndim == 0 or len(part) == len(first) for part in rest)
    if isinstance(data, tuple):
        raise ConfigError(
            f"data is a tuple of {len(data)} arrays of like shape, {tuple(first.shape)}, which may be inputs and "
            "labels or several batches: pass [(inputs, labels)] for the one, a list of arrays for the other"
        )
    return False


def _alike(a: Any, b: Any) -> bool:
    """Whether both could be the input of one model."""
    floating = [str(x.dtype).removeprefix("torch.").startswith(("float", "bfloat")) for x in (a, b)]
    return a.ndim == b.ndim and floating[0] == floating[1] and tuple(a.shape[2:]) == tuple(b.shape[2:])


def _is_one_hot(value: Any, count: int, classes: int) -> bool:
    if not classes or tuple(value.shape) != (count, classes):
        return False
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
        return False
    return one_hot_rows(value)


def _named(expected: Expected, batch: Mapping[str, Any], where: str) -> Call:
    """The call for a batch of named arrays."""
    if expected.own:
        return _own_call(expected, batch, where)
    if expected.keywords and (unknown := [str(key) for key in batch if key not in expected.keywords]):
        raise ConfigError(
            f"{where} has {', '.join(unknown)}, which {expected.model}.forward does not take: it takes "
            f"{', '.join(sorted(expected.keywords))}"
        )
    if expected.argument and not {expected.argument, "inputs_embeds"} & set(batch):
        raise ConfigError(f"{where} has {', '.join(map(str, batch))}: expected {expected.argument}; {expected.form}")
    kwargs: dict[str, Any] = {}
    for key, value in batch.items():
        if expected.argument and key == expected.argument:
            value = prepared(expected, value, f"{key} in {where}")
        elif is_array(value):
            value = numeric(expected, value, f"{key} in {where}").to(expected.device)
        elif isinstance(value, str | bytes | list):
            raise ConfigError(f"{key} in {where} is {described(value)}: pass tensors or arrays only")
        kwargs[str(key)] = value
    return Call((), kwargs)


def _own_call(expected: Expected, batch: Mapping[str, Any], where: str) -> Call:
    found = by_role(batch, where)
    if "x" not in found:
        names = ", ".join(map(str, batch)) or "no entries"
        raise ConfigError(f"{where} has {names}: name the inputs {expected.argument}; {expected.form}")
    lengths = lengths_of(found, where)
    x = prepared(expected, found["x"], where, lengths)
    kwargs = {expected.argument: x}
    return Call((), kwargs if lengths is None else {**kwargs, "lengths": lengths.to(expected.device)})


__all__ = ["Call", "call_of", "calls", "refuse_files"]
