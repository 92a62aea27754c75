"""A probe finds out whether state matters where this is known beforehand, and says so with its uncertainty."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.errors import CheckpointError, ConfigError, EvaluationError
from compressm.training.probe import ProbeWarning, Task
from compressm.training.probe_answer import ShortRun, answer_of


class Bank(nn.Module):
    """As many features as states: the targets below need so many of them, and can be learnt exactly."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.states, self.weights = states, nn.Parameter(torch.zeros(states))

    def forward(self, u: Tensor) -> Tensor:
        return u[:, : self.states] @ self.weights


def task(needed: int, **arguments: Any) -> compressm.Probe:
    """A regression on the first ``needed`` of 16 inputs, probed at 16, 4 and 1 states."""
    calls: list[Task] = arguments.pop("calls", [])
    truth = torch.zeros(16)
    truth[:needed] = 1.0

    def train(model: nn.Module, task: Task) -> None:
        calls.append(task)
        optimizer = torch.optim.Adam(model.parameters(), 0.02 * task.rate)
        for _ in range(task.steps):
            u = torch.randn(8, 16)
            optimizer.zero_grad()
            F.mse_loss(model(u), u @ truth).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> Tensor:
        u = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return (model(u) - u @ truth).square()

    given: dict[str, Any] = {"states": 16, "steps": 20, "mode": "min", "quiet": True, **arguments}
    return compressm.probe(given.pop("build", Bank), train, given.pop("evaluate", evaluate), **given)


def test_state_matters_where_every_input_counts() -> None:
    found = task(16, total_steps=10_000)
    assert found.answer == "state matters"
    assert found.start_from == 16
    assert [size.verdict for size in found.sizes] == ["as good", "worse", "worse"]
    assert found.share is not None
    assert 0 < found.share < 1
    text = str(found)
    assert text.count("State matters: 1 states are behind by") == 1
    assert "3 seeds, 20 steps each" in text
    assert json.loads(json.dumps(found.to_dict()))["answer"] == "state matters"


def test_a_small_size_is_named_where_it_is_as_good() -> None:
    found = task(4)
    assert (found.answer, found.start_from) == ("state matters", 4)
    assert [size.verdict for size in found.sizes] == ["as good", "as good", "worse"]
    assert "State matters: 1 states are behind" in str(found)
    assert "4 states learn as much as 16: start from these" in str(found)
    found = task(1)
    assert (found.answer, found.start_from) == ("train small", 1)
    assert "Train small: 1 states learn as much as 16" in str(found)


def test_where_nothing_is_learnt_nothing_is_known() -> None:
    found = task(16, rates=(1e-9,))
    assert (found.answer, found.start_from) == ("not known", 16)
    assert "nothing was learnt" in str(found)


def test_rates_are_climbed_once_for_each_size_and_never_down_for_a_smaller_one() -> None:
    calls: list[Task] = []
    found = task(16, calls=calls, rates=(1.0, 10.0, 1e4), seeds=2)
    assert [(one.states, one.rate) for one in calls if one.seed == 0] == [
        (16, 1.0), (16, 10.0), (16, 1e4), (4, 10.0), (4, 1e4), (1, 10.0), (1, 1e4),
    ]  # fmt: skip
    assert {size.rate for size in found.sizes} == {10.0}
    assert [(one.states, one.rate) for one in calls if one.seed == 1] == [(16, 10.0), (4, 10.0), (1, 10.0)]


def test_a_killed_probe_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = task(16)
    calls: list[Task] = []

    def build(states: int) -> Bank:
        if len(calls) == 5:
            raise KeyboardInterrupt
        return Bank(states)

    with pytest.raises(KeyboardInterrupt):
        task(16, build=build, calls=calls, folder=tmp_path)
    again: list[Task] = []
    found = task(16, calls=again, folder=tmp_path)
    assert not {*calls} & {*again}
    assert [size.metric for size in found.sizes] == [size.metric for size in whole.sizes]
    with pytest.raises(ConfigError, match="another folder"):
        task(16, folder=tmp_path, steps=21)
    next(iter(tmp_path.iterdir())).write_text("{")
    with pytest.raises(CheckpointError, match="delete it"):
        task(16, folder=tmp_path)


