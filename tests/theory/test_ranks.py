from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressm.errors import InvalidRankRuleError
from compressm.theory.rank_rule import RankRule
from compressm.theory.ranks import choose_ranks, passes_gate

ENERGY = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.5])  # sums to 16


def rank(rule: RankRule, energy: torch.Tensor = ENERGY) -> int:
    return choose_ranks({"layer": energy}, rule)["layer"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (RankRule(tolerance=0.0), 6),  # nothing may go
        (RankRule(tolerance=0.03125), 5),  # exactly the last state's share
        (RankRule(tolerance=0.0625), 4),
        (RankRule(tolerance=0.0624), 5),
        (RankRule(tolerance=0.49), 2),
        (RankRule(tolerance=0.5), 1),
        (RankRule(states=3), 3),
        (RankRule(states=99), 6),
        (RankRule(fraction=0.5), 3),
        (RankRule(fraction=1.0), 6),
        (RankRule(fraction=0.01), 1),
        (RankRule(max_error=0.0), 6),
        (RankRule(max_error=2.0), 4),  # twice the tail 1
        (RankRule(max_error=1e9), 1),
        (RankRule(total_states=4), 4),
        (RankRule(states=5, multiple_of=4), 4),  # at most
        (RankRule(states=6, multiple_of=4), 6),  # within the limit already
        (RankRule(tolerance=0.5, multiple_of=4), 4),  # at least
        (RankRule(tolerance=0.0624, multiple_of=4), 6),  # never more than there are
        (RankRule(states=1, max_reduction=0.5), 3),
        (RankRule(states=1, max_reduction=0.4), 4),  # 2.4 may go
        (RankRule(tolerance=0.0624, max_reduction=0.5), 5),  # the rule cuts less
    ],
)
def test_rules(rule: RankRule, expected: int) -> None:
    assert rank(rule) == expected


def test_zero_energy_beyond_the_minimal_order_goes_at_tolerance_zero() -> None:
    assert rank(RankRule(tolerance=0.0), torch.tensor([3.0, 1.0, 0.0, 0.0])) == 2


def test_batch_keeps_what_its_most_demanding_member_needs() -> None:
    energy = torch.tensor([[8.0, 1.0, 1.0], [8.0, 0.1, 0.01]])
    assert rank(RankRule(tolerance=0.05), energy) == 3


def test_budget_goes_where_the_energy_is() -> None:
    energies = {"even": torch.ones(4), "steep": torch.tensor([100.0, 1.0, 0.1, 0.01])}
    assert choose_ranks(energies, RankRule(total_states=5)) == {"even": 4, "steep": 1}
    assert choose_ranks(energies, RankRule(total_states=99)) == {"even": 4, "steep": 4}
    with pytest.raises(InvalidRankRuleError, match="less than one state"):
        choose_ranks(energies, RankRule(total_states=1))


@given(
    values=st.lists(st.floats(0, 1e6), min_size=1, max_size=30).map(lambda v: sorted(v, reverse=True)),
    tolerance=st.floats(0, 0.999),
)
def test_tolerance_keeps_the_smallest_rank_that_is_enough(values: list[float], tolerance: float) -> None:
    energy = torch.tensor(values, dtype=torch.float64)
    r, total = rank(RankRule(tolerance=tolerance), energy), math.fsum(values)
    slack = 1e-12 * total  # of summing in doubles
    assert math.fsum(values[r:]) <= tolerance * total + slack
    assert r == 1 or math.fsum(values[r - 1 :]) >= tolerance * total - slack


def test_gate() -> None:
    rule = RankRule(tolerance=0.1)
    assert passes_gate(100, 95, rule)
    assert not passes_gate(100, 96, rule)
    assert not passes_gate(100, 100, RankRule(tolerance=0.1, min_reduction=0.0))
    assert passes_gate(100, 99, RankRule(tolerance=0.1, min_reduction=0.0))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "exactly one of"),
        ({"tolerance": 0.1, "states": 4}, "tolerance=0.1, states=4"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"tolerance": "0.1"}, "tolerance"),
        ({"states": 0}, "states"),
        ({"states": 2.5}, "states"),
        ({"states": True}, "states"),
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.1}, "fraction"),
        ({"max_error": -1.0}, "max_error"),
        ({"total_states": 0}, "total_states"),
        ({"states": 4, "multiple_of": 0}, "multiple_of"),
        ({"states": 4, "min_reduction": 1.0}, "min_reduction"),
        ({"states": 4, "max_reduction": 0.0}, "max_reduction"),
    ],
)
def test_bad_rules_are_refused_by_name(arguments: dict[str, float], named: str) -> None:
    with pytest.raises(InvalidRankRuleError, match=named):
        RankRule(**arguments)  # type: ignore[arg-type]


def test_a_budget_is_paid_for_by_every_layer_that_shares_a_size() -> None:
    # Two layers of one size cost two states a step; with a third on its own, the budget is spent and not overspent.
    flat = {"a": torch.ones(10), "b": torch.ones(10)}
    for total, each in ((12, 6), (13, 6), (2, 1), (3, 1), (20, 10), (99, 10)):
        assert choose_ranks(flat, RankRule(total_states=total), alike=["a", "b"]) == {"a": each, "b": each}
    energies = {**flat, "alone": torch.ones(10) * torch.tensor([0.5] * 2 + [2.0] + [0.5] * 7).sort().values.flip(0)}
    for total in range(3, 31):
        ranks = choose_ranks(energies, RankRule(total_states=total), alike=["a", "b"])
        assert ranks["a"] == ranks["b"]
        assert sum(ranks.values()) <= total
        left = total - sum(ranks.values())
        assert left < 1 or ranks["alone"] == 10  # nothing is left over that a layer could have had
        assert left < 2 or ranks["a"] == 10
    with pytest.raises(InvalidRankRuleError, match="less than one state for each of 2 layers"):
        choose_ranks(flat, RankRule(total_states=1), alike=["a", "b"])


def test_a_shared_size_goes_to_layers_by_the_mean_of_their_shares() -> None:
    # The third state brings the two layers 0.10 on average, and the lone one 0.15 or 0.05.
    shared = {"a": torch.tensor([0.5, 0.3, 0.2]), "b": torch.tensor([0.7, 0.3, 0.0])}
    for third, expected in ((0.15, {"a": 2, "b": 2, "alone": 3}), (0.05, {"a": 3, "b": 3, "alone": 2})):
        energies = {**shared, "alone": torch.tensor([0.5, 0.5 - third, third])}
        # When two states are left, a third one for both of these layers takes them, and one for the other leaves one.
        assert choose_ranks(energies, RankRule(total_states=8), alike=["a", "b"]) == expected


@pytest.mark.parametrize("allowed", [2.0, 1.99, 1.0, 4.0, 8.0, 7.99])
def test_an_error_allows_half_as_much_energy(allowed: float) -> None:
    # The bound of a truncation is twice the sum of what goes: 1 state 0.5, 2 states 1, then 2, 4, 8.
    kept = next(r for r in range(1, 7) if 2 * float(ENERGY[r:].sum()) <= allowed)
    assert rank(RankRule(max_error=allowed)) == kept
