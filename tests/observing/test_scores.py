"""Metrics by name, against torchmetrics and the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressm import Compressor
from compressm.errors import ConfigError
from compressm.layers import LanguageModel, SequenceClassifier, SequenceRegressor
from compressm.observing.inputs import calls
from compressm.observing.perplexity import perplexity
from compressm.observing.scores import score

torchmetrics = pytest.importorskip("torchmetrics.functional")


def regressor(per_step: bool = False) -> SequenceRegressor:
    torch.manual_seed(0)
    return SequenceRegressor(1, 2, d_model=4, d_state=4, per_step=per_step)


@pytest.mark.parametrize("form", ["one batch", "batches", "iterator", "mapping"])
def test_r2_and_mse_are_torchmetrics_and_the_mode_is_restored(form: str) -> None:
    model, u, y = regressor().train(), torch.randn(12, 6, 1), torch.randn(12, 2)
    halves = [(u[:5], y[:5]), (u[5:], y[5:])]
    data: Any = {"one batch": (u, y), "batches": halves, "iterator": iter(halves), "mapping": {"x": u, "y": y}}[form]
    with torch.no_grad():
        prediction = model.eval()(u)
    model.train()
    r2, mse = torchmetrics.r2_score(prediction, y), torchmetrics.mean_squared_error(prediction, y)
    if form != "iterator":
        assert score("mse", data)(model) == pytest.approx(float(mse), rel=1e-5)
    evaluate = score("r2", data)
    assert evaluate(model) == evaluate(model) == pytest.approx(float(r2), rel=1e-5)
    assert model.training


def test_fit_per_step_leaves_padding_out() -> None:
    model, u, y = regressor(per_step=True).eval(), torch.randn(2, 6, 1), torch.randn(2, 6, 2)
    lengths = torch.tensor([3, 6])
    with torch.no_grad():
        p = model(u, lengths).numpy()
    p, t = np.concatenate([p[0, :3], p[1]]), np.concatenate([y[0, :3], y[1]])
    fit = 100 * (1 - np.linalg.norm(t - p, axis=0) / np.linalg.norm(t - t.mean(0), axis=0)).mean()
    assert score("fit", {"x": u, "y": y, "lengths": lengths})(model) == pytest.approx(fit, rel=1e-5)


def test_accuracy_and_perplexity_are_torchmetrics() -> None:
    torch.manual_seed(0)
    classifier, u, y = SequenceClassifier(1, 3, d_model=4, d_state=4).eval(), torch.randn(9, 5, 1), torch.arange(9) % 3
    with torch.no_grad():
        truth = torchmetrics.accuracy(classifier(u), y, task="multiclass", num_classes=3)
    assert score("accuracy", (u, y))(classifier) == pytest.approx(float(truth))
    language, tokens = LanguageModel(7, d_model=4, d_state=4).eval(), torch.randint(0, 7, (3, 8))
    from torchmetrics.functional.text import perplexity

    with torch.no_grad():
        truth = perplexity(language(tokens)[:, :-1], tokens[:, 1:])
    assert score("perplexity", tokens)(language) == pytest.approx(float(truth), rel=1e-5)


class MaskFirst(nn.Module):
    """A language model in whose batches the mask comes first, as where columns are in alphabetical order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = LanguageModel(7, d_model=4, d_state=4).eval()

    def forward(self, attention_mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask.sum(1))


@pytest.mark.parametrize("lengths", [[8, 8, 8], [8, 3, 5]])
def test_perplexity_is_of_tokens_whatever_comes_first(lengths: list[int]) -> None:
    model, tokens = MaskFirst(), torch.randint(0, 7, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        logits = model(mask, tokens)
    rows = zip(logits, tokens, lengths, strict=True)
    nats = [nn.functional.cross_entropy(row[: k - 1], x[1:k], reduction="sum") for row, x, k in rows]
    truth = float((torch.stack(nats).sum() / (sum(lengths) - 3)).exp())
    batch = {"attention_mask": mask, "input_ids": tokens}
    assert score("perplexity", batch)(model) == pytest.approx(truth, rel=1e-5)
    assert perplexity(model, calls(model, batch)) == pytest.approx(truth, rel=1e-5)


def test_perplexity_of_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="data hold no tokens"):
        score("perplexity", torch.randn(4, 5, 1))(SequenceClassifier(1, 3, d_model=4, d_state=4))


def test_a_compressor_takes_it() -> None:
    model, u, y = regressor(), torch.randn(8, 6, 1), torch.randn(8, 2)
    optimizer = torch.optim.Adam(model.parameters())
    compressor = Compressor(
        model, optimizer, 20, states=2, max_drop=10.0, evaluate=score("mse", (u, y)), mode="min", window=0.5, cuts=1
    )
    for _ in range(20):
        nn.functional.mse_loss(model(u), y).backward()
        optimizer.step()
        compressor.step()
    assert any(event.kind == "cut" for event in compressor.history)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("acuracy", torch.zeros(2, 3, 1), "choose accuracy"),
        ("mse", "file.npz", "files are read by"),
        ("mse", torch.zeros(2, 3, 1), "data hold no targets"),
        ("mse", (torch.zeros(2, 3, 1), torch.zeros(2, 5)), "do not belong together"),
        ("r2", (torch.zeros(2, 3, 1), torch.zeros(2, 2)), "constant"),
    ],
)
def test_what_is_no_metric_or_no_data_is_refused(name: str, data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score(name, data)(regressor())