def test_sizes_that_see_other_batches_are_no_fair_comparison() -> None:
    def build(states: int) -> nn.Module:
        class Hungry(Bank):
            def forward(self, u: Tensor) -> Tensor:
                torch.rand(self.states)  # takes as many random numbers as it has states
                return super().forward(u)

        return Hungry(states)

    with pytest.warns(ProbeWarning, match="different batches"):
        task(16, build=build)


def test_the_callers_random_numbers_go_on() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    task(4)
    assert torch.equal(torch.rand(3), expected)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"seeds": 1}, "seeds = 1: at least two"),
    ({"seeds": (3, 3)}, "seeds = "),
    ({"states": 1}, "states = 1: two different sizes"),
    ({"states": (8,)}, "two different sizes"),
    ({"steps": 0}, "steps = 0"),
    ({"total_steps": 10}, "at most total_steps = 10"),
    ({"rates": ()}, "rates = "),
    ({"rates": (3.0, 1.0)}, "ascending"),
    ({"worth": 1.5}, "worth = 1.5"),
]


@pytest.mark.parametrize(("arguments", "match"), WRONG)
def test_what_makes_no_probe_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        task(4, **arguments)


def test_a_metric_that_is_not_finite_before_training_is_refused() -> None:
    with pytest.raises(EvaluationError, match="an untrained model of 16 states"):
        task(4, evaluate=lambda model: math.nan)


def short_trainings(metric: Callable[[Task], float], **arguments: Any) -> tuple[list[tuple[int, int, float]], Any]:
    """The (size, seed, rate) of all short trainings where a training ends at this metric, and the answer."""
    calls: list[Task] = []

    def train(model: nn.Linear, task: Task) -> None:
        calls.append(task)
        nn.init.constant_(model.bias, metric(task))

    given: dict[str, Any] = {"states": (4, 2), "steps": 1, "seeds": 2, "quiet": True, **arguments}
    given.setdefault("evaluate", lambda model: model.bias[0].nan_to_num(0.1, 0.1).item())
    try:
        found = compressm.probe(lambda states: nn.Linear(1, states), train, given.pop("evaluate"), **given)
    except EvaluationError as error:
        found = error
    return [(one.states, one.seed, one.rate) for one in calls], found


