"""The generator against a reader of the expressions that knows nothing of trees drawn level by level."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch

from compressm.lab.data.listops import TOKENS, generate


def evaluate(words: list[str]) -> int:
    """The value of an expression, by a stack."""
    operations = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(statistics.median(v)), "[SM": lambda v: sum(v) % 10}
    stack: list[tuple[str, list[int]]] = [("", [])]
    for word in words:
        if word in operations:
            stack.append((word, []))
        elif word == "]":
            name, values = stack.pop()
            assert 2 <= len(values) <= 10
            stack[-1][1].append(operations[name](values))
        else:
            stack[-1][1].append(int(word))
        assert len(stack) <= 10  # nine operations within each other, and the digits of the last
    ((_, (value,)),) = stack
    return value


@pytest.mark.parametrize(("shortest", "longest"), [(5, 40), (100, 400), (500, 2000)])
def test_values_are_those_of_the_expressions(shortest: int, longest: int) -> None:
    tokens, values = generate(60, 3, shortest, longest)
    assert tokens.shape == (60, longest)
    for row, value in zip(tokens.tolist(), values.tolist(), strict=True):
        length = row.index(0) if 0 in row else longest
        assert shortest <= length <= longest
        assert not any(row[length:])
        assert evaluate([TOKENS[token] for token in row[:length]]) == value


def test_a_seed_is_a_data_set() -> None:
    first, again, other = (generate(30, seed, 10, 60) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[0][:10], generate(10, 0, 10, 60)[0])


def test_shares() -> None:
    tokens, values = generate(3000, 0, 10, 400)
    counts = np.bincount(tokens.flatten().numpy(), minlength=len(TOKENS)).astype(float)
    digits, operations = counts[1:11], counts[11:15]
    assert digits.max() < 1.05 * digits.min()
    assert operations.max() < 1.1 * operations.min()
    assert counts[15] == operations.sum()
    assert set(values.tolist()) == set(range(10))
