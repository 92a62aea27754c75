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


def by_loop(s: Signals, present: np.ndarray, padding_enters: bool) -> dict[str, np.ndarray]:
    """All moments, one sequence, channel and token after the other in float64; padding is at either end."""
    x, step, B, C = (v.double().numpy() for v in (s.x, s.step, s.B, s.C))
    batch, length, d = x.shape
    groups, n = B.shape[2:]
    gain = np.ones((batch, length, d)) if s.gain is None else s.gain.double().numpy()
    rates = s.rates.double().expand(d, n).numpy()
    names = ("P", "W", "V", "B", "C", "rates")
    found = {name: np.zeros((groups, n, n) if name in "PWV" else (groups, n)) for name in names}
    for b, c in np.ndindex(batch, d):
        g, h = c // (d // groups), np.zeros(n) if s.state is None else s.state[b, c].double().numpy()
        for t in range(length):
            if not (present[b, t] or padding_enters):
                continue
            clock = step[b, t, g] if step.ndim == 4 else step[b, t, c] * rates[c]
            h = np.exp(-clock) * h
            if s.erase is not None:
                h = h - float(s.erase[b, t, g]) * (h @ B[b, t, g]) * B[b, t, g]
            h = h + x[b, t, c] * B[b, t, g]
            if present[b, t]:
                seen = h * (gain[b, t, g] if gain.ndim == 4 else gain[b, t, c])
                found["P"][g] += np.outer(seen, seen)
                found["rates"][g] += clock / (d // groups) if step.ndim == 4 else rates[c] / (d // groups)
    for b, t, g in np.ndindex(batch, length, groups):
        if present[b, t]:
            found["V"][g] += np.outer(B[b, t, g], B[b, t, g])
            found["B"][g] += B[b, t, g]
            found["W"][g] += C[:, g].T @ C[:, g] if C.ndim == 3 else np.outer(C[b, t, g], C[b, t, g])
            found["C"][g] += C[:, g].sum(0) if C.ndim == 3 else C[b, t, g]
    if s.erase is not None:  # the erasure reads along B what the output reads along C, both with the same weight
        for g in range(groups):
            found["W"][g] += found["V"][g] * np.trace(found["W"][g]) / np.trace(found["V"][g])
    return {**found, "tokens": np.asarray(present.sum())}


@pytest.mark.parametrize("padding_enters", [False, True])
@pytest.mark.parametrize("kind", ["S6", "clocks of states", "delta rule", "carried state", "fixed outputs", "no gain"])
def test_moments_of_every_kind_of_recurrence_are_those_of_a_loop(kind: str, padding_enters: bool) -> None:
    # 70 steps: more than are summed in float32.
    s, generator = random_signals(3, batch=3, length=70, d=4, n=3, groups=2), torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    changes: dict[str, dict[str, torch.Tensor | None]] = {
        "S6": {},
        "clocks of states": {"step": draw(3, 70, 2, 3), "rates": torch.ones(1, 1), "gain": draw(3, 70, 2, 3)},
        "delta rule": {"erase": draw(3, 70, 2), "B": torch.nn.functional.normalize(s.B, dim=-1)},
        "carried state": {"state": draw(3, 4, 3)},
        "fixed outputs": {"C": draw(5, 2, 3)},
        "no gain": {"gain": None},
    }
    s = replace(s, **changes[kind])  # type: ignore[arg-type]
    places, ends = torch.arange(70), torch.tensor([[70], [41], [70]])
    present = (places < ends) & (places >= torch.tensor([[0], [0], [0 if kind == "carried state" else 13]]))
    for mask, found in (
        (present, moments(s, present, padding_enters=padding_enters)),
        (torch.ones(3, 70), moments(s, padding_enters=padding_enters)),
    ):
        for name, expected in by_loop(s, mask.numpy(), padding_enters).items():
            value, size = found.tensors()[name], abs(expected).max()
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5 * size, err_msg=name)


def test_a_placeholder_knows_its_sizes_and_no_error() -> None:
    for n, states in ((5, 3), (3, 5)):
        estimate = first_states(n, states, 2).estimate
        assert (estimate.states_before, estimate.states_after) == (n, states)
        assert math.isnan(estimate.relative_error)
        assert math.isnan(estimate.least_error)
    kept = first_states(3, 5).kept
    assert kept is not None
    assert kept.tolist() == [[0, 1, 2, 2, 2]]
