"""Arrays from files of every kind that data come in: ``.npz``, ``.npy``, ``.csv``, ``.parquet``, and folders of them.

- ``.npz``: arrays by name, see `compressm.lab.data.arrays`. ``.npy``: the sequences alone.
- ``.csv``, ``.parquet``: one sequence per row, one step per column, with a header. A column named ``y``, ``label`` or
  ``target`` holds the labels.
- A folder that ``save_to_disk`` of the library datasets has written: its columns by name, its splits by theirs.
- A folder with ``x.npy`` and ``y.npy`` (or ``x_train.npy`` and so on): arrays by name, as in an ``.npz``.
- Any other folder: one sequence per file, rows are steps and columns channels. If the files lie in subfolders, each
  subfolder is a class, and its name the label; none may be empty. Shorter sequences are padded with zeros,
  and their lengths told.
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressm.errors import ConfigError, MissingExtraError
from compressm.lab.data.hf_datasets import arrays_of, has_text, is_hf_datasets, padded
from compressm.observing.expected import role_of

SUFFIXES = (".npz", ".npy", ".csv", ".parquet")
SPLITS = ("_train", "_test", "_val", "_validation")
Content = dict[str, Any]


def is_data(path: Path) -> bool:
    """Whether a file or folder holds arrays, and not text: by its content, or the endings ``.csv`` and ``.parquet``.

    Raises:
        ConfigError: it cannot be read.
    """
    if is_hf_datasets(path):
        return not has_text(path)
    if path.is_dir():
        return any(file.suffix in SUFFIXES for file in path.rglob("*"))
    try:
        with path.open("rb") as file:
            return file.read(6) == b"\x93NUMPY" or path.suffix in (".csv", ".parquet") or zipfile.is_zipfile(file)
    except OSError as error:
        raise ConfigError(f"data {path} cannot be read: {error.strerror}") from error


def read_content(path: Path) -> Content:
    """The arrays of a file or folder by name; see the module's text.

    Raises:
        ConfigError: it cannot be read, or holds something else.
        MissingExtraError: a ``.parquet`` file without pyarrow, or a folder of datasets without datasets.
    """
    if is_hf_datasets(path):
        return arrays_of(path)
    if path.is_dir():
        return _folder(path)
    if path.suffix in (".csv", ".parquet"):
        return _sequences_of(_table(path), f"data {path}")
    return _numpy(path)


def _numpy(path: Path) -> Content:
    where = f"data {path}"
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        return {"x": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{where} cannot be read ({' '.join(str(error).split())}): save plain arrays of numbers in it"
        ) from error


def _table(path: Path) -> dict[str, NDArray[Any]]:
    """The columns of a table by name."""
    return _csv(path) if path.suffix == ".csv" else _parquet(path)


def _csv(path: Path) -> dict[str, NDArray[Any]]:
    where = f"data {path}"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{where} cannot be read ({error}): a table of numbers in UTF-8 was expected") from error
    if len(rows) < 2:
        raise ConfigError(f"{where} has {len(rows)} lines: a header and at least one row of numbers were expected")
    header, body = rows[0], rows[1:]
    if _are_numbers(header):
        raise ConfigError(f"{where} begins with numbers: write the names of the columns in its first line")
    for number, row in enumerate(body, 2):
        if len(row) != len(header):
            raise ConfigError(f"{where}, line {number}: {len(row)} values, and the header names {len(header)} columns")
    columns = zip(*body, strict=True)
    return {
        name.strip(): _column(values, f"{where}, column {name}") for name, values in zip(header, columns, strict=True)
    }


def _are_numbers(values: Sequence[str]) -> bool:
    try:
        [float(value) for value in values]
    except ValueError:
        return False
    return True


def _column(values: Sequence[str], where: str) -> NDArray[Any]:
    try:
        return np.array([int(value) for value in values])
    except ValueError:
        pass
    for number, value in enumerate(values, 2):
        if not value.strip():
            raise ConfigError(f"{where}, line {number}: there is no value; leave the column or the row out")
    for number, value in enumerate(values, 2):
        if not _are_numbers([value]):
            if role_of(where.rpartition(" ")[2]) == "y":
                return np.array(values)  # names of classes
            raise ConfigError(f"{where}, line {number}: {value!r} is no number; leave the column or the row out")
    return np.array([float(value) for value in values])


def _parquet(path: Path) -> dict[str, NDArray[Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError('a .parquet file needs pyarrow: pip install "compressm[parquet]"') from error
    try:
        table: Any = parquet.read_table(path)
    except (OSError, ValueError, ArrowException) as error:
        raise ConfigError(f"data {path} cannot be read ({' '.join(str(error).split())}): is it Parquet?") from error
    found = {str(name): table.column(name).to_numpy() for name in table.column_names}
    for name, column in found.items():
        if column.dtype.kind not in "biuf" and role_of(name) != "y":
            raise ConfigError(f"data {path}, column {name}: not plain numbers; give one column per step")
    return found


def _sequences_of(columns: Mapping[str, NDArray[Any]], where: str) -> Content:
    """Rows of a table as sequences of one channel, with the labels if a column holds them."""
    steps = [column for name, column in columns.items() if role_of(name) not in ("y", "lengths")]
    if not steps:
        raise ConfigError(f"{where} has the columns {', '.join(columns)}: one column per step was expected")
    named = {role: values for name, values in columns.items() if (role := role_of(name)) in ("y", "lengths")}
    return {"x": np.stack(steps, 1), **named}


def _folder(path: Path) -> Content:
    where = f"data {path}"
    own = [file for file in _visible(path) if file.suffix in SUFFIXES]
    named = {file.stem: file for file in own if file.suffix == ".npy" and _is_role(file.stem)}
    if any(role_of(_plain(name)) == "x" for name in named):
        return {name: _numpy(file)["x"] for name, file in named.items()}
    if len(own) == 1 and own[0].suffix == ".npz":
        return _numpy(own[0])
    if own:
        _refuse_classes_beside(own, _classes(path), where)
        return _padded([_steps(file) for file in own], own, where)
    groups = _classes(path)
    if not any(groups.values()):
        raise ConfigError(f"{where} holds no {', '.join(SUFFIXES)} files, nor subfolders of them: check the path")
    for folder, group in groups.items():
        if not group:
            raise ConfigError(
                f"{where}: the subfolder {folder} holds no {', '.join(SUFFIXES)} file, and each subfolder is a class; "
                "put its sequences there, or delete it"
            )
    # By turns, since some commands look at the first sequences only.
    turns = [zip(groups, turn, strict=True) for turn in zip_longest(*groups.values())]
    labelled = [(name, file) for turn in turns for name, file in turn if file is not None]
    names, files = [name for name, _ in labelled], [file for _, file in labelled]
    return {**_padded([_steps(file) for file in files], files, where), "y": np.array(names)}


def _classes(path: Path) -> dict[str, list[Path]]:
    """The sequences in every subfolder, by its name."""
    folders = [folder for folder in _visible(path) if folder.is_dir()]
    return {folder.name: [file for file in _visible(folder) if file.suffix in SUFFIXES] for folder in folders}


def _refuse_classes_beside(own: Sequence[Path], classes: Mapping[str, Sequence[Path]], where: str) -> None:
    if full := [folder for folder, files in classes.items() if files]:
        raise ConfigError(
            f"{where} holds sequences both in itself ({own[0].name}) and in the subfolder {full[0]}: put each into the "
            "subfolder of its class, or all of them into one folder"
        )


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, in alphabetical order, without the hidden files and folders that systems and editors add."""
    return [one for one in sorted(folder.iterdir()) if not one.name.startswith(".")]


