"""IMDB in both of its forms, written here in small."""

from __future__ import annotations

import io
import lzma
import tarfile
from pathlib import Path

import pytest
import torch

from compressm.errors import ConfigError
from compressm.lab.config import DataConfig
from compressm.lab.data.datasets import load_data
from compressm.lab.data.reviews import encode, read_archive, read_tables, vocabulary

TRAIN = [("neg", "0_1", "bad\tfilm"), ("neg", "1_2", "Ünlikely"), ("pos", "0_9", "good"), ("pos", "1_8", "fine")]
TEST = [("neg", "0_3", "no"), ("pos", "0_7", "yes")]


def archive(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for split, rows in (("test", TEST), ("train", TRAIN)):
            for kind, name, text in rows:
                info = tarfile.TarInfo(f"aclImdb/{split}/{kind}/{name}.txt")
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
        unsupervised = tarfile.TarInfo("aclImdb/train/unsup/0_0.txt")
        tar.addfile(unsupervised, io.BytesIO(b""))
    return path


def tables(folder: Path, repeat: int = 1) -> tuple[Path, Path]:
    paths = folder / "imdb_train.tsv.xz", folder / "imdb_test.tsv.xz"
    for path, rows in zip(paths, (TRAIN, TEST), strict=True):
        with lzma.open(path, "wt", encoding="utf-8") as file:
            for _ in range(repeat):
                file.writelines(f"{int(kind == 'pos')}\t{name}\t{text}\n" for kind, name, text in rows)
    return paths


def test_both_forms_hold_the_same(tmp_path: Path) -> None:
    assert read_archive(archive(tmp_path / "a.tar.gz")) == read_tables(*tables(tmp_path))
    (texts, labels), (test, _) = read_tables(*tables(tmp_path))
    assert dict(zip(texts, labels, strict=True)) == {"bad\tfilm": 0, "Ünlikely": 0, "good": 1, "fine": 1}
    assert sorted(test) == ["no", "yes"]


def test_tokens_are_characters() -> None:
    texts = ["aab" * 15, "ü" * 20, "z"]
    characters = vocabulary(texts)
    assert characters == ["a", "ü", "b"]  # by frequency; z is too rare
    tokens = encode(["ab", "züa🙂", ""], characters, 3)
    assert tokens.tolist() == [[2, 4, 0], [1, 3, 2], [0, 0, 0]]


def test_a_token_is_a_byte() -> None:
    characters = vocabulary(["".join(map(chr, range(0x4E00, 0x4E00 + 400))) * 20])
    tokens = encode([characters[-1]], characters, 1)
    assert len(characters) == 254
    assert int(tokens[0, 0]) == 255


def test_the_validation_data_have_no_say_in_the_vocabulary(tmp_path: Path) -> None:
    tables(tmp_path, repeat=30)
    config = DataConfig.model_validate({"name": "imdb", "root": str(tmp_path), "validation": 0.5, "max_length": 8})
    data = load_data(config)
    texts = [bytes(row[row > 0].tolist()) for row in data.train.x[..., 0]]
    assert data.vocabulary == 2 + len({token for text in texts for token in text if token > 1})
    assert (len(data.train), len(data.validation), len(data.test)) == (60, 60, 60)
    assert torch.bincount(data.validation.y).tolist() == [30, 30]


def test_batches_are_as_long_as_their_longest_text(tmp_path: Path) -> None:
    tables(tmp_path, repeat=30)
    config = DataConfig.model_validate({"name": "imdb", "root": str(tmp_path), "max_length": 100})
    data = load_data(config)
    u, y = data.batch(data.test, torch.tensor([0]))
    assert u.shape == (1, 2 + int(y[0]))  # no, yes
    assert data.batch(data.test, torch.arange(60))[0].shape == (60, 3)
    assert u.dtype == torch.int64


def test_damaged_files(tmp_path: Path) -> None:
    train, test = tables(tmp_path)
    content = train.read_bytes()
    for wrong in (content[:-8], b"text", lzma.compress(b"7\tx\ty\n"), lzma.compress(b"1\tx\n"), lzma.compress(b"")):
        train.write_bytes(wrong)
        with pytest.raises(ConfigError, match=r"imdb_train\.tsv\.xz (is damaged|does not hold)"):
            read_tables(train, test)
    path = archive(tmp_path / "a.tar.gz")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ConfigError, match="damaged"):
        read_archive(path)
    (tmp_path / "aclImdb_v1.tar.gz").write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"aclImdb_v1\.tar\.gz has MD5"):
        load_data(DataConfig.model_validate({"name": "imdb", "root": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"neither .* holds aclImdb_v1\.tar\.gz"):
        load_data(DataConfig.model_validate({"name": "imdb", "root": str(tmp_path / "..")}))
