"""ListOps: nested lists of operations on digits, to be evaluated (Nangia and Bowman 2018, arXiv 1804.06028).

``[MAX 2 9 [MIN 4 7] 0]`` is 9. With the settings of Long Range Arena (Tay et al. 2021, arXiv 2011.04006): minimum,
maximum, median (rounded down) and sum modulo 10 of 2 to 10 arguments, to a depth of 10, the digits of the innermost
operations included; an argument is an operation with probability 1/4; expressions of 500 to 2000 tokens. Trees are
drawn level by level, thousands at a time, and those of unfit length are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOKENS = ("", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")  # the empty one pads
DEPTH, ARGUMENTS, OPERATION_SHARE = 9, 10, 0.25  # of operations within each other; their digits are the tenth level
_FIRST_OPERATION, _CLOSE = TOKENS.index("[MIN"), TOKENS.index("]")
_TREES = 4096  # at a time

Integers = NDArray[np.int64]


@dataclass
class _Level:
    """All nodes of one depth, children of one parent side by side.

    Attributes:
        tree: which tree a node belongs to.
        parent: position of its parent in the level above.
        token: the digit or operation, an index of `TOKENS`.
        arguments: how many children; 0 for digits.
    """

    tree: Integers
    parent: Integers
    token: Integers
    arguments: Integers


def generate(count: int, seed: int, shortest: int = 500, longest: int = 2000) -> tuple[Tensor, Tensor]:
    """Draw expressions.

    Args:
        count: how many.
        seed: of the generator; every seed is another data set.
        shortest, longest: number of tokens.

    Returns:
        tokens, uint8 of shape ``(count, longest)``, padded with 0 at the end; and values 0 to 9, int64 of shape
        ``(count,)``.
    """
    rng = np.random.default_rng([seed, shortest, longest])
    tokens, values, found = np.zeros((count, longest), np.uint8), np.zeros(count, np.int64), 0
    for levels, trees in _trees(rng, shortest, longest):
        new = min(trees, count - found)
        rows = np.zeros((trees, longest), np.uint8)
        values[found : found + new] = _write(levels, rows)[:new]
        tokens[found : found + new] = rows[:new]
        found += new
        if found == count:
            break
    return torch.from_numpy(tokens), torch.from_numpy(values)


def _trees(rng: np.random.Generator, shortest: int, longest: int) -> Iterator[tuple[list[_Level], int]]:
    """Batches of trees of fit length, and how many they are."""
    while True:
        levels, length = [], np.zeros(_TREES, np.int64)
        tree, parent = np.arange(_TREES), np.zeros(_TREES, np.int64)
        for depth in range(DEPTH + 1):
            # One digit alone would be too short: every tree starts with an operation.
            operation = (rng.random(tree.size) < OPERATION_SHARE) & (depth < DEPTH) if depth else tree >= 0
            kind = rng.integers(_FIRST_OPERATION, _CLOSE, tree.size)
            token = np.where(operation, kind, 1 + rng.integers(0, 10, tree.size))
            arguments = np.where(operation, rng.integers(2, ARGUMENTS + 1, tree.size), 0)
            levels.append(_Level(tree, parent, token, arguments))
            length += np.bincount(tree, 1 + operation, minlength=_TREES).astype(np.int64)
            growing = arguments * (length[tree] <= longest)
            tree, parent = np.repeat(tree, growing), np.repeat(np.arange(tree.size), growing)
        fit = (length >= shortest) & (length <= longest)
        if fit.any():
            yield _keep(levels, fit), int(fit.sum())


def _keep(levels: list[_Level], fit: NDArray[np.bool_]) -> list[_Level]:
    """The trees that fit, numbered anew."""
    number, above = np.cumsum(fit) - 1, np.zeros(0, np.int64)
    kept = []
    for level in levels:
        mask = fit[level.tree]
        parent = above[level.parent[mask]] if kept else level.parent[mask]
        kept.append(_Level(number[level.tree[mask]], parent, level.token[mask], level.arguments[mask]))
        above = np.cumsum(mask) - 1
    return [level for level in kept if level.tree.size]


def _write(levels: list[_Level], rows: NDArray[np.uint8]) -> Integers:
    """Write the tokens of every tree into its row; the trees' values."""
    sizes: list[Integers] = []
    value = below = np.zeros(0, np.int64)
    for level in reversed(levels):
        operation = level.arguments > 0
        size = np.ones(level.tree.size, np.int64)
        here = level.token - 1
        if operation.any():
            starts = np.cumsum(level.arguments[operation]) - level.arguments[operation]
            size[operation] = 2 + np.add.reduceat(below, starts)
            here[operation] = _evaluate(level.token[operation], value, starts, level.arguments[operation])
        value, below = here, size
        sizes.append(size)
    position = np.zeros(levels[0].tree.size, np.int64)
    for depth, (level, size) in enumerate(zip(levels, reversed(sizes), strict=True)):
        if depth:
            before = np.cumsum(size) - size  # tokens of all nodes to the left, of which older cousins do not count
            first = np.flatnonzero(np.diff(level.parent, prepend=-1))
            children = np.diff(np.append(first, level.parent.size))
            position = position[level.parent] + 1 + before - np.repeat(before[first], children)
        rows[level.tree, position] = level.token
        operation = level.arguments > 0
        rows[level.tree[operation], (position + size - 1)[operation]] = _CLOSE
    return value


def _evaluate(operation: Integers, arguments: Integers, starts: Integers, count: Integers) -> Integers:
    """Values of operations on the groups of ``arguments`` that begin at ``starts``."""
    group = np.repeat(np.arange(starts.size), count)
    ordered = arguments[np.lexsort((arguments, group))]
    low, high = ordered[starts + (count - 1) // 2], ordered[starts + count // 2]
    choices = (ordered[starts], ordered[starts + count - 1], (low + high) // 2, np.add.reduceat(arguments, starts) % 10)
    return np.choose(operation - _FIRST_OPERATION, choices)


__all__ = ["TOKENS", "generate"]
