"""A cutter alone: what it stores, and what it takes up again in another process."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compressm.errors import CheckpointError
from compressm.layers import LRU, SequenceClassifier
from compressm.theory.rank_rule import RankRule
from compressm.training.cutter import Cutter


def model() -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(1, 3, 4, 6, 2, dropout=0.0, norm="layer", layer="mamba", vocabulary=5)


def cutter(net: nn.Module) -> Cutter:
    return Cutter(net, torch.optim.SGD(net.parameters(), 0.0), (), RankRule(states=3))


def test_its_state_has_sizes_observations_and_the_last_sequence_of_each_layer() -> None:
    net = model()
    one = cutter(net)
    assert one.unseen
    assert one.state_dict() == {
        "state_dims": dict.fromkeys(("blocks.0.ssm", "blocks.1.ssm"), 6),
        "rank": 0,
        "moments": {},
        "samples": {},
    }
    one.observations.observe(True, False, 1)
    tokens = torch.tensor([[1, 2, 3, 0], [4, 3, 2, 1]])
    net(tokens)
    one.observations.observe(False, False, 2)
    net(tokens.flip(0))  # no longer observed
    assert not one.unseen
    state = copy.deepcopy(one.state_dict())
    assert list(state["samples"]) == ["blocks.0.ssm", "blocks.1.ssm"]
    for name, (hidden, present) in state["samples"].items():
        assert hidden.shape == (1, 4, 4)
        assert torch.equal(hidden, one.observations.statistics.samples[name].hidden)
        assert present.tolist() == [[True, True, True, False]]
    assert {name: float(value["tokens"]) for name, value in state["moments"].items()} == dict.fromkeys(
        state["samples"], 3
    )

    smaller = model()
    other = cutter(smaller)
    other.load_state_dict(state)
    assert not other.unseen
    plans = [each.plan(RankRule(states=3)).report.layers for each in (one, other)]
    assert plans[0] == plans[1]
    assert all(layer.error_on_data is not None for layer in plans[0])
    one.write(one.plan(RankRule(states=3)))
    other.load_state_dict({**one.state_dict(), "samples": {}})
    assert other.state_dims == one.state_dims == dict.fromkeys(state["samples"], 3)
    assert smaller.state_dict().keys() == net.state_dict().keys()
    with pytest.raises(CheckpointError, match="are not the model's"):
        cutter(LRU(4, 4)).load_state_dict(state)


def test_after_a_cut_its_observations_are_of_another_layer_and_go() -> None:
    net = model()
    one = cutter(net)
    one.observations.observe(True, False, 1)
    net(torch.tensor([[1, 2, 3, 4]]))
    plan = one.plan(RankRule(states=3))
    assert one.write(plan).cut
    one.tell(plan)
    assert one.unseen
    assert one.state_dict()["samples"] == {}
    assert one.new_graphs() == 0
