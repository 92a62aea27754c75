from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from compressm.theory.evidence import Covariances
from compressm.theory.fisher import MaskFisher
from compressm.theory.recurrence import Moments
from compressm.theory.sums import Sums

# What is a sum of weights w fades with the memory, and what is a sum of w^2 with its square.
QUADRATIC = {
    Covariances: {"weights", "spread_states", "spread_adjoints"},
    MaskFisher: {"weights", "squares"},
    Moments: set[str](),
}


def some(kind: type[Sums], size: int, seed: int) -> Sums:
    generator = torch.Generator().manual_seed(seed)
    names = [field.name for field in fields(kind)]
    return kind(**{name: torch.rand(size, size, dtype=torch.float64, generator=generator) for name in names})


@pytest.mark.parametrize("kind", QUADRATIC)
def test_what_was_seen_before_fades(kind: type[Sums]) -> None:
    before, now = some(kind, 3, 0), some(kind, 3, 1)
    for name, value in now.after(before, 0.9).tensors().items():
        share = 0.81 if name in QUADRATIC[kind] else 0.9
        torch.testing.assert_close(value, share * before.tensors()[name] + now.tensors()[name])


@pytest.mark.parametrize("kind", QUADRATIC)
def test_what_was_seen_of_another_layer_is_forgotten(kind: type[Sums]) -> None:
    now = some(kind, 3, 1)
    other = Moments if kind is not Moments else MaskFisher
    assert now.after(None, 0.9) is now
    assert now.after(some(kind, 4, 0), 0.9) is now  # from before a cut
    assert now.after(some(other, 3, 0), 0.9) is now
