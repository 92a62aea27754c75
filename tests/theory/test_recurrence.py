from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from compressm.errors import InvalidSystemError
from compressm.theory.recurrence import Moments, Signals, balance_selective, first_states, moments
from helpers import random_signals


def brute_force(s: Signals) -> tuple[np.ndarray, np.ndarray]:
    """P and W by running every channel on its own."""
    x, step, B, C = (v.double().numpy() for v in (s.x, s.step, s.B, s.C))
    batch, length, d = x.shape
    groups, n = B.shape[2:]
    rates = s.rates.double().expand(d, n).numpy()
    gain = np.ones_like(x) if s.gain is None else s.gain.double().numpy()
    P, W = np.zeros((groups, n, n)), np.zeros((groups, n, n))
    for b in range(batch):
        for c in range(d):
            g, h = c // (d // groups), np.zeros(n)
            for t in range(length):
                h = np.exp(-step[b, t, c] * rates[c]) * h + x[b, t, c] * B[b, t, g]
                P[g] += gain[b, t, c] ** 2 * np.outer(h, h)
        for g in range(groups):
            W[g] += C[b, :, g].T @ C[b, :, g]
    return P, W


@pytest.mark.parametrize("scalar_decay", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_moments_are_those_of_the_recurrence(scalar_decay: bool, groups: int) -> None:
    signals = random_signals(0, d=6, n=5, groups=groups, scalar_decay=scalar_decay)
    found = moments(signals)
    P, W = brute_force(signals)
    np.testing.assert_allclose(found.P.numpy(), P, rtol=1e-4, atol=1e-5 * P.max())
    np.testing.assert_allclose(found.W.numpy(), W, rtol=1e-4, atol=1e-5 * W.max())
    np.testing.assert_allclose(found.V, torch.einsum("blgi,blgj->gij", signals.B, signals.B), rtol=1e-4, atol=1e-4)
    assert found.tokens == signals.x.shape[0] * signals.x.shape[1]


def test_moments_add_over_batches_and_forget() -> None:
    signals = random_signals(1, batch=4, d=3)
    halves = [
        Signals(*(v[i : i + 2] if v.shape[0] == 4 else v for v in (signals.x, signals.step, signals.rates,
                                                                   signals.B, signals.C, signals.gain)))
        for i in (0, 2)
    ]  # fmt: skip
    first, second, whole = moments(halves[0]), moments(halves[1]), moments(signals)
    for name, value in first.plus(second).tensors().items():
        torch.testing.assert_close(value, whole.tensors()[name], rtol=1e-5, atol=1e-6)
    faded = first.plus(second, 0.5)
    torch.testing.assert_close(faded.P, 0.5 * first.P + second.P)
    assert Moments(**faded.tensors()).P is faded.P


def test_hankel_singular_values_of_a_scalar_decay_are_invariant() -> None:
    # The Hankel operator does not know in which basis the keys and queries are written.
    found = moments(random_signals(2, n=5, scalar_decay=True))
    T = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inverse = torch.linalg.inv(T)
    other = replace(found, P=T @ found.P @ T.mT, W=inverse.mT @ found.W @ inverse)
    torch.testing.assert_close(balance_selective(found).hsv, balance_selective(other).hsv, rtol=1e-6, atol=1e-9)
    product = torch.linalg.eigvals((found.P @ found.W)[0] / found.tokens**2).real
    torch.testing.assert_close(balance_selective(found).hsv[0].square().sort().values, product.sort().values)


def test_moments_that_are_not_finite_are_refused() -> None:
    found = moments(random_signals(4))
    found.P[0, 0, 0] = math.nan
    with pytest.raises(InvalidSystemError, match="moments P of a selective layer are not finite"):
        balance_selective(found)


def test_first_states_shrink_and_grow() -> None:
    shrunk, grown = first_states(5, 3, 2), first_states(3, 5)
    assert shrunk.into.shape == shrunk.out.shape == (2, 3, 5)
    assert grown.into.shape == (1, 5, 3)
    assert grown.states == 5
    assert not grown.into[0, 3:].any()
