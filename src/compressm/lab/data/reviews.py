"""IMDB reviews (Maas et al., ACL 2011), read character by character: was the film liked?

Read from the canonical archive, ``aclImdb_v1.tar.gz``, or from two files ``imdb_train.tsv.xz`` and
``imdb_test.tsv.xz`` with the columns label, name and text.
"""

from __future__ import annotations

import lzma
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from compressm.errors import ConfigError
from compressm.lab.data.archives import opened

ARCHIVE, ARCHIVE_MD5 = "aclImdb_v1.tar.gz", "7c2ac02c03563afcf9b574c7e56c153a"
TABLES = {"train": "imdb_train.tsv.xz", "test": "imdb_test.tsv.xz"}
PADDING, UNKNOWN = 0, 1
_RAREST = 15  # a character that occurs less often is unknown
_CHARACTERS = 254  # at most, besides padding and unknown: a token is a byte

Reviews = tuple[list[str], list[int]]


def read_archive(path: Path) -> tuple[Reviews, Reviews]:
    """Texts and labels, for training and test, of the canonical archive, in the order of the files' names.

    Raises:
        ConfigError: damaged, or another archive.
    """
    found: dict[str, list[tuple[str, int, str]]] = {"train": [], "test": []}
    with opened(path) as tar:
        for member in tar:
            parts = member.name.removeprefix("./").split("/")
            if len(parts) == 4 and parts[1] in found and parts[2] in ("neg", "pos") and parts[3].endswith(".txt"):
                file = tar.extractfile(member)
                if file is not None:
                    text = file.read().decode("utf-8")
                    found[parts[1]].append((f"{parts[2]}/{parts[3]}", int(parts[2] == "pos"), text))
    return _reviews(found["train"], path), _reviews(found["test"], path)


def read_tables(train: Path, test: Path) -> tuple[Reviews, Reviews]:
    """Texts and labels, for training and test, of two compressed tables.

    Raises:
        ConfigError: damaged, or other tables.
    """
    return _table(train), _table(test)


def _table(path: Path) -> Reviews:
    rows: list[tuple[str, int, str]] = []
    try:
        with lzma.open(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                label, name, text = line.rstrip("\n").split("\t", 2)
                if label not in ("0", "1"):
                    raise ValueError(f"line {number}: the label is neither 0 nor 1")
                rows.append((name, int(label), text))
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise ConfigError(f"data.root: {path} is damaged ({error}); fetch it again") from error
    return _reviews(rows, path)


def _reviews(rows: Sequence[tuple[str, int, str]], path: Path) -> Reviews:
    labels = [label for _, label, _ in rows]
    if len(set(labels)) != 2:
        raise ConfigError(f"data.root: {path} does not hold reviews of both kinds")
    return [text for *_, text in rows], labels


def vocabulary(texts: Sequence[str]) -> list[str]:
    """The characters that get tokens of their own, the most frequent ones first."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    # Equally frequent ones in the order of their code points, not of the texts.
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [character for character, count in frequent[:_CHARACTERS] if count >= _RAREST]


def encode(texts: Sequence[str], characters: Sequence[str], longest: int) -> Tensor:
    """The first ``longest`` characters of every text as tokens: uint8 of shape ``(len(texts), longest)``."""
    table = {ord(character): number for number, character in enumerate(characters, UNKNOWN + 1)}
    codes = np.full(0x110000, UNKNOWN, np.uint8)
    codes[list(table)] = list(table.values())
    tokens = np.full((len(texts), longest), PADDING, np.uint8)
    for row, text in zip(tokens, texts, strict=True):
        points = np.frombuffer(text[:longest].encode("utf-32-le"), np.uint32)
        row[: points.size] = codes[cast("list[int]", points)]
    return torch.from_numpy(tokens)


__all__ = [
    "ARCHIVE",
    "ARCHIVE_MD5",
    "PADDING",
    "TABLES",
    "UNKNOWN",
    "encode",
    "read_archive",
    "read_tables",
    "vocabulary",
]