def test_a_rate_that_is_no_better_ends_the_climb() -> None:
    made, found = short_trainings(lambda task: 0.5)
    assert made == [(4, 0, 1.0), (4, 0, 3.0), (4, 1, 1.0), (2, 0, 1.0), (2, 0, 3.0), (2, 1, 1.0)]
    assert {size.rate for size in found.sizes} == {1.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("evaluate", [lambda model: model.bias[0].item(), None])
def test_a_rate_that_diverges_is_worse(tmp_path: Path, value: float, evaluate: Any) -> None:
    def metric(task: Task) -> float:
        return value if task.rate == 9 else 0.1 * task.rate

    more = {} if evaluate is None else {"evaluate": evaluate}
    made, found = short_trainings(metric, folder=tmp_path, **more)
    assert made == [(4, 0, 1.0), (4, 0, 3.0), (4, 0, 9.0), (4, 1, 3.0), (2, 0, 3.0), (2, 0, 9.0), (2, 1, 3.0)]
    assert [size.rate for size in found.sizes] == [3.0, 3.0]
    again, same = short_trainings(metric, folder=tmp_path, **more)
    assert again == []
    assert same.to_dict() == found.to_dict()


def test_a_rate_at_which_another_seed_or_size_diverges_gives_way_to_a_lower_one() -> None:
    diverging = {(4, 1, 9.0), (2, 0, 3.0)}
    made, found = short_trainings(
        lambda task: math.nan if (task.states, task.seed, task.rate) in diverging else 0.1 * task.rate
    )
    assert [size.rate for size in found.sizes] == [3.0, 1.0]
    assert made[-3:] == [(2, 0, 3.0), (2, 0, 1.0), (2, 1, 1.0)]
    assert all(math.isfinite(run.metric) for run in found.runs)


def test_a_size_that_diverges_at_every_rate_is_refused() -> None:
    _, error = short_trainings(lambda task: math.nan if task.states == 2 else 0.5)
    assert isinstance(error, EvaluationError)
    assert "2 states, seed 0, rate 1 diverged, and no lower rate" in str(error)


def runs(rng: np.random.Generator, gap: float, seeds: int, spread: float) -> list[ShortRun]:
    """Runs whose metrics are normal around 0.8 and 0.8 - gap; half of their variance is the seed's, at all sizes."""
    made: list[ShortRun] = []
    batches = rng.standard_normal(seeds)
    for states, mean in ((64, 0.8), (16, 0.8), (4, 0.8 - gap)):
        for seed in range(seeds):
            value = mean + spread * (batches[seed] + rng.standard_normal())
            made.append(ShortRun(states, seed, 1.0, 0.1, value, None, 1.0, 100))
    return made


def test_the_interval_is_students_over_the_seeds() -> None:
    rng = np.random.default_rng(0)
    given = runs(rng, 0.1, 3, 0.02)
    (_, _, small) = answer_of(given, 10, worth=0.1).sizes
    big, *others = (np.array([run.metric for run in given if run.states == states]) for states in (64, 16, 4))
    variance = np.mean([np.var(big - other, ddof=1) for other in others])
    assert small.behind is not None
    assert small.behind.value == pytest.approx(np.mean(big - others[1]))
    assert small.behind.noise(0.95) == pytest.approx(np.sqrt(variance / 3) * stats.t.ppf(0.95, 4))


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        (_, _, small) = answer_of(runs(rng, 0.05, 3, 0.02), 10, worth=0.1).sizes
        assert small.behind is not None
        inside += abs(small.behind.value - 0.05) <= small.behind.noise(0.95)
    assert stats.binomtest(inside, 400, 0.9).pvalue > 1e-3


def test_scores_add_the_error_of_the_sample() -> None:
    rng, given = np.random.default_rng(2), []
    for run in runs(rng, 0.0, 2, 0.0):
        scores = torch.tensor(rng.random(50) < 0.5).float()
        given.append(replace(run, scores=scores, metric=float(scores.mean())))
    (_, small, _) = answer_of(given, 10, worth=0.1).sizes
    assert small.behind is not None
    assert small.behind.examples == 50
    one, other = (torch.stack([run.scores for run in given if run.states == n]).mean(0) for n in (64, 16))
    assert small.behind.sampling == pytest.approx(stats.sem((one - other).double().numpy()), rel=1e-6)


def right_or_wrong(right: int, of: int = 1000) -> list[ShortRun]:
    """Two sizes, two seeds: a tenth is right before, and the same examples after, so both sizes are as good."""
    scores = (torch.arange(of) < right).float()
    return [ShortRun(n, seed, 1.0, 0.1, right / of, scores, 1.0, 100) for n in (16, 4) for seed in (0, 1)]


@pytest.mark.parametrize(("right", "answer"), [(250, "not known"), (549, "not known"), (551, "train small")])
def test_a_small_size_is_not_recommended_before_half_of_it_all_is_learnt(right: int, answer: str) -> None:
    found = answer_of(right_or_wrong(right), 10, worth=0.25)  # from 0.1 on there is 0.9 to learn, half of it at 0.55
    assert (found.answer, found.possible) == (answer, pytest.approx(0.9))
    assert found.start_from == (4 if answer == "train small" else 16)
    if answer == "not known":
        assert f"only {(right / 1000 - 0.1) / 0.9:.0%} of what there is to learn" in str(found)


def test_scores_without_a_known_best_promise_nothing_about_the_rest() -> None:
    graded = [replace(run, scores=run.scores * 0.5) for run in right_or_wrong(250) if run.scores is not None]
    found = answer_of(graded, 10, worth=0.25)
    assert (found.answer, found.possible) == ("train small", None)
    assert answer_of(right_or_wrong(250), 10, worth=0.25, mode="min").possible is None


def test_a_run_survives_its_file() -> None:
    run = ShortRun(4, 1, 3.0, 0.1, 0.5, torch.tensor([0.0, 1.0]), 2.5, 77, (1.5, 2.0))
    again = ShortRun.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again.scores is not None
    assert torch.equal(again.scores, torch.tensor([0.0, 1.0]))
    assert {**again.__dict__, "scores": None} == {**run.__dict__, "scores": None}


@pytest.mark.parametrize("backend", ["plotly", "matplotlib"])
def test_it_is_drawn(backend: Any) -> None:
    pytest.importorskip(backend)
    figure = task(4, seeds=2).plot(backend)
    if backend == "plotly":
        assert [len(trace.x) for trace in figure.data] == [6, 3]
        assert "state matters" in figure.layout.title.text
    else:
        assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [6, 3]
