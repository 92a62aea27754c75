"""Free Spoken Digit Dataset (Jackson et al., CC BY-SA 4.0): which digit is said, from the samples of the recording.

3000 recordings of six speakers, 8 kHz, 16 bits, one channel, named ``DIGIT_SPEAKER_TAKE.wav``. Read from the folder
``recordings`` of the data set, or from an archive ``fsdd.tar.gz`` of it. The authors' test set are takes 0 to 4.
"""

from __future__ import annotations

import io
import re
import wave
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressm.errors import ConfigError
from compressm.lab.data.archives import opened

FOLDER, ARCHIVE = "recordings", "fsdd.tar.gz"
RATE = 8000  # samples a second
_NAME = re.compile(r"(\d)_[a-z]+_(\d+)\.wav")
_TEST_TAKES, _VALIDATION_TAKES = 5, 10  # a take below is for testing, one below the second for validation

Part = tuple[Tensor, Tensor, Tensor]


def read_recordings(path: Path, longest: int, pool: int) -> dict[str, Part]:
    """The recordings by part: ``train``, ``validation`` (takes 5 to 9) and ``test`` (takes 0 to 4).

    Args:
        path: folder or archive.
        longest: samples; what follows them is left out.
        pool: average so many samples.

    Returns:
        of every part the samples, float32 from -1 to 1 of shape ``(N, longest // pool, 1)``, zero behind the end; the
        digits, int64 of shape ``(N,)``; and how long each is, int64 of shape ``(N,)``.

    Raises:
        ConfigError: damaged, or not such recordings.
    """
    rows: dict[str, list[tuple[str, NDArray[np.float32]]]] = {"train": [], "validation": [], "test": []}
    for name, content in _files(path):
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(f"data.root: {path} holds {name}; recordings are named DIGIT_SPEAKER_TAKE.wav")
        take = int(match[2])
        part = "test" if take < _TEST_TAKES else "validation" if take < _VALIDATION_TAKES else "train"
        rows[part].append((name, _samples(content, f"{path}: {name}")[: longest // pool * pool]))
    if empty := [part for part, found in rows.items() if not found]:
        raise ConfigError(f"data.root: {path} holds no recordings for {' and '.join(empty)}; take 10 and later train")
    return {part: _padded(sorted(found, key=lambda row: row[0]), longest // pool, pool) for part, found in rows.items()}


def _files(path: Path) -> list[tuple[str, bytes]]:
    if path.is_dir():
        return [(file.name, file.read_bytes()) for file in sorted(path.glob("*.wav"))]
    found: list[tuple[str, bytes]] = []
    with opened(path) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".wav") else None
            if file is not None:
                found.append((Path(member.name).name, file.read()))
    return found


def _samples(content: bytes, what: str) -> NDArray[np.float32]:
    try:
        with wave.open(io.BytesIO(content), "rb") as file:
            kind = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ConfigError(f"data.root: {what} is damaged ({error}); fetch it again") from error
    if kind != (1, 2, RATE):
        raise ConfigError(f"data.root: {what} is not one channel of 16 bits at {RATE} Hz; fetch the original files")
    samples = np.frombuffer(raw, "<i2").astype(np.float32)
    samples /= 2**15
    return samples


def _padded(rows: list[tuple[str, NDArray[np.float32]]], steps: int, pool: int) -> Part:
    x, lengths = np.zeros((len(rows), steps, 1), np.float32), []
    for row, (_, samples) in zip(x, rows, strict=True):
        means = samples[: len(samples) // pool * pool].reshape(-1, pool).mean(1)
        row[: len(means), 0] = means
        lengths.append(len(means))
    return torch.from_numpy(x), torch.tensor([int(name[0]) for name, _ in rows]), torch.tensor(lengths)


__all__ = ["ARCHIVE", "FOLDER", "RATE", "read_recordings"]
