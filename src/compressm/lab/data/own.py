"""Data of the user's own: what a function returns, as named arrays; and a data set to train on, made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from compressm.errors import ConfigError
from compressm.lab.data.class_names import are_names, as_text, in_order, numbered
from compressm.lab.data.files import SPLITS, Content, is_data, read_content
from compressm.lab.data.hf_datasets import is_hf_datasets
from compressm.lab.data.language import text_data
from compressm.lab.data.sequences import SequenceData, Split, Task
from compressm.lab.named import call_named, is_named
from compressm.observing.expected import by_role, described, is_array, lengths_of, one_hot_rows, role_of

_FORMS = (
    "return (x, y), a mapping {'x': ..., 'y': ...}, a torch Dataset, or batches (x, y); x of shape "
    "(N, length, channels), or (N, length) for tokens"
)


def own_content(source: str, key: str = "--data") -> Content:
    """Named arrays from ``package.module:function``, or from a file or folder.

    Args:
        source: either of them.
        key: what messages begin with.

    Raises:
        ConfigError: neither, or what holds no arrays.
    """
    if is_named(source) and not Path(source).exists():
        return content_of(call_named(source, key), f"{key} {source}")
    path = Path(source)
    if not is_data(path):
        raise ConfigError(
            f"{key} {path}: no .npz, .npy, .csv or .parquet file, nor a folder of them; save one with "
            "numpy.savez(file, x=..., y=...), x of shape (N, length, channels), or (N, length) for tokens, and y of "
            "shape (N,)"
        )
    return read_content(path)


def content_of(value: Any, where: str) -> Content:
    """Named arrays from what a function of the user's returned.

    Raises:
        ConfigError: none of the forms that are understood.
    """
    if isinstance(value, Mapping):
        return {str(key): one for key, one in cast("Mapping[Any, Any]", value).items()}
    if is_array(value):
        return {"x": value}
    if isinstance(value, tuple | list) and len(value) == 2 and is_array(value[0]) and _one_each(*value):  # pyright: ignore[reportUnknownArgumentType]
        return {"x": value[0], "y": value[1]}
    if hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, str | list | tuple):
        value = [
            [(part if is_array(part) else np.asarray(part))[None] for part in _parts(value[i], where)]
            for i in range(len(value))
        ]
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ConfigError(f"{where} returned {described(value)}: {_FORMS}")
    batches = [_parts(batch, where) for batch in cast("Iterable[Any]", value)]
    if not batches:
        raise ConfigError(f"{where} returned no batch: {_FORMS}")
    try:
        columns = [torch.cat([torch.as_tensor(part) for part in parts]) for parts in zip(*batches, strict=True)]
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} returned batches that do not fit together ({error}): {_FORMS}") from error
    return dict(zip(("x", "y"), columns, strict=False))


def _one_each(x: Any, y: Any) -> bool:
    return hasattr(y, "__len__") and len(x) == len(y)


def _parts(item: Any, where: str) -> list[Any]:
    """Inputs and labels of one item or batch."""
    if isinstance(item, Mapping):
        found = by_role({str(key): value for key, value in cast("Mapping[Any, Any]", item).items()}, where)
        return [found[role] for role in ("x", "y") if role in found]
    if is_array(item):
        return [item]
    if isinstance(item, tuple | list) and len(item) == 2 and is_array(item[0]):
        return list(cast("Iterable[Any]", item))
    raise ConfigError(f"{where} returned {described(item)} in a place of a sequence: {_FORMS}")


def own_data(source: str, validation: float, task: Task | None = None, max_length: int | None = None) -> SequenceData:
    """A data set to train on. Numbers are taken as they are, without normalisation.

    Where there is no test split (``x_test``, ``y_test``), a fifth (of each class) is the test data; where there is no
    validation split, a share of the rest.

    Args:
        source: ``package.module:function``, a file or a folder; see `compressm.lab.data.files`.
        validation: share of the training data that is held out for validation.
        task: what is learnt; None to tell it by the data: text is for language models, labels that are whole numbers or
            names are classes, and others are numbers to predict.
        max_length: of text: bytes per sequence, 256 by default.

    Raises:
        ConfigError: no such data, or what nothing can be learnt from.
    """
    if _is_text(source):
        if task not in (None, "language"):
            raise ConfigError(f"data.task = {task!r}: {source} is text, which language models learn; leave it out")
        return text_data(Path(source), max_length or 256, validation)
    if task == "language":
        raise ConfigError(f"data.task = 'language': {source} is no text; give a text file or a folder of .txt files")
    where = f"data.source = {source!r}"
    content = own_content(source, "data.source")
    parts = _by_split(content)
    names = None if task == "regression" else _class_names(parts)
    splits = _splits(parts, names, where, task)
    train, test = splits.pop("_train", None) or splits.pop("", None), splits.pop("_test", None)
    held_out = splits.pop("_val", None) or splits.pop("_validation", None)
    if train is None:
        raise ConfigError(f"{where} holds {', '.join(content) or 'nothing'}: name the sequences x and the labels y")
    if not train.y.is_floating_point() and len(labels := train.y.unique()) == 1:
        raise ConfigError(f"y in {where} is {int(labels)} in every sequence: nothing is to be learnt from one class")
    if test is None:
        train, test = _divided(train, 0.2, where)
    if held_out is None:
        train, held_out = _divided(train, validation, where)
    every = (train, held_out, test)
    if train.y.is_floating_point():
        task, outputs = "regression", train.y.shape[-1]
        if len({split.y.shape[1:2] for split in every if split.y.ndim == 3} | {train.y.shape[1:2]}) > 1:
            raise ConfigError(f"y in {where} has one number per step in some splits only: give the same in each")
    else:
        task, outputs = "classification", 1 + max(int(split.y.max()) for split in every)
    vocabulary = None
    if not train.x.is_floating_point():
        vocabulary = 1 + max(int(split.x.max()) for split in every)
    channels = train.x.shape[2]
    label = Path(source).stem if Path(source).exists() else source
    scale = torch.zeros(channels), torch.ones(channels)
    names = names if task == "classification" else None
    return SequenceData(label, *every, *scale, outputs, vocabulary, padding=None, task=task, class_names=names)


def _is_text(source: str) -> bool:
    """Whether it is a file or folder of text."""
    path = Path(source)
    if not path.exists() or is_data(path):
        return False
    return path.suffix == ".txt" or is_hf_datasets(path) or (path.is_dir() and any(path.rglob("*.txt")))


def _by_split(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arrays of every split, by its ending; an empty one for arrays without."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        ending = next((ending for ending in SPLITS if name.lower().endswith(ending)), "")
        plain = name[: len(name) - len(ending)]
        if role_of(plain) is not None:
            found.setdefault(ending, {})[plain] = value
    return found


def _splits(
    parts: Mapping[str, dict[str, Any]], names: tuple[str, ...] | None, where: str, task: Task | None
) -> dict[str, Split]:
    """The splits by their endings. What the data are, tokens or measurements, classes or numbers, is told by all.

    Raises:
        ConfigError: a split that nothing can be learnt from, or splits of different channels or outputs.
    """
    named = parts if names is None else _numbered(parts, names)
    found = {ending: _split(part, f"{where}{ending and f' ({ending[1:]})'}", task) for ending, part in named.items()}
    if task is None and len({split.y.is_floating_point() for split in found.values()}) > 1:
        return _splits(parts, None, where, "regression")
    if any(split.x.is_floating_point() for split in found.values()):
        found = {ending: replace(split, x=split.x.float()) for ending, split in found.items()}
    for what, sizes in {
        "channels of x": {split.x.shape[2] for split in found.values()},
        "numbers to predict": {split.y.shape[-1] for split in found.values() if split.y.is_floating_point()},
    }.items():
        if len(sizes) > 1:
            raise ConfigError(
                f"{where}: the splits have different {what} ({', '.join(map(str, sorted(sizes)))}): give the same in "
                "train, validation and test"
            )
    return found


def _class_names(parts: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...] | None:
    """The names of classes in all splits, in order; None if labels are numbers."""
    named = [
        as_text(value, f"{key}{ending}")
        for ending, part in parts.items()
        for key, value in part.items()
        if role_of(key) == "y" and are_names(value)
    ]
    return in_order(name for one in named for name in one.reshape(-1).tolist()) if named else None


def _numbered(parts: Mapping[str, dict[str, Any]], names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The arrays of every split, with names of classes as numbers, the same in all splits."""

    def number(key: str, value: Any, where: str) -> Any:
        spelled = role_of(key) == "y" and are_names(value)
        return numbered(as_text(value, where), names, where) if spelled else value

    return {
        ending: {key: number(key, value, f"{key}{ending}") for key, value in part.items()}
        for ending, part in parts.items()
    }


