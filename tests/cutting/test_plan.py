"""A plan is written once, takes the time that it takes, and says of each layer what was measured."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from compressm.adapters import find_layers
from compressm.cutting import plan_reduction
from compressm.cutting.replay import Errors
from compressm.layers import LRU, Mamba
from compressm.observing.held_out import gather_halves, joined
from compressm.theory.rank_rule import RankRule


def test_its_seconds_are_those_of_planning_measuring_and_writing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LRU(4, 12), LRU(4, 12))
    started = time.perf_counter()
    plan = plan_reduction(model, RankRule(states=4))
    planned = plan.report.seconds
    assert 0 < planned <= time.perf_counter() - started
    told = plan.with_errors({}, 100.0)
    assert told.report.seconds == planned + 100
    report = told.apply(model, torch.optim.Adam(model.parameters()))
    written = report.seconds - told.report.seconds
    assert 0 < written <= time.perf_counter() - started
    assert report.layers == plan.report.layers
    assert [layer.d_state for layer in model] == [4, 4]


def test_errors_are_told_of_the_layers_that_were_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LRU(4, 12), LRU(4, 12))
    plan = plan_reduction(model, RankRule(states=4))
    first, second = plan.with_errors({"1": Errors(0.25, 0.5)}).report.layers
    assert first == plan.report.layers[0]
    assert (first.error_on_data, first.error_held_out) == (None, None)
    assert (second.error_on_data, second.error_held_out) == (0.25, 0.5)
    assert plan.with_errors({}) == plan


@pytest.mark.parametrize("sequences", [4, 1])
def test_cuts_of_the_halves_are_made_of_each_half_alone(sequences: int) -> None:
    torch.manual_seed(0)
    model, u = nn.Sequential(Mamba(4, 6), LRU(4, 8)), torch.randn(sequences, 11, 4)
    halves = gather_halves(model, u)
    plan = plan_reduction(model, RankRule(states=3), moments=joined(halves))
    assert list(plan.changes) == ["0", "1"]
    found = plan._by_halves(model, halves, "hankel", {})
    if sequences == 1:
        assert found == {}  # there is nothing to hold out
        return
    assert list(found) == ["0"]  # a linear layer's cut does not depend on the data
    for change, half in zip(found["0"], halves, strict=True):
        layer, adapter = find_layers(model)["0"]
        proposal = adapter.cuts(layer, adapter.balance(layer, half["0"])).proposal(3, RankRule(states=3))
        assert proposal is not None
        assert proposal.change is not None
        for name, value in proposal.change.values().items():
            assert torch.equal(change.values()[name], value)
