"""The data sets as sequences in memory, and the order in which training goes through them.

Sequences stay as the bytes they come in and are normalised when a batch is taken, which costs little and keeps the
largest set at 180 MB. The constants for that are those of the training data.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from compressm.errors import ConfigError
from compressm.lab.config import DataConfig
from compressm.lab.data import listops, reviews

ROOT_VARIABLE = "COMPRESSM_DATA"

_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_CIFAR_BINARY, _CIFAR_BINARY_MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
_CIFAR_JPEG = "cifar10_jpg.tar.gz"
_CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# Mean and standard deviation per channel, in the units of the bytes, over the training data.
_DIGITS_SCALE = ((4.90,), (6.03,))
_MNIST_SCALE = ((33.32,), (78.57,))
_NO_SCALE = (torch.zeros(1), torch.ones(1))
_CIFAR_SCALE = ((125.31, 122.95, 113.87), (62.99, 62.09, 66.70))


@dataclass(frozen=True)
class Split:
    """Sequences and labels: ``x`` uint8 of shape ``(N, length, channels)``, ``y`` int64 of shape ``(N,)``.

    Tokens have one channel, and end with zeros where a sequence is shorter than others. Sequences of numbers stand at
    the beginning of their rows, and ``lengths``, int64 of shape ``(N,)``, says how long they are; None where all are
    equal.
    """

    x: Tensor
    y: Tensor
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return self.y.shape[0]


@dataclass(frozen=True)
class SequenceData:
    """A data set, split and ready to train on.

    Attributes:
        label: what results are to call it.
        train, validation, test: the splits. The test split is the canonical one where there is one.
        mean, std: normalisation per channel, shape ``(channels,)``.
        n_classes: number of classes.
        vocabulary: number of different tokens, padding included; None where sequences are of numbers.
        padding: the token that pads; None where every token counts.
    """

    label: str
    train: Split
    validation: Split
    test: Split
    mean: Tensor
    std: Tensor
    n_classes: int
    vocabulary: int | None = None
    padding: int | None = 0

    @property
    def channels(self) -> int:
        """Channels of a sequence."""
        return self.train.x.shape[2]

    def batch(self, split: Split, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences and their labels.

        Numbers are normalised: float32 of shape ``(len(indices), length, channels)``. Tokens are int64 of shape
        ``(len(indices), length)``. Both are as long as the longest of these sequences; see `lengths` for how long each
        is.
        """
        if self.vocabulary is not None:
            tokens = split.x.index_select(0, indices)[..., 0]
            if self.padding is not None:
                tokens = tokens[:, : int((tokens != self.padding).any(0).sum())]
            return tokens.long(), split.y[indices]
        x, lengths = split.x.index_select(0, indices), self.lengths(split, indices)
        if lengths is not None and len(lengths):
            x = x[:, : int(lengths.max())]
        return (x.float() - self.mean) / self.std, split.y[indices]

    def lengths(self, split: Split, indices: Tensor) -> Tensor | None:
        """How long the sequences of a batch are, where a model has to be told: its ``lengths``, shape
        ``(len(indices),)``. None where rows are full, and for tokens, whose padding is a token of its own."""
        return None if self.vocabulary is not None or split.lengths is None else split.lengths[indices]

    def batches(self, split: Split, size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """All of a split in order, or every ``world``-th sequence of it, in batches of at most ``size``."""
        for indices in _shares(split, size, rank, world):
            yield self.batch(split, indices)

    @torch.no_grad()
    def correct(self, model: nn.Module, split: Split, size: int, rank: int = 0, world: int = 1) -> Tensor:
        """How many of a split, or of every ``world``-th sequence of it, a model classifies correctly: a scalar.

        The model is left in evaluation mode.
        """
        model.eval()
        count = torch.zeros((), device=split.y.device)
        for indices in _shares(split, size, rank, world):
            (u, y), lengths = self.batch(split, indices), self.lengths(split, indices)
            logits = model(u) if lengths is None else model(u, lengths)
            count += (logits.argmax(-1) == y).sum()
        return count

    def to(self, device: torch.device) -> SequenceData:
        """The same data on another device."""
        train, validation, test = (
            Split(s.x.to(device), s.y.to(device), None if s.lengths is None else s.lengths.to(device))
            for s in (self.train, self.validation, self.test)
        )
        return replace(
            self, train=train, validation=validation, test=test, mean=self.mean.to(device), std=self.std.to(device)
        )


def _shares(split: Split, size: int, rank: int, world: int) -> tuple[Tensor, ...]:
    """Indices of every ``world``-th sequence of a split, in batches of at most ``size``."""
    return torch.arange(rank, len(split), world, device=split.y.device).split(size)


class BatchOrder:
    """Which training sequences step number ``step`` sees: a pure function of seed and step, so a resume needs no state.

    Every epoch is a permutation of the training data drawn from ``(seed, epoch)``; a last partial batch is left out.

    Raises:
        ConfigError: fewer sequences than a batch.
    """

    def __init__(self, sequences: int, batch_size: int, seed: int) -> None:
        if sequences < batch_size:
            raise ConfigError(
                f"run.batch_size = {batch_size}: more than the {sequences} training sequences; choose at most that"
            )
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed
        self.steps_per_epoch = sequences // batch_size
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Indices of the sequences of a step, counted from 0: shape ``(batch_size,)``, on the CPU."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            mixed = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(mixed) & (2**63 - 1))
            self._epoch, self._permutation = epoch, torch.randperm(self.sequences, generator=generator)
        return self._permutation[position * self.batch_size : (position + 1) * self.batch_size]


def load_data(config: DataConfig) -> SequenceData:
    """Read a data set into memory.

    Raises:
        ConfigError: files that are missing, damaged, or not the canonical ones.
    """
    if config.name == "digits":
        return _digits(config.validation)
    if config.name == "listops":
        return _listops(config.max_length or 2000, config.examples or 96_000)
    root = _root(config)
    if config.name == "imdb":
        return _imdb(root, config.validation, config.max_length or 4096)
    if config.name == "scifar":
        return _scifar(root, config.validation, config.pool)
    return _mnist(root, config.validation, config.pool, permuted=config.name == "psmnist")


def _root(config: DataConfig) -> Path:
    named = config.root or os.environ.get(ROOT_VARIABLE)
    key = "data.root" if config.root else ROOT_VARIABLE
    if not named:
        raise ConfigError(
            f"data.root: missing, and {config.name} is read from files; set data.root or the environment variable "
            f"{ROOT_VARIABLE} to the directory that holds {_expected(config.name)}"
        )
    root = Path(named).expanduser()
    if not root.is_dir():
        raise ConfigError(f"{key} = {named!r}: no such directory; name the one that holds {_expected(config.name)}")
    return root


def _expected(name: str) -> str:
    if name == "scifar":
        return f"{_CIFAR_BINARY} (or {_CIFAR_JPEG})"
    if name == "imdb":
        return f"{reviews.ARCHIVE} (or {' and '.join(reviews.TABLES.values())})"
    return ", ".join(_MNIST_FILES)


def _find(root: Path, folder: str, name: str) -> Path | None:
    return next((path for path in (root / name, root / folder / name) if path.is_file()), None)


def _checked(path: Path, md5: str) -> bytes:
    """The content of a file, whose MD5 must be the canonical one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.root: {path} cannot be read ({error.strerror}); check its permissions") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ConfigError(f"data.root: {path} has MD5 {found}, the original {md5}; fetch the original file again")
    return content


def _listops(longest: int, examples: int) -> SequenceData:
    def split(count: int, seed: int) -> Split:
        tokens, values = listops.generate(count, seed, max(2, longest // 4), longest)
        return Split(tokens[:, :, None], values)

    return SequenceData(
        f"ListOps, up to {longest} tokens", split(examples, 0), split(2000, 1), split(2000, 2), *_NO_SCALE, 10,
        len(listops.TOKENS),
    )  # fmt: skip


def _imdb(root: Path, validation: float, longest: int) -> SequenceData:
    tables = [_find(root, "imdb", name) for name in reviews.TABLES.values()]
    if path := _find(root, "imdb", reviews.ARCHIVE):
        _checked(path, reviews.ARCHIVE_MD5)
        (texts, labels), (test_texts, test_labels) = reviews.read_archive(path)
    elif tables[0] and tables[1]:
        (texts, labels), (test_texts, test_labels) = reviews.read_tables(tables[0], tables[1])
    else:
        raise ConfigError(f"data.root: neither {root} nor {root / 'imdb'} holds {_expected('imdb')}; put it there")
    y = torch.tensor(labels)
    held_out = _held_out(y, validation).tolist()  # its characters are not looked at either
    characters = reviews.vocabulary([text for text, held in zip(texts, held_out, strict=True) if not held])
    train, test = (reviews.encode(some, characters, longest)[:, :, None] for some in (texts, test_texts))
    data = _assemble(
        f"IMDB, up to {longest} characters", (train, y), (test, torch.tensor(test_labels)), ((0.0,), (1.0,)), validation
    )
    return replace(data, vocabulary=2 + len(characters))


def _assemble(
    label: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    scale: tuple[tuple[float, ...], tuple[float, ...]],
    validation: float,
) -> SequenceData:
    (x, y), (mean, std) = train, scale
    held_out = _held_out(y, validation)
    return SequenceData(
        label,
        Split(x[~held_out], y[~held_out]),
        Split(x[held_out], y[held_out]),
        Split(*test),
        torch.tensor(mean),
        torch.tensor(std),
        int(y.max()) + 1,
    )


def _held_out(y: Tensor, validation: float) -> Tensor:
    """A mask of the validation data."""
    mask = _stratified(y, validation)
    if mask.all() or not mask.any():
        raise ConfigError(f"data.validation = {validation}: leaves no training or no validation data; 0.1 is usual")
    return mask


def _stratified(y: Tensor, share: float) -> Tensor:
    """A mask that picks the same share of every class, always the same one."""
    generator, mask = torch.Generator().manual_seed(0), torch.zeros(len(y), dtype=torch.bool)
    for label in range(int(y.max()) + 1):
        members = (y == label).nonzero()[:, 0]
        mask[members[torch.randperm(len(members), generator=generator)[: round(share * len(members))]]] = True
    return mask


def _digits(validation: float) -> SequenceData:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(np.asarray(pixels)).to(torch.uint8)[:, :, None]
    y = torch.from_numpy(np.asarray(labels)).to(torch.int64)
    test = _stratified(y, 0.2)
    return _assemble("digits", (x[~test], y[~test]), (x[test], y[test]), _DIGITS_SCALE, validation)


def _mnist(root: Path, validation: float, pool: int, permuted: bool) -> SequenceData:
    paths = {name: _find(root, "mnist", name) for name in _MNIST_FILES}
    if missing := [name for name, path in paths.items() if path is None]:
        raise ConfigError(
            f"data.root: {root} (or {root / 'mnist'}) lacks {', '.join(missing)}; put the original MNIST files there"
        )
    images, labels, test_images, test_labels = (
        _read_idx(_checked(cast("Path", paths[name]), md5)) for name, md5 in _MNIST_FILES.items()
    )
    length = 784 // pool**2
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0)) if permuted else torch.arange(length)
    train = _pooled(images.view(-1, 784, 1), pool)[:, order], labels.to(torch.int64)
    test = _pooled(test_images.view(-1, 784, 1), pool)[:, order], test_labels.to(torch.int64)
    label = ("psMNIST" if permuted else "sMNIST") + (f", {length} steps" if pool > 1 else "")
    return _assemble(label, train, test, _MNIST_SCALE, validation)


def _pooled(x: Tensor, pool: int) -> Tensor:
    """Square images ``(N, side^2, channels)`` with blocks of ``pool x pool`` pixels averaged, again as bytes."""
    if pool == 1:
        return x
    side, channels = math.isqrt(x.shape[1]), x.shape[2]
    blocks = x.view(-1, side // pool, pool, side // pool, pool, channels)
    sums = blocks.to(torch.int16).sum((2, 4))
    return ((sums + pool**2 // 2) // pool**2).to(torch.uint8).view(x.shape[0], -1, channels)


def _read_idx(content: bytes) -> Tensor:
    """The idx format: two zero bytes, type (8: bytes), number of dimensions, sizes in big endian, then the entries."""
    raw = gzip.decompress(content)
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, math.prod(shape), 4 + 4 * len(shape)).copy()).view(shape)


def _scifar(root: Path, validation: float, pool: int) -> SequenceData:
    if path := _find(root, "cifar10", _CIFAR_BINARY):
        train, test = read_cifar_binary(_checked(path, _CIFAR_BINARY_MD5))
        label = "CIFAR-10"
    elif path := _find(root, "cifar10", _CIFAR_JPEG):
        train, test = read_cifar_jpeg(path)
        label = "CIFAR-10 (JPEG)"
    else:
        raise ConfigError(
            f"data.root: neither {root} nor {root / 'cifar10'} holds {_expected('scifar')}; put the archive there"
        )
    train, test = ((_pooled(x, pool), y) for x, y in (train, test))
    label += f", {1024 // pool**2} steps" if pool > 1 else ""
    return _assemble(label, train, test, _CIFAR_SCALE, validation)


def read_cifar_binary(archive: bytes) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test data of the canonical binary version: per image a label byte, then planes R, G and B."""
    parts: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".bin") else None
            if file is not None:
                parts[Path(member.name).name] = np.frombuffer(file.read(), np.uint8).reshape(-1, 3073)

    def pair(names: list[str]) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(np.concatenate([parts[name] for name in names]))
        return rows[:, 1:].reshape(-1, 3, 1024).transpose(1, 2).contiguous(), rows[:, 0].to(torch.int64)

    return pair(sorted(name for name in parts if name.startswith("data_batch"))), pair(["test_batch.bin"])


