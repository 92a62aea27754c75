from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressm.errors import InvalidRankRuleError
from compressm.theory import loss_budget
from compressm.theory.loss_budget import FLOOR, Offer, calibrated, linear_curve


def curve(*damages: float) -> torch.Tensor:
    return torch.tensor([*damages, 0.0], dtype=torch.float64)


def offers(curves: dict[str, torch.Tensor], floor: float) -> list[Offer]:
    return [Offer.of([one], range(1, one.shape[0]), floor) for one in curves.values()]


def within_loss(curves: dict[str, torch.Tensor], allowed: float, floor: float = FLOOR) -> dict[str, int]:
    return dict(zip(curves, loss_budget.within_loss(offers(curves, floor), allowed), strict=True))


def within_states(curves: dict[str, torch.Tensor], states: int, floor: float = FLOOR) -> dict[str, int]:
    return dict(zip(curves, loss_budget.within_states(offers(curves, floor), states), strict=True))


def total(curves: dict[str, torch.Tensor], ranks: dict[str, int]) -> float:
    return sum(float(one[ranks[name]]) for name, one in curves.items())


def test_the_curve_of_a_linear_layer_is_the_sum_of_what_goes() -> None:
    damage = torch.tensor([[4.0, 2.0, 1.0], [1.0, 0.5, 0.25]], dtype=torch.float64)
    assert linear_curve(damage).tolist() == [8.75, 3.75, 1.25, 0.0]


@st.composite
def convex_curves(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    made = {}
    for name in draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True)):
        steps = sorted(draw(st.lists(st.floats(0.01, 10), min_size=1, max_size=5)))  # what each state costs
        made[name] = linear_curve(torch.tensor(steps[::-1], dtype=torch.float64))
    return made


@given(curves=convex_curves(), share=st.floats(0, 1))
def test_of_convex_curves_both_budgets_are_optimal(curves: dict[str, torch.Tensor], share: float) -> None:
    sizes = [range(1, one.shape[0]) for one in curves.values()]
    plans = [dict(zip(curves, ranks, strict=True)) for ranks in product(*sizes)]
    most = sum(one.shape[0] - 1 for one in curves.values())
    states = len(curves) + round(share * (most - len(curves)))
    found = within_states(curves, states)
    assert sum(found.values()) == states
    best = min(total(curves, plan) for plan in plans if sum(plan.values()) == states)
    assert total(curves, found) == pytest.approx(best)
    allowed = share * sum(float(one[1]) for one in curves.values())
    within = within_loss(curves, allowed)
    fewest = min(sum(plan.values()) for plan in plans if total(curves, plan) <= allowed * (1 + 1e-12))
    assert total(curves, within) <= allowed * (1 + 1e-9)
    # Steps in order of their cost leave less than one step unused.
    assert sum(within.values()) == fewest


def test_a_plateau_is_passed_where_the_way_beyond_it_is_cheap() -> None:
    # One state less costs nothing worth having; five less cost as much, and less each than those of b.
    curves = {"a": curve(9.0, 1.0, 1.0, 1.0, 1.0, 1.0), "b": curve(9.0, 2.0, 1.5, 1.0, 0.75, 0.5)}
    assert within_loss(curves, 1.0) == {"a": 1, "b": 6}
    assert within_states(curves, 7) == {"a": 1, "b": 6}


def test_every_layer_keeps_its_floor() -> None:
    curves = {"used": linear_curve(torch.ones(64)), "idle": linear_curve(torch.full((64,), 1e-6))}
    assert within_states(curves, 48) == {"used": 44, "idle": 4}
    assert within_loss(curves, 1e-3)["idle"] == 4
    assert within_states(curves, 48, floor=0.25) == {"used": 32, "idle": 16}
    assert within_loss(curves, 0.0) == {"used": 64, "idle": 64}


def test_a_calibrated_curve_goes_through_what_was_measured_and_keeps_its_form_between() -> None:
    estimate = linear_curve(torch.logspace(2, -4, 24, dtype=torch.float64))
    found = calibrated(estimate, {2: float(estimate[2]) / 16, 8: float(estimate[8]) / 4})
    ratio = estimate[:-1] / found[:-1]
    torch.testing.assert_close(ratio[[0, 1, 2]], torch.full((3,), 16.0, dtype=torch.float64))
    assert float(ratio[5]) == pytest.approx(8)
    torch.testing.assert_close(ratio[8:], torch.full((16,), 4.0, dtype=torch.float64))
    assert float(found[24]) == 0
    assert torch.equal(calibrated(estimate, {}), estimate)
    uneven = calibrated(estimate, {2: 1e-9, 8: 1.0})
    assert bool((uneven[:-1] >= uneven[1:]).all())


def test_bad_budgets_are_refused() -> None:
    curves = {"a": curve(3.0, 1.0), "b": curve(3.0, 1.0)}
    with pytest.raises(InvalidRankRuleError, match="layers' floors need"):
        within_states(curves, 1)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidRankRuleError, match="max_loss must be"):
            within_loss(curves, bad)
    with pytest.raises(InvalidRankRuleError, match="floor must be"):
        within_loss(curves, 1.0, floor=2.0)


def test_layers_that_share_a_size_are_counted_together() -> None:
    # Two layers that share a size: a step of one state frees two.
    shared = Offer.of([curve(9.0, 4.0, 1.0), curve(9.0, 2.0, 1.0)], range(1, 4))
    alone = Offer.of([curve(9.0, 2.5, 1.2)], range(1, 4))
    assert list(shared.damages) == [6.0, 2.0, 0.0]
    assert loss_budget.within_states([shared, alone], 7) == [2, 3]  # 1.0 a state, and the other would cost 1.2
    assert loss_budget.within_states([shared, alone], 6) == [2, 2]
    assert loss_budget.within_loss([shared, alone], 2.0) == [2, 3]
    assert loss_budget.within_loss([shared, alone], 1.9) == [3, 2]


def test_sizes_in_multiples_stay_within_the_budget() -> None:
    offer = Offer.of([linear_curve(torch.logspace(2, -4, 24, dtype=torch.float64))], [8, 16, 24])
    assert sorted(loss_budget.within_states([offer, offer], 40)) == [16, 24]
    assert sum(loss_budget.within_states([offer, offer], 39)) == 32


def test_floors_of_nothing_and_of_everything() -> None:
    curves = {"a": linear_curve(torch.ones(8)), "b": linear_curve(torch.full((5,), 1e-6))}
    assert within_loss(curves, 1e9, floor=0.0) == {"a": 1, "b": 1}  # a layer keeps one state at least
    assert within_states(curves, 2, floor=0.0) == {"a": 1, "b": 1}
    assert within_loss(curves, 1e9, floor=1.0) == {"a": 8, "b": 5}
    assert within_states(curves, 13, floor=1.0) == {"a": 8, "b": 5}
    assert within_states(curves, 99) == {"a": 8, "b": 5}
    assert within_loss(curves, 1e9, floor=0.3) == {"a": 3, "b": 2}  # rounded up
