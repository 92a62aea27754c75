"""Files of sequences and labels: the command line and `compress_checkpoint` read every plain form of them rightly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.cli import main
from compressm.errors import ConfigError
from compressm.lab.data.arrays import labels
from compressm.lab.one_shot import compress_checkpoint
from compressm.lab.prospects import analyze_checkpoint
from compressm.layers import LanguageModel, SequenceClassifier
from compressm.saving.arguments import remember_arguments

N, L, C, K, V = 8, 11, 2, 3, 13
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(N, L, C))
T = GENERATOR.integers(0, V, (N, L))
Y = np.array([0, 2, 1, 1, 2, 0, 0, 1])
LENGTHS = np.array([3, 11, 1, 9, 2, 11, 5, 8])
MASK = np.arange(L) < LENGTHS[:, None]


def numbers(channels: int = C) -> nn.Module:
    torch.manual_seed(0)
    return SequenceClassifier(channels, K, 4, 4, 1, layer="mamba").eval()


NAMES = ("dog", "ant", "bee")


def named() -> nn.Module:
    model = numbers()
    remember_arguments(model, {"class_names": list(NAMES)})
    return model


def tokens() -> nn.Module:
    torch.manual_seed(0)
    return SequenceClassifier(1, K, 4, 4, 1, layer="mamba", vocabulary=V).eval()


def every_token_counts() -> nn.Module:
    torch.manual_seed(0)
    return SequenceClassifier(1, K, 4, 4, 1, layer="mamba", vocabulary=V, padding=None).eval()


def language() -> nn.Module:
    torch.manual_seed(0)
    return LanguageModel(V, 4, 4, 1).eval()


Content = dict[str, Any]
# A model, what is in the file, and the sequences, labels and lengths that are meant.
WORKS: dict[str, tuple[Callable[[], nn.Module], Content, Any, Any, Any]] = {
    "float64": (numbers, {"x": X, "y": Y}, X, Y, None),
    "float16": (numbers, {"x": X.astype(np.float16), "y": Y}, X.astype(np.float16), Y, None),
    "uint8": (numbers, {"x": T[..., None].astype(np.uint8)[..., [0, 0]], "y": Y}, T[..., None][..., [0, 0]], Y, None),
    "booleans": (numbers, {"x": X > 0, "y": Y}, X > 0, Y, None),
    "channels first": (numbers, {"x": X.transpose(0, 2, 1), "y": Y}, X, Y, None),
    "(N, length)": (lambda: numbers(1), {"x": X[..., 0], "y": Y}, X[..., :1], Y, None),
    "other names": (numbers, {"inputs": X, "labels": Y}, X, Y, None),
    "upper case": (numbers, {"X": X, "Y": Y}, X, Y, None),
    "others beside": (numbers, {"x": X, "y": Y, "names": np.array(["a"] * N)}, X, Y, None),
    "one split": (numbers, {"X_train": X, "y_train": Y}, X, Y, None),
    "without names": (numbers, {"arr_0": X, "arr_1": Y}, X, Y, None),
    "labels as floats": (numbers, {"x": X, "y": Y.astype(np.float32)}, X, Y, None),
    "labels as uint8": (numbers, {"x": X, "y": Y.astype(np.uint8)}, X, Y, None),
    "labels as digits": (numbers, {"x": X, "y": Y.astype(str)}, X, Y, None),
    "names of the model's classes": (named, {"x": X, "y": np.array(NAMES)[Y]}, X, Y, None),
    "splits": (numbers, {"x_train": X + 1, "y_train": Y * 0, "x_val": X, "y_val": Y, "x_test": X - 1}, X, Y, None),
    "labels in a column": (numbers, {"x": X, "y": Y[:, None]}, X, Y, None),
    "labels one-hot": (numbers, {"x": X, "y": np.eye(K)[Y]}, X, Y, None),
    "labels from 1": (numbers, {"x": X, "y": Y + 1}, X, Y, None),
    "lengths": (numbers, {"x": X, "y": Y, "lengths": LENGTHS}, X, Y, LENGTHS),
    "NaN behind the lengths": (
        numbers, {"x": np.where(MASK[..., None], X, np.nan), "y": Y, "lengths": LENGTHS}, X, Y, LENGTHS,
    ),
    "a mask": (numbers, {"x": X, "y": Y, "mask": MASK}, X, Y, LENGTHS),
    "tokens": (tokens, {"x": T, "y": Y}, T, Y, None),
    "tokens, uint8": (tokens, {"x": T.astype(np.uint8), "y": Y}, T, Y, None),
    "tokens, uint16": (tokens, {"x": T.astype(np.uint16), "y": Y}, T, Y, None),
    "tokens, booleans": (tokens, {"x": T > 5, "y": Y}, T > 5, Y, None),
    "tokens, floats": (tokens, {"x": T.astype(float), "y": Y}, T, Y, None),
    "tokens, (N, length, 1)": (tokens, {"x": T[..., None], "y": Y}, T, Y, None),
    "tokens, named so": (tokens, {"tokens": T, "target": Y}, T, Y, None),
    "tokens, lengths": (tokens, {"x": T, "y": Y, "lengths": LENGTHS}, T, Y, LENGTHS),
    "tokens, none of them padding": (every_token_counts, {"x": T, "y": Y}, T, Y, None),
    "a language model's tokens": (language, {"x": T}, T, None, None),
    "a language model's, lengths": (language, {"input_ids": T, "attention_mask": MASK}, T, None, LENGTHS),
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[[], nn.Module], Content | bytes, str]] = {
    "text": (numbers, b"0.1, 0.2\n" * 99, "nor a folder of them; save one with numpy.savez"),
    "a broken file": (numbers, b"\x93NUMPY\x01", "cannot be read"),
    "nothing": (numbers, {}, "holds nothing: name the sequences x and the labels y"),
    "objects": (numbers, {"x": np.array([[None]]), "y": Y}, "cannot be read"),
    "unknown names": (numbers, {"a": X, "b": Y}, "holds a (float64 of shape (8, 11, 2)), b (int64"),
    "labels of another split": (numbers, {"x_train": X, "x_val": X, "y_train": Y}, "holds no labels: save them as y"),
    "two names": (numbers, {"x": X, "inputs": X, "y": Y}, "has both 'x' and 'inputs'"),
    "no labels": (numbers, {"x": X}, "holds no labels: save them as y, shape (8,)"),
    "other channels": (numbers, {"x": X[..., :1], "y": Y}, "takes numbers of shape (batch, length, 2)"),
    "NaN": (
        numbers,
        {"x": np.where(MASK[..., None], X, np.nan), "y": Y},
        "holds nan at [0, 3, 0]: data must be finite",
    ),
    "names as labels": (numbers, {"x": X, "y": np.array(["cat", "dog"])[Y // 2]}, "holds names ('cat', 'dog')"),
    "labels beyond": (numbers, {"x": X, "y": Y * 10}, "holds labels from 0 to 20: the model's 3 classes are 0 to 2"),
    "labels from -1": (numbers, {"x": X, "y": Y - 1}, "holds labels from -1 to 1"),
    "labels from 1, one missing": (numbers, {"x": X, "y": np.where(Y == 1, 3, Y + 1)}, "holds labels from 1 to 3"),
    "labels with fractions": (numbers, {"x": X, "y": Y + 0.5}, "holds 0.5: labels must be classes"),
    "labels, NaN": (numbers, {"x": X, "y": Y * np.nan}, "holds nan: labels must be classes"),
    "too few labels": (numbers, {"x": X, "y": Y[:5]}, "expected one label for each of the 8 sequences"),
    "soft labels": (numbers, {"x": X, "y": np.full((N, K), 1 / K)}, "rows that are not one-hot"),
    "lengths beyond": (numbers, {"x": X, "y": Y, "lengths": LENGTHS + 1}, "lengths must be from 1 to 11"),
    "tokens beyond": (tokens, {"x": T + 1, "y": Y}, "holds tokens from 1 to 13"),
    "tokens with fractions": (tokens, {"x": T + 0.5, "y": Y}, ".5: SequenceClassifier takes tokens"),
    "names as tokens": (tokens, {"x": T.astype(str), "y": Y}, "pass numbers"),
    "a language model's beyond": (language, {"x": T * 3}, "LanguageModel takes tokens"),
}


def write(path: Path, content: Content | bytes) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    return path


def inputs(model: nn.Module, x: Any, lengths: Any) -> list[Tensor]:
    floating = isinstance(model, SequenceClassifier) and model.vocabulary is None
    u = torch.tensor(np.asarray(x)).float() if floating else torch.tensor(np.asarray(x)).long()
    return [u] if lengths is None else [u, torch.tensor(lengths)]


@pytest.mark.parametrize("form", WORKS)
def test_forms_that_work(form: str, tmp_path: Path) -> None:
    make, content, x, y, lengths = WORKS[form]
    model = make()
    compressm.save(model, tmp_path / "big")
    data = write(tmp_path / "data.npz", content)
    arguments = ["compress", str(tmp_path / "big"), "--data", str(data), "--output", str(tmp_path / "small")]
    assert main([*arguments, "--states", "2", "--sequences", "4", "--json", str(tmp_path / "r.json")]) == 0
    lost = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    # The cut is made from the first four sequences, and the loss measured on the other four, from its definition.
    given = inputs(model, x, lengths)
    with torch.no_grad():
        logits = model(*(value[4:] for value in given))
    if y is None:
        present = torch.ones(4, L - 1, dtype=torch.bool) if lengths is None else torch.tensor(MASK[4:, 1:])
        expected = F.cross_entropy(logits[:, :-1][present], given[0][4:, 1:][present])
    else:
        expected = F.cross_entropy(logits, torch.tensor(y[4:]))
    assert lost["loss_before"] == pytest.approx(float(expected), rel=1e-5)
    assert (lost["sequences"], lost["length"]) == (4, L)
    assert main(["analyze", str(tmp_path / "big"), "--data", str(data), "--json", str(tmp_path / "a.json")]) == 0
    analysis = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    batch = dict(zip(("u" if y is not None else "tokens", "lengths"), given, strict=False))
    for spectrum in compressm.analyze(model, data=[{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]):
        found = torch.tensor(analysis["layers"][spectrum.name]["hsv"], dtype=torch.float64)
        torch.testing.assert_close(found, spectrum.hsv, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", REFUSED)
def test_forms_that_are_refused(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, content, message = REFUSED[form]
    compressm.save(make(), tmp_path / "big")
    data, small = write(tmp_path / "data.npz", content), tmp_path / "small"
    with pytest.raises(ConfigError) as caught:
        compress_checkpoint(tmp_path / "big", small, data, states=2, sequences=4)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    arguments = ["compress", str(tmp_path / "big"), "--data", str(data), "--output", str(small)]
    assert main([*arguments, "--states", "2", "--sequences", "4"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not small.exists()


def test_labels_are_not_needed_to_analyse(tmp_path: Path) -> None:
    compressm.save(numbers(), tmp_path / "model")
    write(tmp_path / "both.npz", {"x": X, "y": Y})
    np.save(tmp_path / "x.npy", X)
    write(tmp_path / "names.npz", {"x": X, "y": np.array(["a"] * N)})
    spectra = [
        analyze_checkpoint(tmp_path / "model", tmp_path / name).spectrum for name in ("both.npz", "x.npy", "names.npz")
    ]
    for other in spectra[1:]:
        assert torch.equal(other["blocks.0.ssm"].hsv, spectra[0]["blocks.0.ssm"].hsv)


def test_a_hugging_face_model_reads_tokens_with_a_mask(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=V, hidden_size=4, state_size=4, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "big")
    write(tmp_path / "data.npz", {"tokens": T, "lengths": LENGTHS})
    lost = compress_checkpoint(tmp_path / "big", tmp_path / "small", tmp_path / "data.npz", states=2, sequences=4)
    with torch.no_grad():
        logits = model(torch.tensor(T[4:])).logits  # causal: padding at the end changes nothing before it
    present = torch.tensor(MASK[4:, 1:])
    expected = F.cross_entropy(logits[:, :-1][present], torch.tensor(T[4:, 1:])[present])
    assert lost.loss_before == pytest.approx(float(expected), rel=1e-4)


def test_labels_by_their_definition() -> None:
    expected = torch.tensor(Y)
    for form in (Y, torch.tensor(Y), Y.astype(">i4"), np.eye(K, dtype=bool)[Y], Y[:, None] + 1):
        assert torch.equal(labels(form, K, N, "y"), expected)
    two = np.array([True, False, True])
    assert labels(two, 2, 3, "y").tolist() == [1, 0, 1]
