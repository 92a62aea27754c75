"""Spoken digits from recordings that the tests write, with the standard library's `wave`."""

from __future__ import annotations

import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from compressm.errors import ConfigError
from compressm.lab.config import DataConfig
from compressm.lab.data.datasets import load_data
from compressm.lab.data.spoken import read_recordings


def write(path: Path, samples: np.ndarray, rate: int = 8000) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Every digit by two speakers, takes 0, 4, 5, 9, 10 and 12. Sample i of take t of digit d is 1000 d + 10 t + i."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for digit in range(10):
        for speaker in ("ann", "bob"):
            for take in (0, 4, 5, 9, 10, 12):
                write(folder / f"{digit}_{speaker}_{take}.wav", 1000 * digit + 10 * take + np.arange(20 + digit))
    return tmp_path


def test_the_split_is_by_takes_and_samples_are_kept(recordings: Path) -> None:
    parts = read_recordings(recordings / "recordings", 4000, 1)
    takes = {"test": (0, 4), "validation": (5, 9), "train": (10, 12)}
    assert {part: len(found[1]) for part, found in parts.items()} == dict.fromkeys(takes, 40)
    for part, (x, digits, lengths) in parts.items():
        assert x.dtype == torch.float32
        assert torch.bincount(digits).tolist() == [4] * 10
        assert torch.equal(lengths, 20 + digits)
        first = (x[:, 0, 0] * 2**15).round().long()
        assert sorted(set((first - 1000 * digits).tolist())) == [10 * take for take in takes[part]]
        for row, digit, length in zip(x[..., 0], digits, lengths, strict=True):
            assert torch.equal((row[:length] * 2**15).diff(), torch.ones(19 + int(digit)))
            assert not row[length:].any()


def test_samples_are_averaged_and_cut_off(recordings: Path) -> None:
    x, digits, lengths = read_recordings(recordings / "recordings", 24, 4)["test"]
    assert x.shape == (40, 6, 1)
    assert torch.equal(lengths, ((20 + digits) // 4).clamp(max=6))
    whole = read_recordings(recordings / "recordings", 24, 1)["test"][0]
    assert torch.allclose(x[:, :5, 0], whole[:, :20, 0].view(40, 5, 4).mean(2))


def test_archive_and_folder_hold_the_same(recordings: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "fsdd.tar.gz", "w:gz") as tar:
        tar.add(recordings / "recordings", "free-spoken-digit-dataset/recordings")
    for one, other in zip(
        read_recordings(recordings / "recordings", 40, 1).values(),
        read_recordings(tmp_path / "fsdd.tar.gz", 40, 1).values(),
        strict=True,
    ):
        assert all(map(torch.equal, one, other))


def test_batches_are_as_long_as_their_longest_recording_and_of_unit_power(recordings: Path) -> None:
    data = load_data(DataConfig(name="fsdd", root=str(recordings)))
    assert (data.channels, data.n_classes, data.label) == (1, 10, "Free Spoken Digits, 8000 Hz")
    everything = torch.arange(len(data.train))
    x, _ = data.batch(data.train, everything)
    lengths = data.lengths(data.train, everything)
    assert lengths is not None
    assert x.shape[1] == int(lengths.max()) == 29
    within = torch.arange(29) < lengths[:, None]
    assert float(x[..., 0][within].square().mean()) == pytest.approx(1, rel=1e-5)


def test_what_is_not_such_a_recording_is_refused(recordings: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither .* nor .*fsdd holds the folder recordings \(or fsdd.tar.gz\)"):
        load_data(DataConfig(name="fsdd", root=str(tmp_path / "recordings")))
    folder = recordings / "recordings"
    write(folder / "3_ann_20.wav", np.arange(9), rate=16000)
    with pytest.raises(ConfigError, match=r"3_ann_20\.wav is not one channel of 16 bits at 8000 Hz"):
        read_recordings(folder, 4000, 1)
    (folder / "3_ann_20.wav").write_bytes(b"RIFF")
    with pytest.raises(ConfigError, match=r"3_ann_20\.wav is damaged"):
        read_recordings(folder, 4000, 1)
    (folder / "3_ann_20.wav").rename(folder / "three.wav")
    with pytest.raises(ConfigError, match=r"holds three\.wav; recordings are named DIGIT_SPEAKER_TAKE\.wav"):
        read_recordings(folder, 4000, 1)
    (tmp_path / "fsdd.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="is damaged"):
        read_recordings(tmp_path / "fsdd.tar.gz", 4000, 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="holds no recordings for train and validation and test"):
        read_recordings(empty, 4000, 1)
