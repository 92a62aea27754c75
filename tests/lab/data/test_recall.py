"""The generator of associative recall against the task's definition, read off each row."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare

from compressm.lab.config import DataConfig
from compressm.lab.data.datasets import load_data
from compressm.lab.data.recall import NO_ANSWER, POWER, generate
from compressm.lab.runs.tasks import learning_of


@pytest.mark.parametrize(("pairs", "length", "vocabulary"), [(4, 16, 16), (8, 64, 64), (64, 256, 256)])
def test_every_key_is_asked_once_and_answered_by_its_value(pairs: int, length: int, vocabulary: int) -> None:
    tokens, answers = (one.tolist() for one in generate(20, pairs, length, vocabulary, seed=3))
    for row, wanted in zip(tokens, answers, strict=True):
        table = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(table) == pairs  # all keys differ
        assert all(0 < key < vocabulary // 2 <= value < vocabulary for key, value in table.items())
        asked = [place for place in range(2 * pairs, length) if row[place]]
        assert sorted(row[place] for place in asked) == sorted(table)
        expected = [NO_ANSWER] * length
        for place in asked:
            expected[place + 1] = table[row[place]]
        assert wanted == expected


def test_the_first_pair_is_asked_for_in_slots_by_the_power_law() -> None:
    """Pairs are drawn one after the other, so the slots of the first are drawn by the weights themselves."""
    tokens, _ = (one.numpy() for one in generate(20_000, 3, 26, 16, seed=0))
    slots = 10
    first = (tokens[:, 6:] == tokens[:, :1]).argmax(1) // 2
    weights = np.arange(1, slots + 1) ** (POWER - 1)
    counts = np.bincount(first, minlength=slots)
    assert chisquare(counts, 20_000 * weights / weights.sum()).pvalue > 1e-3


def test_accuracy_counts_the_answers_alone() -> None:
    data = load_data(DataConfig.model_validate({"name": "mqar", "pairs": 4, "examples": 60}))
    tokens, answers = next(data.batches(data.train, 60))
    assert data.vocabulary is not None
    right = np.eye(data.vocabulary, dtype=np.float32)[np.roll(answers.clamp_min(0).numpy(), -1, 1)]
    logits = 50 * answers.new_tensor(right).float()
    learning = learning_of("language", "accuracy")
    found = learning.quality(learning.sums(logits, answers, None))
    assert (found.score, tokens.shape) == (1.0, (60, 16))
    assert found.loss == pytest.approx(0, abs=1e-6)
    assert float(learning.sums(logits, answers, None)[0]) == 20 * (1 + 2 + 4)  # equal shares of the sizes
    assert learning.loss(logits, answers, None).item() == pytest.approx(0, abs=1e-6)
