"""Tensors that live in files: pages of a checkpoint that are read when they are needed, and let go of after that.

A mapped tensor is an ordinary tensor on the CPU, whose memory the system fills from the file at the first touch. Clean
pages cost nothing that is not on disk already, so a `Pager` lets go of all of them after each layer: the memory in use
is then one layer's, whatever the size of the model. New tensors, such as the weights after a cut, are written to a
scratch file and mapped as well.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from compressm.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100 << 20  # bytes, as in safetensors


@dataclass(frozen=True)
class Place:
    """Where a safetensors file holds a tensor: dtype by its name in the format, shape, first and last byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def places_in(file: Path) -> dict[str, Place]:
    """The places of all tensors in a safetensors file, by name.

    Raises:
        CheckpointError: not such a file, or damaged.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(opened.read(length))
        size, found = file.stat().st_size, dict[str, Place]()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
            place = Place(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), start, stop)
            if not 8 + length <= start <= stop <= size or stop - start != _bytes(place):
                raise ValueError(f"{name} does not lie within the file")
            found[name] = place
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); copy the folder again") from error
    return found


def _bytes(place: Place) -> int:
    count = DTYPES[place.dtype].itemsize if place.dtype in DTYPES else 0
    for n in place.shape:
        count *= n
    return count


class Pager:
    """Maps files, and lets go of their pages."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._scratch: Path | None = None
        self._count = 0

    def tensor(self, file: Path, place: Place) -> Tensor:
        """A tensor of a safetensors file. Writing into it changes neither the file nor, for long, the tensor."""
        if file not in self._maps:
            with file.open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = DTYPES[place.dtype]
        count = (place.stop - place.start) // dtype.itemsize
        if count == 0:
            return torch.empty(place.shape, dtype=dtype)
        return torch.frombuffer(self._maps[file], dtype=dtype, count=count, offset=place.start).view(place.shape)

    def stored(self, value: Tensor) -> Tensor:
        """The same values, in a scratch file."""
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="compressm-"))
            weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        file = self._scratch / f"{self._count}.safetensors"
        self._count += 1
        with SafetensorsWriter(file, {"value": value}) as writer:
            writer.write(value)
        return self.tensor(file, places_in(file)["value"])

    def release(self) -> None:
        """Let go of all pages; they are read again when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for pages in self._maps.values():
                pages.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def active(self) -> Generator[Pager]:
        """Let `layer_done` and `stored` use this pager while the block runs."""
        token = _ACTIVE.set(self)
        try:
            yield self
        finally:
            _ACTIVE.reset(token)

    def close(self) -> None:
        """Delete the scratch files. Mapped tensors stay readable as long as they are used."""
        self._maps.clear()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


_ACTIVE: ContextVar[Pager | None] = ContextVar("pager", default=None)


def is_paging() -> bool:
    """Whether the model at work lives in files."""
    return _ACTIVE.get() is not None


def layer_done() -> None:
    """Say that the work on one layer is over: its pages may go."""
    pager = _ACTIVE.get()
    if pager is not None:
        pager.release()


def stored(value: Tensor) -> Tensor:
    """The tensor, moved to a file if the model at work lives in files."""
    pager = _ACTIVE.get()
    return value if pager is None else pager.stored(value)


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, in the order of its header, so that one of them is in memory at most.

    Args:
        file: where to.
        tensors: of the shapes and dtypes that will be written, in this order.
    """

    def __init__(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, value in tensors.items():
            start, end = end, end + value.numel() * value.element_size()
            header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._opened = file.open("wb")
        self._opened.write(len(text).to_bytes(8, "little") + text)

    def write(self, value: Tensor) -> None:
        """Write the next tensor."""
        flat = value.detach().cpu().contiguous().flatten()
        if flat.numel():
            self._opened.write(cast("Any", flat.view(torch.uint8).numpy()))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.flush()
        os.fsync(self._opened.fileno())
        self._opened.close()


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write some tensors into one safetensors file, letting go of the pages after each."""
    with SafetensorsWriter(file, tensors) as writer:
        for value in tensors.values():
            writer.write(value)
            layer_done()


__all__ = [
    "DTYPES",
    "Pager",
    "Place",
    "SafetensorsWriter",
    "is_paging",
    "layer_done",
    "places_in",
    "stored",
    "write_shard",
]