def read_cifar_jpeg(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test data of an archive of JPEG files, ``train/<class>/NNNN.jpg`` and ``test/<class>/NNNN.jpg``.

    Raises:
        ConfigError: not such an archive.
    """
    from PIL import Image

    found: dict[str, list[tuple[int, str, bytes]]] = {"train": [], "test": []}
    try:
        with tarfile.open(path, mode="r:gz") as tar:
            for member in tar:
                parts = member.name.removeprefix("./").split("/")
                if len(parts) == 3 and parts[0] in found and parts[1] in _CIFAR_CLASSES and parts[2].endswith(".jpg"):
                    with Image.open(cast("io.BufferedReader", tar.extractfile(member))) as image:
                        pixels = image.convert("RGB").tobytes()
                    found[parts[0]].append((_CIFAR_CLASSES.index(parts[1]), parts[2], pixels))
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ConfigError(f"data.root: {path} is damaged ({error}); fetch it again") from error
    if not all(found.values()) or any(len(pixels) != 3072 for rows in found.values() for _, _, pixels in rows):
        raise ConfigError(
            f"data.root: {path} does not hold 32 x 32 images as train/<class>/NNNN.jpg and test/<class>/NNNN.jpg"
        )

    def pair(rows: list[tuple[int, str, bytes]]) -> tuple[Tensor, Tensor]:
        rows = sorted(rows)
        x = np.frombuffer(b"".join(pixels for _, _, pixels in rows), np.uint8).reshape(-1, 1024, 3).copy()
        return torch.from_numpy(x), torch.tensor([label for label, _, _ in rows])

    return pair(found["train"]), pair(found["test"])


__all__ = ["BatchOrder", "SequenceData", "Split", "load_data", "read_cifar_binary", "read_cifar_jpeg"]
