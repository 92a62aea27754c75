"""Regression and language models as configurations, against torchmetrics and the definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressm.cli import main
from compressm.errors import ConfigError
from compressm.lab.config import load_config, parse_config
from compressm.lab.data.datasets import load_data
from compressm.lab.data.language import wikitext
from compressm.lab.data.mackey_glass import generate
from compressm.lab.data.own import own_data
from compressm.lab.data.sequences import SequenceData, Split
from compressm.lab.runs.loop import train
from compressm.lab.runs.tasks import learning_of, scores_on, sums_on
from compressm.saving.checkpoint import load

SHORT = ["run.steps=12", "run.eval_every=6", "run.checkpoint_every=0", "run.batch_size=8", "run.device=cpu"]
SMALL = ["model.d_model=4", "model.d_state=8"]


class Last(nn.Module):
    """Predicts what it is given, in two channels."""

    def forward(self, u: Tensor, lengths: Tensor | None = None) -> Tensor:
        return torch.cat([u, -u], -1)


@pytest.mark.parametrize("batch", [3, 100])
def test_r2_and_mse_of_padded_sequences_are_torchmetrics(batch: int) -> None:
    metrics = pytest.importorskip("torchmetrics.functional")
    torch.manual_seed(0)
    x, y, lengths = torch.randn(10, 6, 1), torch.randn(10, 6, 2), torch.randint(1, 7, (10,))
    split = Split(x, y, lengths)
    data = SequenceData("t", split, split, split, torch.zeros(1), torch.ones(1), 2, task="regression")
    there = torch.arange(6) < lengths[:, None]
    prediction = Last()(x)
    truth = {
        "r2": metrics.r2_score(prediction[there], y[there]),
        "mse": metrics.mean_squared_error(prediction[there], y[there]),
    }
    for name, value in truth.items():
        learning = learning_of("regression", name)  # type: ignore[arg-type]
        found = learning.quality(sums_on(learning, Last(), data, split, batch))
        assert found.score == pytest.approx(float(value), rel=1e-5)
        assert found.loss == pytest.approx(float(truth["mse"]), rel=1e-5)
    with pytest.raises(ConfigError, match=r"run.metric = 'perplexity': the task is regression; choose r2 or fit or"):
        learning_of("regression", "perplexity")


def test_mackey_glass_obeys_its_equation() -> None:
    x, ahead = generate(2, 60, 5, seed=0)
    assert x.shape == ahead.shape == (2, 60, 1)
    torch.testing.assert_close(x[:, 5:], ahead[:, :-5])
    series = x[..., 0].double()
    past, now = series[:, :-18], series[:, 17:-1]
    slopes = 0.2 * past / (1 + past**10) - 0.1 * now
    change = series[:, 18:] - now
    mean = (slopes[:, :-1] + slopes[:, 1:]) / 2  # the trapezoidal rule over a unit of time
    assert float((change[:, :-1] - mean).abs().max()) < 0.01
    assert float(change.abs().max()) > 0.05


def test_a_forecast_is_trained_and_cut(tmp_path: Path) -> None:
    out, size = tmp_path / "run", ["data.examples=40", "data.max_length=40"]
    arguments = ["train", "forecast", *size, *SMALL, *SHORT, "--states", "4"]
    assert main([*arguments, "--output", str(out), "--metric", "fit"]) == 0
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert (result["metric"], result["state_dims"], result["test_accuracy"]) == ("fit", [4], None)
    data = load_data(load_config("forecast", size).data)
    u, y = data.batch(data.test, torch.arange(len(data.test)))
    with torch.no_grad():
        error = (load(out / "model").eval()(u) - y).double()
    spread = (y - y.mean()).double()
    assert result["test_score"] == pytest.approx(100 * (1 - float(error.norm() / spread.norm())), abs=1e-3)
    assert result["test_loss"] == pytest.approx(float(error.square().mean()), rel=1e-4)


def test_a_language_model_of_bytes_is_trained_and_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 120, encoding="utf-8")
    arguments = ["train", "byte-lm", "--data", str(text), "data.max_length=16", *SMALL, *SHORT]
    assert main([*arguments, "--output", str(out)]) == 0
    assert "test perplexity" in capsys.readouterr().err
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert result["metric"] == "perplexity"
    assert result["test_score"] == pytest.approx(math.exp(result["test_loss"]))
    assert result["state_dims"] == [4, 4]
    data = own_data(str(text), 0.1, max_length=16)
    tokens, _ = data.batch(data.test, torch.arange(len(data.test)))
    with torch.no_grad():
        logits = load(out / "model").eval()(tokens)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert result["test_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_loss_of_a_language_model_is_taken_for_a_mean_over_tokens(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 120, encoding="utf-8")

    def predicted(where: str, **compression: Any) -> float:
        tree = {
            "data": {"source": str(text), "max_length": 16},
            "model": {"layer": "mamba", "d_model": 4, "d_state": 8},
            "compression": {"states": 4, "cuts": 1, "window": 0.5, "gramians": "loss", **compression},
            "run": {
                "steps": 4,
                "batch_size": 8,
                "eval_every": 0,
                "log_every": 0,
                "device": "cpu",
                "tensorboard": False,
            },
        }
        return train(parse_config(tree), output=tmp_path / where, quiet=True).history[0]["predicted_loss"]

    assert predicted("plain") == predicted("said", loss_terms="tokens") > 0
    with pytest.raises(ConfigError, match=r"loss_terms = 'sequences': the task is language, .* mean over its tokens"):
        predicted("wrong", loss_terms="sequences")


def test_text_is_divided_in_order_and_wikitext_by_its_files(tmp_path: Path) -> None:
    content = bytes(range(32, 127)) * 20
    (tmp_path / "a.txt").write_bytes(content)
    data = own_data(str(tmp_path), 0.1, max_length=10)
    found = torch.cat([split.x.flatten() for split in (data.train, data.validation, data.test)])
    assert bytes(found.tolist()) == content
    assert data.task == "language"
    for name, part in (("train", b"abcd"), ("valid", b"ef"), ("test", b"gh")):
        (tmp_path / f"wiki.{name}.tokens").write_bytes(part * 10)
    data = wikitext(tmp_path, 4)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [10, 5, 5]
    with pytest.raises(ConfigError, match="neither"):
        wikitext(tmp_path / "none", 4)


def test_labels_that_are_no_classes_are_numbers_to_predict(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 7, 2)).astype(np.float32)
    for y, shape, per_step in (
        (draw.normal(size=40), (1,), False),
        (draw.normal(size=(40, 3)), (3,), False),
        (draw.normal(size=(40, 7)), (7, 1), True),
    ):
        np.savez(tmp_path / "d.npz", x=x, y=y)
        data = own_data(str(tmp_path / "d.npz"), 0.2)
        assert (data.task, data.n_classes, data.per_step) == ("regression", shape[-1], per_step)
        assert data.train.y.shape[1:] == shape
    np.savez(tmp_path / "whole.npz", x=x, y=np.arange(40.0) % 3)
    assert own_data(str(tmp_path / "whole.npz"), 0.2).task == "classification"
    assert own_data(str(tmp_path / "whole.npz"), 0.2, "regression").task == "regression"
    with pytest.raises(ConfigError, match=r"data.task=regression"):
        own_data(str(tmp_path / "d.npz"), 0.2, "classification")


def test_the_score_of_a_sequence_is_its_mean_error_over_the_steps_that_are_there() -> None:
    torch.manual_seed(0)
    x, y, lengths = torch.randn(7, 6, 1), torch.randn(7, 6, 2), torch.randint(1, 7, (7,))
    split = Split(x, y, lengths)
    data = SequenceData("t", split, split, split, torch.zeros(1), torch.ones(1), 2, task="regression")
    found = scores_on(learning_of("regression", None), Last(), data, split, 3)
    for one, (u, target, length) in enumerate(zip(x, y, lengths.tolist(), strict=True)):
        errors = [float((Last()(u)[step] - target[step]).square().mean()) for step in range(length)]
        assert float(found[one]) == pytest.approx(sum(errors) / length, rel=1e-5)
    assert learning_of("regression", None).score.mode == "min"


def test_the_scores_of_texts_average_to_the_loss() -> None:
    torch.manual_seed(0)
    learning = learning_of("language", None)
    logits, tokens = torch.randn(5, 8, 11), torch.randint(0, 11, (5, 8))
    scores = learning.scores(logits, tokens, None)
    assert scores.shape == (5,)
    torch.testing.assert_close(scores.mean(), learning.loss(logits, tokens, None))
    alone = learning.loss(logits[2:3], tokens[2:3], None)
    torch.testing.assert_close(scores[2], alone)


def test_the_score_of_a_number_per_sequence_is_its_squared_error() -> None:
    prediction, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [1.0]])
    assert learning_of("regression", "r2").scores(prediction, y, None).tolist() == [1.0, 4.0]
