"""Associative recall with many queries, MQAR (Arora et al. 2023, Zoology, arXiv 2312.04927), which is generated.

    k1 v1 k2 v2 ... kN vN | 0 .. 0 k3 0 .. k1 0 ..        after k3 the answer is v3, after k1 it is v1

A sequence begins with N pairs of a key and a value. Then every key is asked for once, in slots of two tokens drawn
without replacement with probabilities ``i^(a - 1)``, a = 0.01, so that most queries come early. What a recurrence can
recall is limited by its state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

POWER = 0.01
NO_ANSWER = -100  # what torch's cross entropy ignores


def generate(count: int, pairs: int, length: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw sequences.

    Args:
        count: how many.
        pairs: of a key and a value, N.
        length: in tokens, at least ``4 * pairs``.
        vocabulary: number of tokens: 0 fills, keys are below the half, values from there. At least ``2 * pairs + 2``.
        seed: of the generator.

    Returns:
        tokens, and answers: at the token after a query its value, `NO_ANSWER` elsewhere. Both int16 of shape
        ``(count, length)``.
    """
    rng, half = np.random.default_rng([seed, pairs, length, vocabulary]), vocabulary // 2
    keys = 1 + _drawn(rng, np.zeros((count, half - 1)), pairs)
    values = half + _drawn(rng, np.zeros((count, vocabulary - half)), pairs)
    slots = (length - 2 * pairs) // 2
    weights = np.broadcast_to((POWER - 1) * np.log(np.arange(1, slots + 1)), (count, slots))
    queries = 2 * pairs + 2 * _drawn(rng, weights, pairs)
    tokens, answers = np.zeros((count, length), np.int16), np.full((count, length), NO_ANSWER, np.int16)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(tokens, queries, keys.astype(np.int16), 1)
    np.put_along_axis(answers, queries + 1, values.astype(np.int16), 1)
    return torch.from_numpy(tokens), torch.from_numpy(answers)


def _drawn(rng: np.random.Generator, logits: np.ndarray, count: int) -> np.ndarray:
    """Indices drawn one after the other without replacement, by the exponents of the logits, shape ``(rows, count)``:
    the largest of logits plus Gumbel noise, in their order (Kool et al. 2019, arXiv 1903.06059)."""
    return np.argsort(-(logits + rng.gumbel(size=logits.shape)), axis=1)[:, :count]


__all__ = ["NO_ANSWER", "generate"]
