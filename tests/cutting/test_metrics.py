"""What `evaluate` may return, and that no error of it loses a cut."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressm.cutting import compress
from compressm.cutting.metrics import MetricWarning, as_metric, measure, measured
from compressm.errors import EvaluationError
from compressm.layers import LRU
from compressm.training.compressor import Compressor
from compressm.training.cushion import CushionWarning
from compressm.training.goal import GoalWarning
from compressm.training.history import Event


def raises(_: nn.Module) -> float:
    raise ZeroDivisionError("division by zero\nin my code")


BAD: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "None": (lambda _: None, r"evaluate returned None \(NoneType\); expected one real number.*returns its metric"),
    "a pair": (
        lambda _: (0.5, 3),
        r"evaluate returned \(0.5, 3\) \(tuple\); expected one real number, or one score per",
    ),
    "a list": (lambda _: [0.5], r"evaluate returned \[0.5\] \(list\); expected one real number"),
    "a string": (lambda _: "0.9", r"evaluate returned '0.9' \(str\); expected one real number"),
    "a dict": (lambda _: {"a": 1}, r"evaluate returned \{'a': 1\} \(dict\); expected one real number"),
    "a complex number": (lambda _: 1j, r"evaluate returned 1j \(complex\)"),
    "a tensor": (lambda _: torch.ones(3), r"evaluate returned .* \(Tensor of shape \(3,\)\); .*their mean"),
    "an array": (lambda _: np.ones((2, 2)), r"evaluate returned .* \(ndarray of shape \(2, 2\)\); .*their mean"),
    "nothing in a tensor": (lambda _: torch.ones(0), r"\(Tensor of shape \(0,\)\)"),
    "too few scores": (
        lambda _: torch.ones(9),
        r"\(Tensor of shape \(9,\)\); .*a score for each of 10 examples or more",
    ),
    "an error": (raises, r"^evaluate raised ZeroDivisionError: division by zero in my code; expected one real number"),
}
GOOD = (0.75, 3, torch.tensor(0.75), torch.tensor([[0.75]]), np.float32(0.75), np.array(0.75), np.array([2]))


@pytest.mark.parametrize("value", GOOD)
def test_numbers_of_every_kind_are_metrics(value: Any) -> None:
    assert as_metric(value) == float(np.asarray(value).reshape(()))


class Loop:
    """Ten cuts' worth of steps of a small layer."""

    def __init__(self, evaluate: Callable[[nn.Module], Any], steps: int = 40, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.layer = LRU(3, 16, r_min=0.9)
        self.optimizer = torch.optim.Adam(self.layer.parameters(), 1e-3)
        arguments = {"states": 8, "cuts": 1, "window": 0.25, "check_after": 3, **arguments}
        self.compressor = Compressor(self.layer, self.optimizer, steps, max_drop=0.1, evaluate=evaluate, **arguments)

    def step(self) -> Event | None:
        self.optimizer.zero_grad()
        self.layer(torch.randn(2, 6, 3)).square().mean().backward()
        self.optimizer.step()
        return self.compressor.step()

    def run(self, steps: int) -> list[str]:
        return [event.kind for _ in range(steps) if (event := self.step()) is not None]

    def everything(self) -> list[torch.Tensor]:
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return copy.deepcopy([*self.layer.state_dict().values(), *state])


def given(*values: Any) -> Callable[[nn.Module], Any]:
    """One value after the other; those that are functions are called."""
    left: Iterator[Any] = iter(values)

    def evaluate(model: nn.Module) -> Any:
        value = next(left)
        return value(model) if callable(value) else value

    return evaluate


# The cut comes after step 10. The metric is evaluated after steps 7, 8 and 9, before and after the cut, and at step 13.
AT_THE_CUT, AFTER_THE_CUT, EXAMINED = 3, 4, 5


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_metric_is_named_and_the_cut_is_not_lost(name: str) -> None:
    bad, words = BAD[name]
    loop = Loop(given(*[0.9] * EXAMINED, bad, 0.85))
    assert loop.run(12) == ["cut"]
    with pytest.raises(EvaluationError, match=words) as caught:  # at its examination
        loop.step()
    assert "\n" not in str(caught.value)
    assert loop.compressor.observing
    assert loop.run(1) == ["kept"]
    assert loop.layer.d_state == 8


@pytest.mark.parametrize("place", [0, AT_THE_CUT, AFTER_THE_CUT])
def test_an_error_before_or_right_after_a_cut_changes_nothing_and_the_cut_is_due_again(place: int) -> None:
    loop = Loop(given(*[0.9] * place, raises, *[0.9] * 5, 0.85))
    loop.run(6 if place == 0 else 9)
    with pytest.raises(EvaluationError, match="ZeroDivisionError"):
        loop.step()
    assert [value.shape for value in loop.layer.state_dict().values()] == [
        value.shape for value in LRU(3, 16).state_dict().values()
    ]
    assert not loop.compressor.observing
    assert not loop.compressor.done
    assert loop.run(7) == ["cut", "kept"]
    assert loop.layer.d_state == 8


def test_an_error_right_after_a_cut_undoes_it_bit_for_bit() -> None:
    failing = Loop(given(*[0.9] * AFTER_THE_CUT, raises))
    failing.run(9)
    with pytest.raises(EvaluationError):
        failing.step()
    with pytest.warns(GoalWarning, match="cuts nothing"):
        plain = Loop(lambda _: 0.9, states=16)  # the same steps
    plain.run(10)
    assert all(torch.equal(a, b) for a, b in zip(failing.everything(), plain.everything(), strict=True))


def test_scores_of_other_examples_are_refused() -> None:
    loop = Loop(given([0.9] * 20, [0.9] * 21))
    loop.run(7)
    with pytest.raises(
        EvaluationError, match="returned 21 scores and before that 20 scores; expected the same examples"
    ):
        loop.step()
    loop = Loop(given([0.9] * 20, 0.9))
    loop.run(7)
    with pytest.raises(EvaluationError, match="returned one number and before that 20 scores"):
        loop.step()


def of_each(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda values: [kind(value) for value in values]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, of_each(np.float32), of_each(torch.tensor)])
def test_one_score_per_example_is_a_metric_and_their_mean_counts(kind: Callable[..., Any]) -> None:
    values = [True, False] * 6 + [1, 0, 0]
    value, scores = measured(LRU(3, 16), lambda _: kind(values))
    assert value == 7 / 15
    assert scores is not None
    assert scores.tolist() == [float(one) for one in values]
    assert measure(LRU(3, 16), lambda _: kind(values)) == 7 / 15


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_never_becomes_the_reference(value: float) -> None:
    loop = Loop(given(*[0.9] * AT_THE_CUT, value, 0.9, 0.9, 0.85))
    loop.run(9)
    with pytest.warns(MetricWarning, match=r"evaluate returned (nan|-?inf) at step 10, before a cut.*again at step 11"):
        event = loop.step()
    assert event is not None
    assert event.kind == "postponed"
    assert str(event) == f"step 10: no cut, since the metric is {value}"
    assert loop.run(15) == ["cut", "kept"]
    assert loop.compressor.history[-1].reference == 0.9
    assert loop.layer.d_state == 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_cut_after_which_the_metric_is_not_finite_is_undone(value: float) -> None:
    loop = Loop(given(*[0.9] * EXAMINED, value), on_setback="halve")
    assert loop.run(12) == ["cut"]
    with pytest.warns() as caught:
        event = loop.step()
    assert [one.category for one in caught] == [MetricWarning, CushionWarning]
    assert re.match(r"evaluate returned (nan|-?inf) at step 13, after a cut, .* undone", str(caught[0].message))
    assert str(caught[1].message) == "step 13: no more cuts will be tried: the cut that was undone was the last one"
    assert event is not None
    assert event.kind == "rolled_back"
    assert loop.layer.d_state == 16


