"""What if a cut hurts: a cushion under a small training, cut by hand, without schedule and goal."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import compressm
from compressm.cutting.metrics import MetricWarning
from compressm.errors import EvaluationError
from compressm.layers import LRU
from compressm.observing.moments import Statistics
from compressm.training.cushion import Cushion
from compressm.training.history import Kept, RolledBack
from compressm.training.snapshot import Training


class Loop:
    """A layer, Adam, a scheduler and a cushion."""

    def __init__(self, *metrics: float, seed: int = 0, **arguments: Any) -> None:
        torch.manual_seed(seed)
        self.layer = LRU(2, 8, r_min=0.9)
        self.optimizer = torch.optim.Adam(self.layer.parameters(), 1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.9)
        training = Training(self.layer, self.optimizer, scheduler=self.scheduler)
        self.metrics: Iterator[float] = iter(metrics)
        arguments = {"max_drop": 0.1, "evaluate": lambda _: next(self.metrics), **arguments}
        self.cushion = Cushion(training, Statistics(self.layer), **arguments)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.layer(torch.randn(3, 7, 2)).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def cut(self, step: int, states: int = 4) -> None:
        """As a compressor would."""
        reference = self.cushion.reference(self.cushion.measure())
        before = self.cushion.snapshot(step, reference)
        compressm.compress(self.layer, states=states, optimizer=self.optimizer)
        self.cushion.watch(before, reference)

    def everything(self) -> dict[str, Any]:
        parts = self.layer.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()
        return copy.deepcopy({"parts": parts, "rng": torch.get_rng_state()})


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_a_harmful_cut_is_undone_bit_for_bit() -> None:
    loop = Loop(0.9, 0.79)
    loop.train(3)
    before = loop.everything()
    loop.cut(3)
    assert loop.layer.d_state == 4
    assert loop.cushion.examine_at(2) == 5
    loop.train(2)
    event = loop.cushion.examine(5)
    assert isinstance(event, RolledBack)
    assert (event.step, event.metric, event.reference, event.restored_step) == (5, 0.79, 0.9, 3)
    assert event.seconds > 0
    assert same(loop.everything(), before)
    assert (loop.cushion.mildness, loop.cushion.observed, loop.cushion.best) == (0.5, None, 0.9)
    loop.train(1)  # and training goes on
    assert loop.layer.d_state == 8


def test_a_loss_of_max_drop_is_allowed_and_more_is_not() -> None:
    for metric, kept in ((0.75, True), (0.7499, False)):
        loop = Loop(1.0, metric, max_drop=0.25)
        loop.cut(0)
        event = loop.cushion.examine(1)
        assert isinstance(event, Kept if kept else RolledBack)
        assert loop.layer.d_state == (4 if kept else 8)
        assert loop.cushion.mildness == (1.0 if kept else 0.5)
        assert loop.cushion.best == 1.0


def test_cuts_are_held_against_the_best_metric_so_far() -> None:
    loop = Loop(0.90, 0.95, 0.91, 0.86, 0.85, 0.84)
    loop.cut(0, 6)
    assert loop.cushion.examine(1) == Kept(1, metric=0.95, reference=0.90)
    loop.cut(2, 5)  # the metric is 0.91, the best is that of the examination
    assert loop.cushion.examine(3) == Kept(3, metric=0.86, reference=0.95)
    loop.cut(4, 4)
    assert isinstance(undone := loop.cushion.examine(5), RolledBack)
    assert (undone.metric, undone.reference) == (0.84, 0.95)


@pytest.mark.parametrize("metric", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_undoes_the_cut_and_is_warned_of(metric: float) -> None:
    loop = Loop(0.9, metric)
    loop.cut(0)
    with pytest.warns(MetricWarning, match="at step 2, after a cut, which is therefore undone"):
        assert isinstance(loop.cushion.examine(2), RolledBack)
    assert loop.layer.d_state == 8


def test_after_an_error_of_the_metric_the_cut_is_still_under_observation() -> None:
    def evaluate(_: nn.Module) -> Any:
        value = next(values)
        return "none" if value is None else value

    values = iter([0.9, None, 0.9])
    loop = Loop(evaluate=evaluate)
    loop.cut(0)
    with pytest.raises(EvaluationError, match="'none'"):
        loop.cushion.examine(1)
    assert loop.cushion.observed is not None
    assert isinstance(loop.cushion.examine(2), Kept)


def test_without_rewinding_time_goes_on_and_weights_go_back() -> None:
    loop = Loop(0.9, 0.1, rewind=False)
    loop.train(3)
    before = loop.everything()["parts"]
    loop.cut(3)
    loop.train(2)
    rate, rng = loop.scheduler.get_last_lr(), torch.get_rng_state()
    assert isinstance(loop.cushion.examine(5), RolledBack)
    assert same(loop.layer.state_dict(), before[0])
    assert same(loop.optimizer.state_dict()["state"], before[1]["state"])
    assert loop.scheduler.get_last_lr() == rate == [group["lr"] for group in loop.optimizer.param_groups]
    assert torch.equal(torch.get_rng_state(), rng)


def test_another_process_undoes_the_cut_from_the_state_alone() -> None:
    loop = Loop(0.9)
    loop.train(3)
    before = loop.everything()
    loop.cut(3)
    again = Loop(0.1, seed=1)
    again.cushion.load_state_dict(copy.deepcopy(loop.cushion.state_dict()))
    event = again.cushion.examine(9)
    assert isinstance(event, RolledBack)
    assert event.restored_step == 3
    assert same(again.everything(), before)


def test_without_max_drop_nothing_is_examined() -> None:
    assert not Loop(max_drop=None, evaluate=None).cushion.examines
    assert Loop(max_drop=0.0).cushion.examines
