"""A snapshot of a training holds everything, is not changed by what follows, and can be used more than once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import compressm
from compressm.cutting.carry import Together, follow
from compressm.cutting.plan import plan_reduction
from compressm.layers import LRU
from compressm.theory.rank_rule import RankRule
from compressm.training.snapshot import Training


class Scaler:
    """Something with torch's state protocol."""

    def __init__(self) -> None:
        self.scale = torch.tensor(2.0)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scale = state_dict["scale"]


class Loop:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = LRU(2, 8, r_min=0.9)
        self.average = AveragedModel(self.layer)
        self.optimizer = torch.optim.Adam(self.layer.parameters(), 1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        self.scaler = Scaler()
        self.training = Training(self.layer, self.optimizer, (self.average,), self.scheduler, self.scaler)

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.layer(torch.randn(3, 7, 2)).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.average.update_parameters(self.layer)
        self.scaler.scale.add_(1)  # in place, as some do

    def cut(self) -> None:
        plan = plan_reduction(self.layer, RankRule(states=3))
        plan.apply(self.layer, self.optimizer)
        follow(self.average, self.layer, plan.changes)

    def parts(self) -> dict[str, Any]:
        parts = {
            "model": self.layer, "optimizer": self.optimizer, "average": self.average, "scheduler": self.scheduler,
            "scaler": self.scaler,
        }  # fmt: skip
        return copy.deepcopy(
            {**{name: part.state_dict() for name, part in parts.items()}, "rng": torch.get_rng_state()}
        )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_everything_comes_back_as_often_as_it_is_wanted() -> None:
    loop = Loop()
    loop.train()
    before, snapshot = loop.parts(), loop.training.snapshot()
    for _ in range(2):
        loop.train()
        loop.cut()
        loop.train()
        assert loop.layer.d_state == 3
        assert not any(same(before[name], part) for name, part in loop.parts().items())
        loop.training.restore(snapshot)
        assert loop.layer.d_state == 8
        assert same(loop.parts(), before)
        assert all(group["params"] for group in loop.optimizer.param_groups)


def test_without_rewinding_rates_scaler_and_random_state_go_on() -> None:
    loop = Loop()
    loop.train()
    before, snapshot = loop.parts(), loop.training.snapshot()
    loop.cut()
    loop.train()
    now = loop.parts()
    loop.training.restore(snapshot, rewind=False)
    after = loop.parts()
    for name in ("model", "average"):
        assert same(after[name], before[name])
    assert same(after["optimizer"]["state"], before["optimizer"]["state"])
    for name in ("scheduler", "scaler", "rng"):
        assert same(after[name], now[name])
    assert after["optimizer"]["param_groups"][0]["lr"] == now["optimizer"]["param_groups"][0]["lr"] == 0.0025
    loop.train()  # and goes on


def test_what_a_training_does_not_have_is_not_in_its_snapshot() -> None:
    torch.manual_seed(0)
    layer = LRU(2, 8)
    training = Training(layer, torch.optim.SGD(layer.parameters(), 0.1))
    snapshot = training.snapshot()
    assert (snapshot["scheduler"], snapshot["scaler"], snapshot["followers"]) == (None, None, [])
    weights = copy.deepcopy(layer.state_dict())
    compressm.compress(layer, states=3)
    training.restore(snapshot)
    assert same(layer.state_dict(), weights)
    with pytest.raises(ValueError, match="zip"):  # a snapshot of another training
        Training(layer, training.optimizer, (AveragedModel(layer),)).restore(snapshot)


def test_a_training_that_has_more_than_its_snapshot_keeps_that() -> None:
    loop = Loop()
    snapshot = Training(loop.layer, loop.optimizer, (loop.average,)).snapshot()
    loop.train()
    rate = loop.scheduler.state_dict()
    loop.training.restore(snapshot)  # written when there was neither scheduler nor scaler
    assert same(loop.scheduler.state_dict(), rate)
    assert float(loop.scaler.scale) == 3.0


def test_several_schedulers_go_back_together() -> None:
    layers = [LRU(2, 8), LRU(2, 8)]
    optimizers = [torch.optim.SGD(layer.parameters(), lr=1.0) for layer in layers]
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(one, rate) for one, rate in zip(optimizers, (0.5, 0.1), strict=True)
    ]
    training = Training(torch.nn.ModuleList(layers), Together(optimizers), scheduler=schedulers)

    def train() -> list[float]:
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        return [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    assert train() == [0.5, 0.1]
    snapshot = training.snapshot()
    train()
    training.restore(snapshot)
    assert train() == pytest.approx([0.25, 0.01])
    assert [scheduler.last_epoch for scheduler in schedulers] == [2, 2]
