"""Truncations under rules, held against all truncations that there are."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from compressm.theory.balancing import Balancing, balance, truncate
from compressm.theory.rank_rule import RankRule
from compressm.theory.ruled_truncation import truncate_by_rule
from compressm.theory.systems import DiagonalSystem
from helpers import random_system


def real_poles(n: int = 12) -> DiagonalSystem:
    """Real eigenvalues, of which each takes a complex state of its own, so that a truncation has more than half."""
    generator = torch.Generator().manual_seed(0)
    B, C = (torch.randn(shape, dtype=torch.complex128, generator=generator) for shape in ((n, 3), (3, n)))
    return DiagonalSystem(torch.linspace(-0.9, 0.95, n, dtype=torch.float64), B, C)


def discards_at_most(balanced: Balancing, discarded: torch.Tensor, share: float) -> bool:
    return bool((discarded <= share * balanced.hsv.sum(-1) * (1 + 1e-9)).all())


@pytest.mark.parametrize("system", [random_system(3, n=12), real_poles()], ids=["pairs", "real"])
@pytest.mark.parametrize("multiple_of", [1, 3])
def test_a_promise_is_kept_with_states_in_multiples(system: DiagonalSystem, multiple_of: int) -> None:
    balanced = balance(system)
    cuts = {states: truncate(balanced, states, exceed=True) for states in range(1, 13)}
    for tolerance, states in product((0.3, 0.05, 0.01), range(1, 12)):
        found = truncate_by_rule(balanced, states, RankRule(tolerance=tolerance, multiple_of=multiple_of))
        first = cuts[states]
        enough = discards_at_most(balanced, first.discarded, tolerance)
        rounded_up = -(-first.system.n // multiple_of) * multiple_of
        if found is None:  # the layer has no more states than the cut would need
            assert rounded_up >= 12 or not enough
            continue
        assert discards_at_most(balanced, found.discarded, tolerance)
        assert found.system.n % multiple_of == 0
        assert found.system.n < 12
        # Where the number that was asked for is enough, no more than its next multiple is taken.
        assert found.system.n == rounded_up if enough else found.system.n > first.system.n
        assert float(found.discarded) <= float(first.discarded)


def test_a_promise_for_comparisons_is_not_kept() -> None:
    balanced = balance(random_system(3, n=12)).rearranged("smallest")
    found = truncate_by_rule(balanced, 4, RankRule(tolerance=0.01), promises=False)
    assert found is not None
    assert not discards_at_most(balanced, found.discarded, 0.01)
    assert torch.equal(found.system.B, truncate(balanced, 4, exceed=True).system.B)


@pytest.mark.parametrize("multiple_of", [1, 2, 4])
def test_a_limit_is_never_exceeded_and_idle_states_fill_a_multiple_only(multiple_of: int) -> None:
    balanced = balance(real_poles())
    fewer = 0
    for states in range(1, 13):
        plain = truncate(balanced, states)
        found = truncate_by_rule(balanced, states, RankRule(states=12, multiple_of=multiple_of))
        assert found is not None
        filled = multiple_of > 1 and states % multiple_of == 0
        assert found.system.n == (states if filled else plain.system.n) <= states
        assert torch.equal(found.discarded, plain.discarded)
        torch.testing.assert_close(found.system.kernel(9), plain.system.kernel(9))
        fewer += plain.system.n < states
    assert fewer > 0  # otherwise nothing had to be filled


def test_multiples_are_filled_with_states_that_lessen_the_error() -> None:
    balanced = balance(random_system(5, n=12, radius=(0.5, 0.99)))
    found = truncate_by_rule(balanced, 5, RankRule(tolerance=0.9, multiple_of=4))
    assert found is not None
    assert found.system.n == 8
    assert float(found.discarded) == pytest.approx(float(truncate(balanced, 8).discarded))
    # The layer's own size is the only multiple that is left.
    assert truncate_by_rule(balanced, 9, RankRule(tolerance=0.9, multiple_of=8)) is None
    assert truncate_by_rule(balanced, 12, RankRule(tolerance=0.9)) is None
