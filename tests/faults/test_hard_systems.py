"""A short form of benchmarks/hard_systems.py, and the same for selective layers: no cut ends in a silent NaN."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
import torch
from harness import Record
from hypothesis import given, settings
from hypothesis import strategies as st

from compressm.errors import CompressmError
from compressm.theory.recurrence import Signals, balance_selective, moments
from compressm.theory.selection import Selection, reduce_selective

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from hard_systems import examine, hard_system


@pytest.mark.slow
def test_certificates_of_hard_systems_are_true(tried: Record) -> None:
    counts = Counter[str]()
    seeds = [seed for seed in range(1000, 1020) if hard_system(seed)[1].n < 100]
    for index, seed in enumerate(seeds):
        _, counted, violations = examine(seed, exact=index % 16 == 0)
        assert not violations
        counts += counted
    assert counts["certificates"] > 240
    assert counts["certificates checked in 50 digits"] > 10
    tried("hard system", len(seeds))


KINDS = ("plain", "slow", "scaled", "dead", "twins", "huge")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(get_args(Selection)), st.sampled_from(KINDS), st.booleans())
def test_selective_layers_with_hard_signals(seed: int, selection: Selection, kind: str, folds_out: bool) -> None:
    """A reduction of finite numbers, or an error of ours."""
    generator = torch.Generator().manual_seed(seed)
    batch, length, d, n = 2, 12, 3, 6

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, step, rates = normal(batch, length, d), normal(batch, length, d).exp(), normal(d, n).exp()
    B, C = normal(batch, length, 1, n), normal(batch, length, 1, n)
    if kind == "slow":
        step, rates = step * 1e-9, rates * 1e-3
    elif kind == "scaled":
        B, C = B * 10 ** (12 * normal(n)).clamp(-12, 12), C * 10 ** (12 * normal(n)).clamp(-12, 12)
    elif kind == "dead":
        B[..., : n // 2], C[..., 1:], x[..., 0] = 0, 0, 0
    elif kind == "twins":
        B[..., 1], C[..., 1], rates[:, 1] = B[..., 0], C[..., 0], rates[:, 0]
    elif kind == "huge":
        x, B = x * 1e25, B * 1e20
    try:
        balancing = balance_selective(moments(Signals(x, step, rates, B, C)))
        assert bool(balancing.energy.isfinite().all())
        reduction = reduce_selective(balancing, 2, folds_out=folds_out, selection=selection)
    except CompressmError:
        return
    assert bool(reduction.into.isfinite().all())
    assert bool(reduction.out.isfinite().all())
