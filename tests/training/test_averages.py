"""Averaged copies of a model that a cut did not reach: what they refuse, and what they pass on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import compressm
from compressm.errors import UnsupportedModelError
from compressm.layers import LRU
from compressm.training.averages import check_averages, guard_averages


class EMA(nn.Module):
    """An averaged copy of some other package. It remembers what it was given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)
        self.given: list[tuple[Any, ...]] = []

    def update(self, *given: Any) -> int:
        self.given.append(given)
        return len(self.given)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LRU(2, 8, r_min=0.9))


def test_a_copy_of_the_same_weights_must_be_a_follower() -> None:
    net = model()
    average = EMA(net)
    check_averages(net, (average,))
    with pytest.raises(UnsupportedModelError, match=r"EMA averages this model, .* pass it as followers"):
        check_averages(net, ())
    with torch.no_grad():
        next(average.parameters()).add_(1.0)  # of another model
    check_averages(net, ())


@pytest.mark.parametrize("choice", [{"exclude": "1"}, {"layers": ["0"]}])
def test_a_copy_is_found_before_training_where_layers_are_left_out(choice: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(LRU(2, 8, r_min=0.9), LRU(2, 8, r_min=0.9))
    average, optimizer = EMA(net), torch.optim.Adam(net.parameters())
    with pytest.raises(UnsupportedModelError, match=r"EMA averages this model, .* pass it as followers"):
        compressm.Compressor(net, optimizer, 100, states=4, **choice)
    compressor = compressm.Compressor(net, optimizer, 100, states=4, followers=[average], **choice)
    assert compressor.state_dims == {"0": 8}


def test_a_copy_of_a_part_of_the_model_is_found_by_its_values_and_after_a_cut_by_its_sizes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(LRU(2, 8, r_min=0.9), nn.Linear(2, 2)), nn.Sequential(LRU(2, 8, r_min=0.9)))
    average, optimizer = EMA(net[1]), torch.optim.Adam(net.parameters())
    with pytest.raises(UnsupportedModelError, match=r"EMA averages the part '1' of this model, .* the whole model"):
        compressm.Compressor(net, optimizer, 100, states=1)
    with torch.no_grad():
        average.module[0].C_re += 1.0  # as after some updates
    compressm.Compressor(net, optimizer, 100, states=1)
    compressm.compress(net, states=1)  # a state would be averaged into each of the copy's eight
    guard_averages(net, ())
    with pytest.raises(UnsupportedModelError, match=r"EMA has \[8\] states and the model that it averages \[1\]"):
        average.update(net[1])


def test_a_copy_of_a_part_without_layers_is_left_alone() -> None:
    net = nn.Sequential(LRU(2, 8, r_min=0.9), nn.Linear(2, 2))
    average = EMA(net[1])
    check_averages(net, ())
    guard_averages(net, ())
    assert "update" not in vars(average)


def test_a_copy_that_no_cut_reached_refuses_to_average_other_sizes_only() -> None:
    net = model()
    average, whole = EMA(net), copy.deepcopy(net)
    compressm.compress(net, states=3)
    guard_averages(net, ())
    guard_averages(net, ())  # as after a second cut
    with pytest.raises(UnsupportedModelError, match=r"EMA has \[8\] states and the model that it averages \[3\]"):
        average.update(net)
    assert average.update(0.9) == 1  # no model is among these
    assert average.update(whole) == 2  # of its own size
    assert average.given == [(0.9,), (whole,)]


def test_a_follower_and_a_copy_of_the_new_size_are_left_alone() -> None:
    net = model()
    follower = EMA(net)
    compressm.compress(net, states=3)
    average = EMA(net)
    guard_averages(net, (follower,))
    assert "update" not in vars(follower)
    assert "update" not in vars(average)