def test_a_metric_that_stays_bad_is_told_and_nothing_is_cut() -> None:
    loop = Loop(lambda _: math.nan)
    with pytest.warns(MetricWarning) as caught:
        *postponed, end = loop.run(40)
    assert set(postponed) == {"postponed"}
    assert end == "ended"
    assert "no more cuts are made" in str(caught[-1].message)
    given_up, short, told = map(str, loop.compressor.history[-3:])
    assert given_up.endswith("no more cuts will be tried: too few steps are left to examine one")
    assert "states=8 was asked for, and the cuts end at 16 states a layer" in short
    assert told == "step 40: end, metric nan; no cut was kept, so none cost anything"
    assert len(caught) == len(postponed) <= 30
    assert loop.compressor.done
    assert loop.layer.d_state == 16


def test_a_postponed_cut_is_resumed_where_it_was() -> None:
    # The cut is due after step 100, and the metric is evaluated after steps 97, 98 and 99.
    first, second = Loop(given(0.9, 0.9, 0.9, math.nan), steps=400), Loop(lambda _: 0.9, steps=400)
    with pytest.warns(MetricWarning):
        assert first.run(100) == ["postponed"]
    second.compressor.load_state_dict(json.loads(json.dumps(first.compressor.state_dict())))
    kinds = [(event.kind, event.step) for _ in range(20) if (event := second.step()) is not None]
    assert kinds == [("cut", 110), ("kept", 113)]


@pytest.mark.parametrize("name", BAD)
def test_compress_refuses_what_is_no_metric_and_leaves_the_model_alone(name: str) -> None:
    bad, words = BAD[name]
    for values in ((bad,), (0.9, bad)):  # before anything is cut, and during the search
        torch.manual_seed(0)
        layer = LRU(3, 16, r_min=0.9)
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(EvaluationError, match=words):
            compress(layer, max_drop=0.1, evaluate=given(*values))
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_compress_needs_a_finite_reference_and_takes_no_other_for_harmless(value: float) -> None:
    layer = LRU(3, 16, r_min=0.9)
    with pytest.raises(EvaluationError, match=r"evaluate returned (nan|-?inf) before anything was cut"):
        compress(layer, max_drop=0.1, evaluate=lambda _: value)
    compress(layer, max_drop=0.1, evaluate=lambda model: 0.9 if model.d_state == 16 else value)
    assert layer.d_state == 16


def test_modes_and_random_state_are_restored_after_an_error() -> None:
    layer = LRU(3, 16)

    def evaluate(model: nn.Module) -> float:
        model.eval()
        return float(torch.rand(2))

    state = torch.get_rng_state()
    with pytest.raises(EvaluationError, match="evaluate raised ValueError"):
        measure(layer, evaluate)
    assert layer.training
    assert torch.equal(torch.get_rng_state(), state)
