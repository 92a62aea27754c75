"""The possible cuts of one layer: what they discard, why they are refused, and what is remembered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from compressm.adapters import LRUAdapter, MambaAdapter, S4DAdapter
from compressm.adapters.changes import LayerChange, layer_values
from compressm.adapters.cuts import LinearCuts, SelectiveCuts, rounds_too_much
from compressm.layers import LRU, S4D, Mamba
from compressm.observing.over_data import gather
from compressm.theory.balancing import Reduction, balance, truncate
from compressm.theory.pruning import prune
from compressm.theory.rank_rule import RankRule
from compressm.theory.recurrence import SelectiveBalancing, SelectiveReduction
from compressm.theory.selection import Selection, reduce_selective
from helpers import lru, random_system


def linear(layer: Any, adapter: Any, selection: Selection = "hankel") -> LinearCuts:
    cuts = adapter.cuts(layer, adapter.balance(layer), selection)
    assert isinstance(cuts, LinearCuts)
    return cuts


@pytest.mark.parametrize("selection", ["hankel", "smallest", "random", "modal", "hinf", "energy", "random_modes"])
def test_a_selection_is_the_truncation_or_pruning_of_its_name(selection: Selection) -> None:
    layer = lru(0, d_model=3, d_state=10, r_min=0.5).double()
    balanced = LRUAdapter().balance(layer)
    proposal = linear(layer, LRUAdapter(), selection).proposal(4, RankRule(states=4))
    assert proposal is not None
    if selection in ("modal", "hinf", "energy", "random_modes"):
        expected = prune(balanced.system, 4, selection)  # type: ignore[arg-type]
        assert proposal.energy_kept is None  # without a change of basis there is no share of the energy
    else:
        other = balanced if selection == "hankel" else balanced.rearranged(selection)  # type: ignore[arg-type]
        expected = truncate(other, 4)
        kept = 1 - float(expected.discarded) / float(balanced.hsv.sum())
        assert proposal.energy_kept == pytest.approx(kept)
    assert proposal.states == expected.system.n
    assert proposal.poles_before == tuple(balanced.system.lam.tolist())
    assert proposal.poles_after == tuple(expected.system.lam.tolist())
    assert proposal.certificate.errors() == expected.certificate.errors()


def test_under_a_promise_other_states_than_the_best_are_no_promise() -> None:
    layer = lru(0, d_model=3, d_state=10, r_min=0.5).double()
    kept = {}
    for selection in ("hankel", "smallest"):
        proposal = linear(layer, LRUAdapter(), selection).proposal(6, RankRule(tolerance=0.1))
        assert proposal is not None
        kept[selection] = proposal.energy_kept
    assert kept["hankel"] >= 0.9 > kept["smallest"]


def test_a_layer_without_a_smaller_cut_or_behind_its_gate_has_none() -> None:
    layer = lru(0, d_model=3, d_state=10, r_min=0.5)
    cuts = linear(layer, LRUAdapter())
    assert cuts.discards is None
    assert cuts.proposal(10, RankRule(tolerance=0.0)) is None
    assert cuts.proposal(8, RankRule(states=8, min_reduction=0.25)) is None
    assert cuts.proposal(8, RankRule(states=8, min_reduction=0.2)) is not None


def test_a_layer_that_does_nothing_keeps_all_of_its_energy() -> None:
    layer = lru(0, d_model=3, d_state=6)
    with torch.no_grad():
        layer.C_re.zero_()
        layer.C_im.zero_()
    proposal = linear(layer, LRUAdapter()).proposal(2, RankRule(states=2))
    assert proposal is not None
    assert proposal.energy_kept == 1.0
    assert proposal.states == 1


def test_a_cut_whose_certificate_fails_is_not_planned() -> None:
    class Failing(LRUAdapter):
        def plan(self, values: Any, reduction: Reduction) -> LayerChange:
            raise AssertionError("the cut was planned")

    layer = lru(0, d_model=3, d_state=6).double()
    balanced = LRUAdapter().balance(layer)
    # A tail of Hankel singular values that is too small promises an error that the cut does not keep.
    tail = torch.where(torch.arange(12) < 6, 1.0, 1e-3)
    proposal = Failing().cuts(layer, replace(balanced, hsv=balanced.hsv * tail)).proposal(3, RankRule(states=3))
    assert proposal is not None
    assert not proposal.certificate.valid
    assert proposal.change is None
    assert proposal.reason == "; ".join(proposal.certificate.failures)
    assert "above its bound" in proposal.reason


def test_a_written_layer_that_is_not_stable_is_not_cut() -> None:
    class Unstable(LRUAdapter):
        def plan(self, values: Any, reduction: Reduction) -> LayerChange:
            change = super().plan(values, reduction)
            for part in change.parameters:
                if part.names == ("nu_log",):
                    part.values[0].fill_(-200.0)  # exp(-exp(-200)) is one
            return change

    layer = lru(0, d_model=3, d_state=6).double()
    proposal = linear(layer, Unstable()).proposal(3, RankRule(states=3))
    assert proposal is not None
    assert proposal.change is None
    assert proposal.reason.startswith("after rounding: the largest |lam| is 1")


def test_the_error_by_rounding_is_the_h2_distance_of_the_written_layer() -> None:
    layer = S4D(3, 8)
    adapter = S4DAdapter()
    values = layer_values(layer)
    proposal = linear(layer, adapter).proposal(4, RankRule(states=4))
    assert proposal is not None
    assert proposal.change is not None
    reduction = truncate(adapter.balance(layer), 4)
    written = adapter.read({**values, **proposal.change.values()})
    distance = (reduction.system.kernel(40000) - written.kernel(40000)).square().sum((-3, -2, -1)).sqrt()
    assert float(distance.max()) > 0
    assert proposal.certificate.rounding_error == pytest.approx(float(distance.max()), rel=1e-3)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_may_add_what_the_cut_does_or_a_thousandth_or_the_dtypes_own_error(dtype: torch.dtype) -> None:
    reduction = truncate(balance(random_system(0, n=6)), 3)
    one = replace(reduction.certificate, h2_norm=1.0, h2_error=0.0)

    def found(rounding: list[float], *certificates: Any) -> float | None:
        several = replace(reduction, certificates=certificates)
        values = {"weight": torch.zeros(1, dtype=dtype), "places": torch.zeros(1, dtype=torch.int64)}
        return rounds_too_much(torch.tensor(rounding, dtype=torch.float64), several, values)

    assert found([0.99e-3], one) is None
    eps = torch.finfo(dtype).eps
    above = 1.01 * max(1e-3, eps)
    assert found([above], one) == above
    assert found([0.99 * 0.3], replace(one, h2_error=0.3)) is None
    assert found([1.01 * 0.3], replace(one, h2_error=0.3)) == 1.01 * 0.3
    # What the largest system of the layer loses by its dtype alone, the smallest may lose too.
    large, small = replace(one, h2_norm=1e9), replace(one, h2_norm=1e-9)
    assert found([0.0, 0.99e9 * eps], large, small) is None
    assert found([0.0, 1.01e9 * eps, 2e9], large, small, small) == 1.01e9 * eps  # the first that is too large


def selective(**changes: Any) -> tuple[Mamba, SelectiveBalancing]:
    torch.manual_seed(0)
    layer = Mamba(4, 6)
    balanced = MambaAdapter().balance(layer, gather(layer, torch.randn(3, 20, 4))[""])
    return layer, replace(balanced, **changes)


def test_a_selective_cut_is_computed_once_and_its_loss_is_what_rules_read() -> None:
    layer, balanced = selective()
    planned: list[SelectiveReduction] = []

    def plan(values: Any, reduction: SelectiveReduction) -> LayerChange:
        planned.append(reduction)
        return MambaAdapter().plan(values, reduction)

    cuts = SelectiveCuts(layer_values(layer), balanced, "least_squares", (False, True, False), plan)
    expected = reduce_selective(balanced, 3, False, True, "least_squares")
    assert cuts.discards is not None
    assert expected.discarded is not None
    torch.testing.assert_close(cuts.discards(3), expected.discarded)
    proposals = [cuts.proposal(3, RankRule(states=3)) for _ in range(2)]
    assert planned[0] is planned[1]
    assert planned[0].discarded is cuts.discards(3)
    for proposal in proposals:
        assert (proposal.states, proposal.reason) == (3, "")
        assert proposal.energy_kept == pytest.approx(1 - float(expected.discarded.sum() / balanced.hsv.sum()))
        assert proposal.certificate is planned[0].estimate
        assert (proposal.poles_before, proposal.poles_after) == ((), ())


def test_only_exact_cuts_discard_the_least_that_is_possible() -> None:
    layer, balanced = selective()
    values = layer_values(layer)
    for selection, into, exact in (
        ("hankel", True, True), ("least_squares", True, True), ("gramians", True, False), ("hankel", False, False)
    ):  # fmt: skip
        cuts = SelectiveCuts(values, balanced, selection, (into, True, False), MambaAdapter().plan)  # type: ignore[arg-type]
        assert (cuts.discards is None) == exact


def test_a_selective_cut_that_is_not_finite_is_refused() -> None:
    layer, balanced = selective()
    broken = replace(balanced, P=balanced.P * torch.inf)
    cuts = SelectiveCuts(layer_values(layer), broken, "gramians", (False, True, False), MambaAdapter().plan)
    made = reduce_selective(balanced, 3, selection="gramians")
    cuts._made[3, None] = replace(made, estimate=replace(made.estimate, failures=("the maps are not finite", "more")))
    proposal = cuts.proposal(3, RankRule(states=3))
    assert proposal.change is None
    assert proposal.reason == "the maps are not finite; more"
    assert proposal.energy_kept is None


def test_layers_are_only_read() -> None:
    layer = LRU(3, 8)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert linear(layer, LRUAdapter()).proposal(4, RankRule(states=4)) is not None
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