def _steps(file: Path) -> NDArray[Any]:
    """One sequence: shape ``(length, channels)``, or ``(length,)`` for tokens."""
    if file.suffix in (".csv", ".parquet"):
        return np.stack(list(_table(file).values()), 1)
    content = _numpy(file)
    if len(content) != 1:
        raise ConfigError(f"data {file} holds {len(content)} arrays: in a folder each file is one sequence")
    return next(iter(content.values()))


def _padded(sequences: Sequence[NDArray[Any]], files: Sequence[Path], where: str) -> Content:
    first = sequences[0]
    for sequence, file in zip(sequences, files, strict=True):
        if sequence.ndim not in (1, 2) or sequence.shape[1:] != first.shape[1:]:
            raise ConfigError(
                f"{where}: {file.name} has shape {sequence.shape}, and {files[0].name} {first.shape}: each file must "
                "be one sequence, (length, channels), with equal channels"
            )
        if not len(sequence):
            raise ConfigError(f"{where}: {file.name} holds a sequence of no steps: leave it out")
    return padded("x", sequences)


def _plain(name: str) -> str:
    ending = next((ending for ending in SPLITS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def _is_role(name: str) -> bool:
    return role_of(_plain(name)) is not None


__all__ = ["SPLITS", "SUFFIXES", "Content", "is_data", "read_content"]
