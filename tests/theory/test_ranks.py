from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressm.errors import InvalidRankRuleError
from compressm.theory.ranks import RankRule, choose_ranks, passes_gate

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
