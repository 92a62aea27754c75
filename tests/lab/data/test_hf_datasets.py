"""Folders of Hugging Face's library datasets, written by the library itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compressm
from compressm.errors import ConfigError
from compressm.lab.data.files import is_data, read_content
from compressm.lab.data.own import own_data
from compressm.lab.one_shot import compress_checkpoint
from compressm.layers import LanguageModel

datasets: Any = pytest.importorskip("datasets")


def tones(count: int, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {"x": draw.normal(size=(count, 12, 2)).tolist(), "label": [i % 3 for i in range(count)]}


def test_a_data_set_gives_its_columns_and_a_dictionary_its_splits(tmp_path: Path) -> None:
    whole = tones(30)
    datasets.Dataset.from_dict(whole).save_to_disk(tmp_path / "one")
    splits = {"train": tones(30), "test": tones(9, 1), "validation": tones(6, 2)}
    made = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()})
    made.save_to_disk(tmp_path / "three")
    assert is_data(tmp_path / "one")
    content = read_content(tmp_path / "one")
    np.testing.assert_allclose(content["x"], np.array(whole["x"]), rtol=1e-6)  # the library gives float32
    np.testing.assert_array_equal(content["label"], np.array(whole["label"]))
    data = own_data(str(tmp_path / "three"), validation=0.5)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [30, 6, 9]
    torch.testing.assert_close(data.test.x, torch.tensor(splits["test"]["x"]))


def test_sequences_of_unequal_length_are_padded_and_their_lengths_told(tmp_path: Path) -> None:
    rows = [[[float(step)] for step in range(length)] for length in (3, 5, 4)]
    datasets.Dataset.from_dict({"x": rows, "y": [0, 1, 0]}).save_to_disk(tmp_path / "d")
    content = read_content(tmp_path / "d")
    assert content["x"].shape == (3, 5, 1)
    assert content["lengths"].tolist() == [3, 5, 4]
    np.testing.assert_array_equal(content["x"][0, :, 0], [0, 1, 2, 0, 0])


def test_a_column_of_text_is_text_for_a_language_model(tmp_path: Path) -> None:
    lines = ["The quick brown fox jumps over the lazy dog."] * 40
    datasets.Dataset.from_dict({"text": lines}).save_to_disk(tmp_path / "rows")
    (tmp_path / "same.txt").write_text("\n".join(lines), encoding="utf-8")
    torch.manual_seed(0)
    compressm.save(LanguageModel(256, d_model=8, d_state=12, n_layers=1), tmp_path / "big")
    losses = [
        compress_checkpoint(tmp_path / "big", None, tmp_path / name, states=4, sequences=4, length=32).loss_before
        for name in ("rows", "same.txt")
    ]
    assert losses[0] == losses[1]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"picture": [[1.0]], "label": [0]}).save_to_disk(tmp_path / "d")
    with pytest.raises(ConfigError, match=r"has the columns label, picture: name the sequences x"):
        read_content(tmp_path / "d")
    (tmp_path / "d" / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_content(tmp_path / "d")