def _split(content: Mapping[str, Any], where: str, task: Task | None) -> Split:
    found = by_role(content, where)
    if "x" not in found or "y" not in found:
        raise ConfigError(f"{where} holds {', '.join(content)}: training needs sequences, x, and their labels, y")
    x, y = _tensor(found["x"], f"x in {where}"), _targets(found["y"], f"y in {where}", task)
    if x.ndim == 2:
        x = x[..., None]
    if x.ndim != 3 or 0 in x.shape:
        raise ConfigError(
            f"x in {where} has shape {tuple(x.shape)}: expected (N, length, channels), or (N, length) for tokens or "
            "one channel"
        )
    if len(y) != len(x):
        raise ConfigError(f"{where} holds {len(x)} sequences and {len(y)} labels: one label for each was expected")
    if y.ndim == 2 and y.shape == x.shape[:2] and y.shape[1] > 1:
        y = y[..., None]  # one number per step
    if y.ndim == 3 and y.shape[1] != x.shape[1]:
        raise ConfigError(
            f"y in {where} has shape {tuple(y.shape)}: numbers per step need as many steps as x, {x.shape[1]}"
        )
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise ConfigError(f"x in {where} holds NaN or infinity: mend or leave out those sequences")
    if not x.is_floating_point() and (x.shape[2] > 1 or int(x.min()) < 0):
        x = x.float()  # whole numbers with a sign or of several channels are measurements
    lengths = lengths_of(found, where)
    if lengths is not None and not x.is_floating_point():
        raise ConfigError(
            f"{where} holds tokens of unequal length: cut or fill them to one length, and leave lengths out"
        )
    return Split(x, y, lengths)


