"""The data sets that `compressm train` knows: where their files are, and how sequences are made of them.

The constants of normalisation are those of the training data.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from compressm.errors import ConfigError
from compressm.lab.config import DataConfig
from compressm.lab.data import listops, mackey_glass, recall, reviews, spoken
from compressm.lab.data.archives import opened
from compressm.lab.data.language import text_data, wikitext
from compressm.lab.data.own import own_data
from compressm.lab.data.sequences import BatchOrder, SequenceData, Split

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


def load_data(config: DataConfig) -> SequenceData:
    """Read a data set into memory.

    Raises:
        ConfigError: files that are missing, damaged, or not the canonical ones.
    """
    if config.source is not None:
        return own_data(config.source, config.validation, config.task, config.max_length)
    if config.name == "mackey-glass":
        return _mackey_glass(config.max_length or 200, config.horizon, config.examples or 512)
    if config.name == "digits":
        return _digits(config.validation)
    if config.name == "listops":
        return _listops(config.max_length or 2000, config.examples or 96_000)
    if config.name == "mqar":
        return _mqar(config.pairs, config.max_length or 4 * config.pairs, config.examples or 50_000)
    root = _root(config)
    if config.name == "text":
        return text_data(root, config.max_length or 256, config.validation)
    if config.name == "wikitext":
        return wikitext(root, config.max_length or 256)
    if config.name == "imdb":
        return _imdb(root, config.validation, config.max_length or 4096)
    if config.name == "scifar":
        return _scifar(root, config.validation, config.pool)
    if config.name == "fsdd":
        return _spoken(root, config.max_length or spoken.RATE // 2, config.pool)
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
    if not root.is_dir() and not (config.name == "text" and root.is_file()):
        raise ConfigError(f"{key} = {named!r}: no such directory; name the one that holds {_expected(config.name)}")
    return root


def _expected(name: str | None) -> str:
    if name == "scifar":
        return f"{_CIFAR_BINARY} (or {_CIFAR_JPEG})"
    if name == "imdb":
        return f"{reviews.ARCHIVE} (or {' and '.join(reviews.TABLES.values())})"
    if name == "fsdd":
        return f"the folder {spoken.FOLDER} (or {spoken.ARCHIVE})"
    if name == "text":
        return "text (.txt), or give a file by --data"
    if name == "wikitext":
        return "wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens"
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


def _mackey_glass(length: int, horizon: int, examples: int) -> SequenceData:
    train, held_out, test = (
        Split(*mackey_glass.generate(count, length, horizon, seed)) for seed, count in enumerate((examples, 128, 128))
    )
    label, scale = f"Mackey-Glass, {horizon} steps ahead", (torch.full((1,), 0.93), torch.full((1,), 0.23))
    return SequenceData(label, train, held_out, test, *scale, 1, task="regression")


def _mqar(pairs: int, length: int, examples: int) -> SequenceData:
    vocabulary = 4 * pairs

    def split(count: int, seed: int, *sizes: int) -> Split:
        parts = [recall.generate(-(-count // len(sizes)), one, length, vocabulary, seed) for one in sizes]
        tokens, answers = (torch.cat(one)[:count] for one in zip(*parts, strict=True))
        return Split(tokens[..., None], answers)

    # Without sequences of few pairs, as in the paper's training data, nothing is learnt for long.
    train = split(examples, 0, *(2**power for power in range(pairs.bit_length() - 1)), pairs)
    held_out, test = split(500, 1, pairs), split(500, 2, pairs)
    return SequenceData(
        f"MQAR, {pairs} pairs in {length} tokens", train, held_out, test, *_NO_SCALE, vocabulary, vocabulary,
        padding=None, task="language",
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


def _spoken(root: Path, longest: int, pool: int) -> SequenceData:
    """Raw samples. The split is the authors', so that no share is held out at random."""
    folders = (root / spoken.FOLDER, root / "fsdd" / spoken.FOLDER)
    path = next((path for path in folders if path.is_dir()), _find(root, "fsdd", spoken.ARCHIVE))
    if path is None:
        raise ConfigError(f"data.root: neither {root} nor {root / 'fsdd'} holds {_expected('fsdd')}; put it there")
    parts = spoken.read_recordings(path, longest, pool)
    train, held_out, test = (Split(*parts[part]) for part in ("train", "validation", "test"))
    within = torch.cat([row[:length] for row, length in zip(*parts["train"][::2], strict=True)])
    label = f"Free Spoken Digits, {spoken.RATE // pool} Hz"
    return SequenceData(label, train, held_out, test, torch.zeros(1), within.square().mean(0).sqrt(), 10)


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
    with opened(path) as tar:
        for member in tar:
            parts = member.name.removeprefix("./").split("/")
            if len(parts) == 3 and parts[0] in found and parts[1] in _CIFAR_CLASSES and parts[2].endswith(".jpg"):
                with Image.open(cast("io.BufferedReader", tar.extractfile(member))) as image:
                    pixels = image.convert("RGB").tobytes()
                found[parts[0]].append((_CIFAR_CLASSES.index(parts[1]), parts[2], pixels))
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
