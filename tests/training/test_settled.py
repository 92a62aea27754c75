"""Cuts that come when a spectrum holds still: of selective layers too, and across an interruption."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from compressm.layers import SequenceClassifier, parameter_groups
from compressm.training.compressor import Compressor

Batch = Callable[[int], torch.Tensor]


def same(step: int) -> torch.Tensor:
    """The same sequences at every step."""
    return torch.randn(4, 20, 1, generator=torch.Generator().manual_seed(0)).cumsum(1)


def turning(step: int) -> torch.Tensor:
    """Waves that are slow at even probes and fast at odd ones, so that states carry more and less by turns."""
    slow = (step + 3) // 4 % 2 == 0
    time = torch.arange(20.0)[None, :, None] + torch.arange(4.0)[:, None, None]
    return torch.sin((0.1 if slow else 3.0) * time)


class Loop:
    """Training with a rate of next to nothing: spectra move with the data, and with nothing else."""

    def __init__(self, layer: str, batch: Batch, **arguments: Any) -> None:
        torch.manual_seed(0)
        options = {"lru": {"r_min": 0.9}, "mamba2": {"head_dim": 4}}.get(layer, {})
        self.net = SequenceClassifier(1, 3, 4, 16, 2, dropout=0.0, norm="layer", layer=layer, **options)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.net, 1e-9))
        self.compressor = Compressor(self.net, self.optimizer, 80, window=0.5, cuts=1, when="settled", **arguments)
        self.batch, self.steps = batch, 0

    def run(self, until: int) -> list[tuple[str, int]]:
        while self.steps < until:
            F.cross_entropy(self.net(self.batch(self.steps)), torch.tensor([0, 1, 2, 0])).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
            self.compressor.step()
        return [(event.kind, event.step) for event in self.compressor.history]


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_a_selective_layer_is_cut_once_its_spectrum_holds_still(layer: str) -> None:
    # The cut is scheduled for step 40, with a probe at every tenth of the way: at step 4, and at step 8 it is known
    # that the first one holds.
    assert Loop(layer, same, states=8).run(45) == [("cut", 8)]


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_a_selective_layer_whose_spectrum_moves_is_cut_on_schedule(layer: str) -> None:
    # Weights stand still. What moves is what the data make of the states.
    assert Loop(layer, turning, states=8).run(45) == [("cut", 40)]


@pytest.mark.parametrize("layer", ["lru", "mamba"])
@pytest.mark.parametrize("stop", [4, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (3, 6, 7))])
def test_a_run_that_was_interrupted_remembers_its_last_probe(layer: str, stop: int) -> None:
    unbroken = Loop(layer, same, states=8)
    assert unbroken.run(20) == [("cut", 8)]
    first = Loop(layer, same, states=8)
    assert first.run(stop) == []
    saved = copy.deepcopy((first.compressor.state_dict(), first.net.state_dict(), first.optimizer.state_dict()))
    resumed = Loop(layer, same, states=8)
    resumed.compressor.load_state_dict(saved[0])
    resumed.net.load_state_dict(saved[1])
    resumed.optimizer.load_state_dict(saved[2])
    resumed.steps = stop
    # Without the probe at step 4 nothing would be known at step 8, and the cut would come at step 12.
    assert resumed.run(20) == [("cut", 8)]
    for mine, other in zip(resumed.net.parameters(), unbroken.net.parameters(), strict=True):
        assert torch.equal(mine, other)
