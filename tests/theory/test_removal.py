"""Costs of removed states, against a recurrence run channel by channel in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressm.theory.recurrence import Signals, balance_selective, moments, removal_costs
from compressm.theory.selection import reduce_selective


def delta_signals(seed: int, heads: int, groups: int, n: int, per_channel: bool) -> Signals:
    """A gated delta rule whose heads of values share heads of keys."""
    g = torch.Generator().manual_seed(seed)
    batch, length, p = 2, 11, 2
    d = heads * p

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, C = (torch.nn.functional.normalize(normal(batch, length, groups, n), dim=-1) for _ in range(2))
    beta = normal(batch, length, heads if per_channel else groups).sigmoid()
    erase = beta.repeat_interleave(p, -1) if per_channel else beta
    return Signals(
        normal(batch, length, d), normal(batch, length, d).exp() / 5, torch.ones(1, 1, dtype=torch.float64), B, C,
        normal(batch, length, d), erase, removed=True,
    )  # fmt: skip


def looped(s: Signals) -> tuple[Tensor, Tensor, Tensor]:
    """Reads, erasures and stored, by a loop over sequences, channels and time."""
    (batch, length, d), (groups, n) = s.x.shape, s.B.shape[2:]
    reads, erasures = torch.zeros(2, groups, n, n, dtype=torch.float64)
    stored = torch.zeros(groups, dtype=torch.float64)
    assert s.erase is not None
    assert s.gain is not None
    for b in range(batch):
        for c in range(d):
            group, h = c // (d // groups), torch.zeros(n, dtype=torch.float64)
            for t in range(length):
                key, beta = s.B[b, t, group], s.erase[b, t, c * s.erase.shape[-1] // d]
                h = torch.exp(-s.step[b, t, c]) * h
                erasures[group] += beta**2 * torch.outer(h * key, h * key)
                new = s.x[b, t, c] - beta * (h @ key)
                stored[group] += new**2
                h = h + new * key
                seen = s.gain[b, t, c] * s.C[b, t, group] * h
                reads[group] += torch.outer(seen, seen)
    return reads, erasures, stored


@given(st.integers(0, 1000), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.integers(2, 5), st.booleans())
@settings(max_examples=10)
def test_sums_are_those_of_a_loop(seed: int, heads: tuple[int, int], n: int, per_channel: bool) -> None:
    signals = delta_signals(seed, *heads, n, per_channel)
    found = moments(signals)
    reads, erasures, stored = looped(signals)
    torch.testing.assert_close(found.reads, reads, rtol=1e-4, atol=1e-5 * float(reads.abs().max()))
    torch.testing.assert_close(found.erasures, erasures, rtol=1e-4, atol=1e-5 * float(erasures.abs().max()))
    torch.testing.assert_close(found.stored, stored, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 1000), st.integers(1, 3))
@settings(max_examples=10)
def test_the_error_said_of_a_cut_is_that_of_the_removed_contributions(seed: int, states: int) -> None:
    signals = delta_signals(seed, 4, 2, 4, True)
    balancing = balance_selective(moments(signals))
    reduction = reduce_selective(balancing, states, folds_out=False)
    costs, kept = removal_costs(balancing), reduction.kept
    assert costs is not None
    assert kept is not None
    reads, erasures, stored = looped(signals)
    gone = torch.ones(2, 4, dtype=torch.float64).scatter_(1, kept, 0.0)
    lost = torch.einsum("gi,gij,gj->g", gone, reads, gone)
    wrong = torch.einsum("gi,gij,gj->g", gone, erasures, gone) / stored * reads.sum((1, 2))
    expected = float((lost + wrong).sum() / reads.sum()) ** 0.5
    assert abs(reduction.estimate.relative_error - expected) < 1e-3 * expected + 1e-6
    assert reduction.estimate.least_error <= reduction.estimate.relative_error


def test_other_layers_do_not_gather_them() -> None:
    signals = delta_signals(0, 2, 2, 3, False)
    found = moments(Signals(signals.x, signals.step, signals.rates, signals.B, signals.C))
    assert removal_costs(balance_selective(found)) is None
    assert "reads" not in found.tensors()
    assert found.plus(found).reads is None
