"""What if a cut hurts: a cushion under a small training, cut by hand, without schedule and goal."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import compressm
from compressm.cutting.metrics import MetricWarning
from compressm.errors import EvaluationError
from compressm.layers import LRU
from compressm.observing.moments import Statistics
from compressm.training.cushion import Cushion, CushionWarning
from compressm.training.history import Kept, RolledBack, Watched
from compressm.training.noise import Look, Loss
from compressm.training.snapshot import Training
from compressm.training.verdict import too_fine


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
        """As a compressor would. Takes two metrics: before and after the cut."""
        self.cushion.look(step)
        before = self.cushion.snapshot(step)
        compressm.compress(self.layer, states=states, optimizer=self.optimizer)
        self.cushion.watch(before)

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
    loop = Loop(0.9, 0.7, 0.79)
    loop.train(3)
    before = loop.everything()
    loop.cut(3)
    assert loop.layer.d_state == 4
    assert loop.cushion.examine_at(2) == 5
    loop.train(2)
    event = loop.cushion.examine(5)
    assert isinstance(event, RolledBack)
    assert (event.step, event.metric, event.reference, event.restored_step) == (5, pytest.approx(0.79), 0.9, 3)
    assert event.loss == pytest.approx(0.11)
    assert event.seconds > 0
    assert same(loop.everything(), before)
    assert (loop.cushion.mildness, loop.cushion.observed, loop.cushion.costs) == (0.5, None, [])
    loop.train(1)  # and training goes on
    assert loop.layer.d_state == 8


def test_without_noise_a_loss_of_max_drop_is_allowed_and_more_is_not() -> None:
    for metric, kept in ((0.75, True), (0.7499, False)):
        loop = Loop(1.0, metric, metric, max_drop=0.25)
        loop.cut(0)
        event = loop.cushion.examine(1)
        assert isinstance(event, Kept if kept else RolledBack)
        assert loop.layer.d_state == (4 if kept else 8)
        assert loop.cushion.mildness == (1.0 if kept else 0.5)


def test_mildness_recovers_with_cuts_that_are_kept() -> None:
    loop = Loop(*(0.9, 0.1, 0.1) * 3, *(0.9, 0.9, 0.9) * 4)
    for step, mildness in enumerate((0.5, 0.25, 0.125, 0.25, 0.5, 1.0, 1.0)):
        loop.cut(10 * step, loop.layer.d_state - 1)
        loop.cushion.examine(10 * step + 5)
        assert loop.cushion.mildness == mildness


NOISY = (0.80, 0.82, 0.79, 0.81)  # 0.81 before the cut, give or take 0.02


def watched(*later: float, drop: float, max_drop: float = 0.01, before: tuple[float, ...] = NOISY) -> list[Any]:
    """The examinations of a cut, after which the metric is ``drop`` lower at once, and these values later."""
    loop = Loop(*before, before[-1] - drop, *later, max_drop=max_drop)
    for step in range(2, 2 * len(before), 2):
        loop.cushion.look(step)
    loop.cut(2 * len(before))
    events: list[Any] = []
    while loop.cushion.observed is not None:
        events.append(loop.cushion.examine(loop.cushion.examine_at(4)))
    return events


def test_noise_is_not_taken_for_damage() -> None:
    (event,) = watched(0.78, drop=0.0)  # three points under the metric at the cut
    assert isinstance(event, Kept)
    assert event.error > 0.02


def test_what_may_be_noise_or_damage_is_watched_longer() -> None:
    events = watched(0.76, 0.80, 0.81, drop=0.05)
    assert [type(event) for event in events] == [Watched, Watched, Kept]
    events = watched(0.74, 0.73, 0.74, drop=0.06)
    assert isinstance(events[-1], RolledBack)
    assert events[-1].metric == pytest.approx((0.74 + 0.73 + 0.74) / 3)
    assert [event.step for event in events] == [12, 14, 16][: len(events)]
    (event,) = watched(0.2, drop=0.6)  # no noise is as large
    assert isinstance(event, RolledBack)


def test_a_rise_does_not_hide_damage() -> None:
    rising = (0.50, 0.52, 0.54, 0.56)
    (*_, event) = watched(0.53, 0.53, 0.53, drop=0.05, before=rising)
    assert isinstance(event, RolledBack)
    assert event.loss > (0.56 - 0.53) + 0.02  # the rise that is missing counts, too
    (*_, event) = watched(0.53, 0.53, 0.53, drop=0.05, before=(0.56, 0.55, 0.57, 0.56))
    assert event.loss == pytest.approx(0.56 - 0.53, abs=0.01)


def test_a_falling_metric_is_not_blamed_on_the_cut() -> None:
    falling = (0.80, 0.77, 0.74, 0.71)
    events = watched(0.65, 0.62, 0.59, drop=0.0, before=falling)
    assert isinstance(events[-1], Kept)
    assert falling[-1] - events[-1].metric > 0.05


def test_a_loss_that_did_not_show_right_after_the_cut_needs_stronger_proof() -> None:
    later = (0.745, 0.745, 0.745)
    assert isinstance(watched(*later, drop=0.05)[-1], RolledBack)
    assert isinstance(watched(*later, drop=0.0)[-1], Kept)
    assert isinstance(watched(0.5, 0.5, 0.5, drop=0.0)[-1], RolledBack)


def test_equal_metrics_in_a_row_are_no_proof_that_there_is_no_noise() -> None:
    events = watched(0.09, 0.11, 0.1, drop=0.0, max_drop=0.002, before=(0.1, 0.1, 0.1, 0.1))
    assert [type(event) for event in events] == [Watched, Kept]


def test_what_a_cut_cost_is_not_taken_for_a_trend_by_the_next_one() -> None:
    """Two cuts that cost 0.05 each, one after the other, of a training that stands still."""
    loop = Loop(*[0.9] * 4, *[0.85] * 4, *[0.80] * 4, max_drop=0.06)
    for step in (2, 4, 6):
        loop.cushion.look(step)
    loop.cut(8, 6)
    first = loop.cushion.examine(12)
    loop.cushion.look(14)
    loop.cut(16, 4)
    second = loop.cushion.examine(20)
    for event in (first, second):
        assert isinstance(event, Kept)
        assert (event.loss, event.error) == (pytest.approx(0.05), pytest.approx(0.0, abs=1e-12))
    assert loop.cushion.end(30).loss == pytest.approx(0.10)


def test_a_max_drop_that_cannot_be_resolved_is_warned_of_once() -> None:
    loop = Loop(*NOISY * 2, max_drop=0.002)
    for step in (2, 4, 6, 8):
        loop.cushion.look(step)
    with pytest.warns(CushionWarning, match="max_drop=0.002 is finer than these evaluations can resolve") as caught:
        loop.cushion.warn_if_too_fine((12, 14, 16))
    finest = float(re.findall(r"give max_drop=([\d.]+) or more", str(caught[0].message))[0])
    assert "by the training or by the validation data, which one number does not tell apart" in str(caught[0].message)
    loop.cushion.warn_if_too_fine((12, 14, 16))  # no second warning, and none where it can be resolved
    fine = Loop(*NOISY, max_drop=finest)
    for step in (2, 4, 6, 8):
        fine.cushion.look(step)
    fine.cushion.warn_if_too_fine((12, 14, 16))


def test_more_samples_are_asked_for_where_they_help() -> None:
    """A training that stands still, and whose examples flip in pairs: all of the noise is that of the sample."""
    right = [1.0, 0.0] * 50
    flipped = [0.0, 1.0] * 5 + right[10:]
    loop = Loop(max_drop=0.01)
    for step, scores in zip((2, 4, 6, 8), (flipped, flipped, flipped, right), strict=True):
        loop.cushion.evaluate = lambda _, scores=scores: scores
        loop.cushion.look(step)
    with pytest.warns(CushionWarning, match=r"or ([\d,]+) validation samples instead of 100") as caught:
        loop.cushion.warn_if_too_fine((12, 14, 16))
    needed = int(re.findall(r"or ([\d,]+) validation", str(caught[0].message))[0].replace(",", ""))
    sampling = np.std((np.array(right) - np.mean([flipped, flipped, flipped, right], 0)), ddof=1) / 10
    allowed = 0.01 / stats.t.ppf(0.8, 2)
    assert needed == pytest.approx(100 * (sampling / allowed) ** 2, abs=1)


CAUSES: list[tuple[float | None, float, int, float, str]] = [
    (0.1, 0.0, 0, 0.01, "which one number does not tell apart"),
    (0.1, 0.01, 100, 0.01, "mostly by the training itself, so that more validation samples alone do not help"),
    (0.1, 0.09, 100, 0.01, "may not be enough"),
    (0.0, 0.1, 100, 0.01, r"or 7,\d\d\d validation samples instead of 100$"),  # 0.1 is to become 0.01 / t(0.8)
    (None, 0.1, 100, 0.01, "validation samples instead of 100, if the training itself fluctuates little, which is not"),
    (None, 0.1, 100, 0.0, "what the training adds is not known"),
]


@pytest.mark.parametrize(("training", "sampling", "examples", "max_drop", "said"), CAUSES)
def test_the_cause_of_noise_is_named_as_far_as_it_is_known(
    training: float | None, sampling: float, examples: int, max_drop: float, said: str
) -> None:
    assert re.search(said, too_fine(max_drop, Loss(0.0, 0.5, training, sampling, 30, examples), "metric"))


@pytest.mark.parametrize("metric", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_undoes_the_cut_and_is_warned_of(metric: float) -> None:
    loop = Loop(0.9, 0.9, metric)
    loop.cut(0)
    with pytest.warns(MetricWarning, match="at step 2, after a cut, which is therefore undone"):
        assert isinstance(loop.cushion.examine(2), RolledBack)
    assert loop.layer.d_state == 8


def test_a_metric_that_is_not_finite_right_after_the_cut_shows() -> None:
    loop = Loop(0.9, math.nan, 0.7)
    loop.cut(0)
    assert isinstance(loop.cushion.examine(2), RolledBack)


def test_after_an_error_of_the_metric_the_cut_is_still_under_observation() -> None:
    def evaluate(_: nn.Module) -> Any:
        value = next(values)
        return "none" if value is None else value

    values = iter([0.9, 0.9, None, 0.9])
    loop = Loop(evaluate=evaluate)
    loop.cut(0)
    with pytest.raises(EvaluationError, match="'none'"):
        loop.cushion.examine(1)
    assert loop.cushion.observed is not None
    assert isinstance(loop.cushion.examine(2), Kept)


def test_without_rewinding_time_goes_on_and_weights_go_back() -> None:
    loop = Loop(0.9, 0.1, 0.1, rewind=False)
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
    assert loop.cushion.looks == [Look(5, 0.9)]  # the training now stands where it stood at step 3


@pytest.mark.parametrize("metric", [0.1, 0.9])
def test_another_process_goes_on_from_the_state_alone(metric: float) -> None:
    loop = Loop(*NOISY, 0.3, 0.7, metric)
    loop.train(3)
    for step in (1, 2, 3):
        loop.cushion.look(step)
    before = loop.everything()
    loop.cut(4)
    assert isinstance(loop.cushion.examine(6), Watched)
    again = Loop(metric, seed=1)
    state = json.loads(json.dumps({k: v for k, v in loop.cushion.state_dict().items() if k != "observed"}))
    again.cushion.load_state_dict({**state, "observed": copy.deepcopy(loop.cushion.observed)})
    event, unbroken = again.cushion.examine(9), loop.cushion.examine(9)
    assert type(event) is type(unbroken)
    assert (event.metric, event.reference, event.loss, event.error) == (
        unbroken.metric, unbroken.reference, unbroken.loss, unbroken.error,
    )  # fmt: skip
    if isinstance(event, RolledBack):
        assert event.restored_step == 4
        assert same(again.everything(), before)
    for name in ("looks", "after", "costs", "mildness", "drop", "warned"):
        assert getattr(again.cushion, name) == getattr(loop.cushion, name), name


def test_scores_are_stored_and_compared_after_a_resumption() -> None:
    scores = [1.0] * 8 + [0.0] * 4
    loop = Loop(evaluate=lambda _: scores, mode="min")
    loop.cut(0)
    again = Loop(seed=1, evaluate=lambda _: [*scores[:-1], 1.0], mode="min", max_drop=0.01)
    again.cushion.load_state_dict(copy.deepcopy(loop.cushion.state_dict()))
    event = again.cushion.examine(2)
    assert event.loss == pytest.approx(1 / 12)
    assert event.error == pytest.approx(1 / 12)  # of one example of twelve that changed
    assert event.metric == pytest.approx(9 / 12)


def test_a_state_of_earlier_versions_is_read() -> None:
    loop = Loop(0.9, 0.9)
    loop.cut(3)
    assert loop.cushion.observed is not None
    old = {"aggressiveness": 0.5, "best": 0.9, "observed": {**loop.cushion.observed, "reference": 0.9}}
    again = Loop(0.7, seed=1)
    again.cushion.load_state_dict(old)
    event = again.cushion.examine(9)
    assert isinstance(event, RolledBack)
    assert (event.reference, again.cushion.mildness) == (0.9, 0.25)


def test_before_the_first_cut_nothing_is_lost_milder_or_under_observation() -> None:
    assert Loop().cushion.state_dict() == {
        "aggressiveness": 1.0, "observed": None, "looks": [], "after": [], "twins": [],
        "cushion": {"drop": 0.0, "warned": False, "costs": []},
    }  # fmt: skip


def test_without_max_drop_nothing_is_examined() -> None:
    assert not Loop(max_drop=None, evaluate=None).cushion.examines
    assert Loop(max_drop=0.0).cushion.examines