def _tensor(value: Any, where: str) -> Tensor:
    try:
        tensor = torch.as_tensor(value if isinstance(value, Tensor) else np.ascontiguousarray(value))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} is {described(value)}: pass numbers") from error
    if tensor.is_complex():
        raise ConfigError(f"{where} is complex: pass its real and imaginary parts as channels")
    return tensor.float() if tensor.is_floating_point() else tensor.long()


def _targets(value: Any, where: str, task: Task | None) -> Tensor:
    """Labels: classes, int64 of shape ``(N,)``; or numbers, float32 of shape ``(N, outputs)`` or per step."""
    array = value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    numbers = array.dtype.kind == "f" and ((array.ndim > 1 and array.shape[1:] != (1,)) or bool((array % 1 != 0).any()))
    if task == "classification" or (task is None and (not numbers or _is_one_hot(array))):
        return _classes(array, where)
    if array.dtype.kind not in "biuf" or array.ndim not in (1, 2, 3) or not np.isfinite(array).all():
        raise ConfigError(
            f"{where} is {described(value)}: to predict numbers give finite ones, of shape (N,), (N, outputs) or "
            "(N, length, outputs)"
        )
    found = torch.from_numpy(array.astype(np.float32))
    return found[:, None] if found.ndim == 1 else found


def _classes(array: np.ndarray[Any, Any], where: str) -> Tensor:
    """Classes from 0, as they are, or in one-hot rows."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if _is_one_hot(array):
        array = array.argmax(1)
    numbers = array.ndim == 1 and array.dtype.kind in "biuf"
    if not numbers or (array != array.astype(np.int64)).any() or array.min(initial=0) < 0:
        raise ConfigError(
            f"{where} is {described(array)}: give each sequence a class, a whole number from 0 or a name; or say "
            "data.task=regression to predict numbers"
        )
    return torch.from_numpy(array.astype(np.int64))


def _is_one_hot(array: np.ndarray[Any, Any]) -> bool:
    """Whether every row has one 1, and 0 elsewhere."""
    if array.dtype.kind not in "biuf" or array.ndim != 2 or array.shape[1] < 2 or not len(array):
        return False
    return one_hot_rows(array)


def _divided(split: Split, share: float, where: str) -> tuple[Split, Split]:
    """A split in two, with this share (of every class) in the second one, always the same."""
    generator, mask = torch.Generator().manual_seed(0), torch.zeros(len(split), dtype=torch.bool)
    labels = torch.zeros(len(split)) if split.y.is_floating_point() else split.y
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        mask[members[torch.randperm(len(members), generator=generator)[: round(share * len(members))]]] = True
    if bool(mask.all()) or not bool(mask.any()):
        raise ConfigError(f"{where} holds {len(split)} sequences, too few to hold some of every class out: give more")
    parts = [
        Split(split.x[rows], split.y[rows], None if split.lengths is None else split.lengths[rows])
        for rows in (~mask, mask)
    ]
    return parts[0], parts[1]


__all__ = ["content_of", "own_content", "own_data"]
