"""How far a cut goes: rules at each cut, without any training."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressm.errors import InvalidRankRuleError
from compressm.training.goal import Goal, initial_dims, initial_dims_of, started_with, towards, wanted_rule


def goal(initial: int = 64, **arguments: Any) -> Goal:
    return Goal(wanted_rule(**arguments), initial)


def test_without_a_rule_a_cut_is_cautious() -> None:
    rule = wanted_rule()
    assert (rule.tolerance, rule.max_reduction) == (0.02, 0.5)
    for name, value in {"tolerance": 0.1, "states": 4, "fraction": 0.5, "max_error": 1.0, "total_states": 9}.items():
        rule = wanted_rule(**{name: value}, min_reduction=0.2, per_layer=True)
        assert (getattr(rule, name), rule.min_reduction, rule.per_layer) == (value, 0.2, True)
        # A rule about quality leaves half of the states to the cuts that follow; one about size says where to end.
        assert rule.max_reduction == (0.5 if name in ("tolerance", "max_error") else 1.0)
        assert wanted_rule(**{name: value}, max_reduction=0.7).max_reduction == 0.7
    with pytest.raises(InvalidRankRuleError, match="exactly one"):
        wanted_rule(states=4, fraction=0.5)


def test_promises_are_the_same_at_every_cut_and_half_as_much_after_a_setback() -> None:
    for left in (4, 1):
        assert goal(tolerance=0.2).rule_now([32, 32], left) == goal(tolerance=0.2).rule
        milder = goal(tolerance=0.2).rule_now([32, 32], left, 0.25)
        assert (milder.tolerance, milder.max_reduction) == (0.05, 0.125)
        milder = goal(max_error=3.0).rule_now([32], left, 0.5)
        assert (milder.max_error, milder.max_reduction) == (1.5, 0.25)
    assert goal().rule_now([32], 1, 0.5).max_reduction == 0.25


@pytest.mark.parametrize(("first", "last", "cuts"), [(32, 8, 4), (256, 16, 4), (100, 1, 7), (10, 9, 3)])
def test_states_are_reached_with_the_last_cut_in_equal_proportions(first: int, last: int, cuts: int) -> None:
    states = first
    for index in range(cuts):
        limit = goal(states=last).rule_now([states, 1], cuts - index).states
        assert limit is not None
        ideal = first * (last / first) ** ((index + 1) / cuts)
        assert abs(limit - ideal) <= 1.5  # every cut rounds, and the next one starts from there
        states = limit
    assert states == last


def test_a_fraction_is_of_the_states_at_the_start() -> None:
    share, one = 1.0, goal(fraction=0.1)
    for left in (4, 3, 2, 1):
        now = one.rule_now([share * 40, share * 24], left).fraction  # type: ignore[list-item]  # exact sizes
        assert now == pytest.approx(0.1 ** (1 / 4))
        share *= now
    assert share == pytest.approx(0.1)
    assert one.rule_now([3, 3], 1).fraction == 1.0  # smaller than asked for already
    assert one.rule_now([64], 1, 0.5).fraction == pytest.approx(math.sqrt(0.1))


def test_a_budget_is_approached_by_all_layers_together() -> None:
    assert goal(total_states=16).rule_now([32, 32], 2).total_states == 32
    assert goal(total_states=16).rule_now([32, 32], 1).total_states == 16
    assert goal(total_states=16).rule_now([32, 32], 1, 0.5).total_states == 32  # half of the way
    assert goal(total_states=16).rule_now([5, 5], 1).total_states == 10


def test_half_of_the_way_is_the_geometric_middle() -> None:
    assert towards(32, 2, 0.5) == 8
    assert towards(32, 2, 1.0) == 2
    assert towards(32, 2, 0.0) == 32
    assert towards(4, 8, 1.0) == 4
    assert goal(states=2).rule_now([32, 30], 1, 0.5).states == 8


def test_a_cut_that_would_take_less_than_the_least_is_too_mild() -> None:
    whole = goal(tolerance=0.1, max_reduction=1.0)
    assert [whole.too_mild(2.0**-k) for k in range(6)] == [False] * 5 + [True]  # 0.05 of the states
    for half in (goal(), goal(tolerance=0.1)):  # half of them is the most
        assert [half.too_mild(2.0**-k) for k in range(6)] == [False] * 4 + [True] * 2
    assert not goal(tolerance=0.1, min_reduction=0.0).too_mild(1e-9)


def smallest(sizes: list[int], cuts: int, most: float) -> list[int]:
    """State dimensions after cuts that each remove as many whole states as a share of them allows."""
    for _ in range(cuts):
        sizes = [n - math.floor(most * n + 1e-9) for n in sizes]
    return sizes


@given(
    st.lists(st.integers(2, 200), min_size=1, max_size=3), st.integers(1, 6), st.sampled_from([0.1, 0.3, 0.5, 1.0]),
    st.sampled_from(["states", "fraction", "total_states"]), st.floats(0.01, 1.0),
)  # fmt: skip
def test_a_size_that_the_largest_cuts_do_not_reach_is_out_of_reach(
    sizes: list[int], cuts: int, most: float, rule: str, share: float
) -> None:
    dims = {str(index): n for index, n in enumerate(sizes)}
    asked: float = {"states": max(1, round(share * max(sizes))), "fraction": share}.get(rule, 0)
    asked = asked or max(len(sizes), round(share * sum(sizes)))
    one = goal(sum(sizes), **{rule: asked}, max_reduction=most, min_reduction=0.0)
    best = smallest(sizes, cuts, most)
    reached = {
        "states": max(best) <= asked,
        "fraction": sum(n for n in best if n > 1) <= share * sum(sizes) + 1e-9,
        "total_states": sum(best) <= asked,
    }
    if not reached[rule]:
        assert f"{rule}={asked:g} is out of reach: {cuts} cuts" in one.obstacle(dims, cuts)
    if share * min(sizes) >= 1 and most == 1.0:
        assert one.obstacle(dims, cuts) == ""


def test_the_first_sizes_are_read_from_a_state_of_any_version() -> None:
    layers = [{"name": "a", "states_before": 32, "states_after": 20}]
    cut, kept = {"kind": "cut", "layers": layers}, {"kind": "kept", "layers": []}
    later = {"kind": "cut", "layers": [{"name": "a", "states_before": 20, "states_after": 10}]}
    old = {"state_dims": {"a": 10, "b": 7}, "history": [kept, cut, kept, later]}
    assert initial_dims_of(old) == {"a": 32, "b": 7}
    assert initial_dims_of({**old, "history": []}) == {"a": 10, "b": 7}
    assert initial_dims_of({**old, "initial_dims": {"a": 40, "b": 7}}) == {"a": 40, "b": 7}


def test_the_first_sizes_hold_for_compressors_that_are_built_in_the_block() -> None:
    with started_with({"a": 32}):
        assert initial_dims({"a": 10}) == {"a": 32}
        assert initial_dims({"b": 10}) == {"b": 10}  # another model
    assert initial_dims({"a": 10}) == {"a": 10}
