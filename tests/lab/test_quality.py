"""The quality of a model on data, from its definition: a mean over all predictions, however they lie in batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.lab.quality import Examination, likelihood_of
from compressm.layers import SequenceClassifier, SequenceRegressor


class Same(nn.Module):
    """Returns its input."""

    def forward(self, u: Tensor) -> Tensor:
        return u


def quality(out: Tensor, targets: Tensor, *sizes: int) -> Any:
    parts = zip(out.split(sizes), targets.split(sizes), strict=True)
    found = Examination([({"u": u}, y) for u, y in parts]).quality(Same())
    assert found is not None
    return found


def test_every_sequence_counts_alike_in_batches_of_any_size() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(11, 3), torch.randint(3, (11,))
    found = quality(logits, classes, 8, 3)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, classes)))
    assert found.score == pytest.approx(float((logits.argmax(-1) == classes).double().mean()))
    numbers, wanted = torch.randn(11, 2), torch.randn(11, 2)
    assert quality(numbers, wanted, 10, 1).loss == pytest.approx(float(F.mse_loss(numbers, wanted)))


def test_every_token_counts_alike_in_batches_of_any_length() -> None:
    torch.manual_seed(0)
    table = torch.randn(5, 5)

    class Bigrams(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return table[u]

    texts = [torch.randint(5, (2, 30)), torch.randint(5, (1, 4))]
    found = Examination([({"u": text}, text) for text in texts]).quality(Bigrams())
    nats = [F.cross_entropy(table[row[:-1]], row[1:], reduction="none") for text in texts for row in text]
    assert found is not None
    assert found.loss == pytest.approx(float(torch.cat(nats).mean()))
    assert found.score == pytest.approx(float(torch.cat(nats).mean().exp()))


def test_numbers_are_told_from_classes_by_the_model_or_by_the_targets() -> None:
    u = torch.zeros(2, 3, 1)
    nothing, classes, numbers = torch.empty(2, 0), torch.zeros(2, dtype=torch.long), torch.zeros(2)
    for model, targets, expected in (
        (SequenceRegressor(1, 1, 4, 4), nothing, "regression"),
        (Same(), numbers, "regression"),
        (Same(), nothing, "classification"),
        (SequenceClassifier(1, 2, 4, 4), classes, "classification"),
    ):
        assert likelihood_of(model, [({"u": u}, targets)]) == expected
