"""Text as bytes: of a file, a folder of ``.txt`` files, or a folder of the library datasets with a column ``text``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compressm.errors import ConfigError
from compressm.lab.data.hf_datasets import is_hf_datasets, texts_of


def pieces(path: Path) -> Iterator[bytes]:
    """The texts of a file or folder one after the other, in the order of their names.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    if is_hf_datasets(path):
        yield from texts_of(path)
        return
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"data {path} holds neither text (.txt) nor arrays: check the path")
    for file in files:
        if not file.is_file():
            raise ConfigError(f"data {file} cannot be read: no such file")
        try:
            with file.open("rb") as opened:
                while piece := opened.read(1 << 20):
                    yield piece
        except OSError as error:
            raise ConfigError(f"data {file} cannot be read: {error.strerror}") from error
        yield b"\n"


def first_bytes(path: Path, count: int) -> tuple[bytes, bool]:
    """The first bytes of texts that follow each other, a line's end between them, and whether those are all."""
    content = bytearray()
    for piece in pieces(path):
        content += piece
        if len(content) > count + 1:
            return bytes(content[:count]), False
    whole = bytes(content).removesuffix(b"\n")
    return whole[:count], len(whole) <= count


__all__ = ["first_bytes", "pieces"]
