"""Folders that ``save_to_disk`` of Hugging Face's library datasets has written."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressm.errors import ConfigError, MissingExtraError
from compressm.observing.expected import role_of

_ENDINGS = {"train": "_train", "test": "_test", "validation": "_validation", "val": "_val", "valid": "_validation"}


def is_hf_datasets(path: Path) -> bool:
    """Whether ``save_to_disk`` has written a folder: of one data set, or of several splits."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def arrays_of(path: Path) -> dict[str, Any]:
    """Columns of known names as arrays, with the endings of `compressm.lab.data.files.SPLITS` where there are splits.

    Sequences of unequal length are padded with zeros, and their lengths told.

    Raises:
        ConfigError: it cannot be read, or holds no such column.
        MissingExtraError: datasets is not installed.
    """
    splits = _splits(path)
    columns = sorted({name for split in splits.values() for name in split.column_names})
    if not any(role_of(name) == "x" for name in columns):
        raise ConfigError(f"data {path} has the columns {', '.join(columns)}: name the sequences x and the labels y")
    found: dict[str, Any] = {}
    for ending, split in splits.items():
        values = split.with_format("numpy")[:]
        for name in split.column_names:
            if role_of(name) is not None:
                found |= _column(name, ending, values[name], path)
    return found


def texts_of(path: Path) -> Iterator[bytes]:
    """The rows of the column ``text``, each followed by a line's end.

    Raises:
        ConfigError: there is no such column.
        MissingExtraError: datasets is not installed.
    """
    splits = _splits(path)
    split = splits.get("_train") or next(iter(splits.values()))
    if "text" not in split.column_names:
        raise ConfigError(f"data {path} has the columns {', '.join(split.column_names)}: text was expected in 'text'")
    for row in split:
        yield f"{row['text']}\n".encode()


def has_text(path: Path) -> bool:
    """Whether a data set holds text."""
    return any("text" in split.column_names for split in _splits(path).values())


def _splits(path: Path) -> dict[str, Any]:
    """The data sets by the endings of their arrays' names."""
    try:
        datasets: Any = importlib.import_module("datasets")  # by name, since a module beside this one is called so too
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'data {path} was written by save_to_disk, which needs datasets: pip install "compressm[datasets]"'
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"data {path} cannot be read ({' '.join(str(error).split())}): save it again") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return {"": loaded}
    known = {_ENDINGS[name]: split for name, split in loaded.items() if name in _ENDINGS}
    if not known:
        raise ConfigError(f"data {path} has the splits {', '.join(loaded)}: name one of them train")
    return known


def _column(name: str, ending: str, values: Any, path: Path) -> dict[str, Any]:
    """One column as an array, and the lengths of its rows if they differ."""
    if not isinstance(values, np.ndarray) or values.dtype != object:
        return {name + ending: np.asarray(values)}
    if role_of(name) != "x":
        return {name + ending: np.array([str(value) for value in values])}
    rows = [np.stack(list(row)) if row.dtype == object else row for row in map(np.asarray, values)]
    if any(row.dtype.kind not in "biuf" or row.shape[1:] != rows[0].shape[1:] for row in rows):
        raise ConfigError(f"data {path}, column {name}: each row must be one sequence, (length, channels) or (length)")
    return {part + ending: values for part, values in padded(name, rows).items()}


def padded(name: str, rows: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Sequences as one array of this name, with zeros behind the shorter ones, and their ``lengths`` if they differ.

    NumPy has no such function. PyTorch's `pad_sequence` takes neither other byte orders nor several dtypes.
    """
    lengths = np.array([len(row) for row in rows])
    x = np.zeros((len(rows), int(lengths.max()), *rows[0].shape[1:]), np.result_type(*rows))
    for filled, row in zip(x, rows, strict=True):
        filled[: len(row)] = row
    return {name: x} if (lengths == lengths[0]).all() else {name: x, "lengths": lengths}


__all__ = ["arrays_of", "has_text", "is_hf_datasets", "padded", "texts_of"]
