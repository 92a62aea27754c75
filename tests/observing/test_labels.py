"""Probes of the Fisher information of a model's predictions: their second moments, their sums, and their spread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressm.errors import ConfigError
from compressm.observing.labels import divergences, fisher_probes

DRAWS = 20000


def slopes_of(output: torch.Tensor, likelihood: Any = "classification") -> torch.Tensor:
    leaf = output.detach().clone().requires_grad_()
    (slopes,) = torch.autograd.grad(fisher_probes(leaf, likelihood).sum(), leaf)
    return slopes


def score_moments(logits: torch.Tensor) -> torch.Tensor:
    """``E[s s^T]`` of the scores ``s = one-hot - p`` of labels drawn from the model, summed over the labels."""
    scores = torch.autograd.functional.jacobian(lambda z: z.log_softmax(0), logits)
    return torch.einsum("c,ci,cj->ij", logits.softmax(0), scores, scores)


def test_second_moments_of_the_slopes_are_those_of_scores() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    slopes = slopes_of(logits.expand(DRAWS, 3))
    torch.testing.assert_close(slopes.mT @ slopes / DRAWS, score_moments(logits), atol=5e-3, rtol=0.02)
    assert float(slopes.mean(0).abs().max()) < 0.01


def test_a_confident_model_is_measured_by_a_single_draw() -> None:
    """A drawn label would show the rarer class once in 100,000 draws. Its probe always does."""
    torch.manual_seed(0)
    logits = torch.tensor([11.5, 0.0], dtype=torch.float64)
    slopes = slopes_of(logits.expand(50, 2))
    expected = score_moments(logits).diagonal().expand(50, 2)
    torch.testing.assert_close(slopes.square(), expected, rtol=0.01, atol=0)


def test_tokens_are_independent() -> None:
    torch.manual_seed(0)
    slopes = slopes_of(torch.zeros(DRAWS, 2, 3, dtype=torch.float64))
    assert float((slopes[:, 0].mT @ slopes[:, 1] / DRAWS).abs().max()) < 0.01


def test_classes_that_a_mask_excludes_have_no_part() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, -torch.inf, 0.3]])
    assert bool(fisher_probes(logits, "classification").isfinite().all())
    slopes = slopes_of(logits)
    assert bool(slopes.isfinite().all())
    assert float(slopes[0, 1]) == 0


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_sequence_of_tokens_is_the_sum_over_those_that_are_no_padding(wrapped: bool) -> None:
    logits = torch.randn(4, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    present = torch.arange(6) < torch.tensor([[6], [1], [3], [0]])

    def losses(present: torch.Tensor | None) -> torch.Tensor:
        torch.manual_seed(1)
        return fisher_probes(SimpleNamespace(logits=logits) if wrapped else logits, "classification", present)

    torch.manual_seed(1)
    flat = fisher_probes(logits.flatten(0, 1), "classification").view(4, 6)
    torch.testing.assert_close(losses(None), flat.sum(1))
    torch.testing.assert_close(losses(present), (flat * present).sum(1))
    torch.testing.assert_close(losses(present.double()[:, :5]), flat.sum(1))  # of another form: it is of other tokens


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 2)])
def test_predicted_means_have_the_information_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    output = torch.randn(shape, dtype=torch.float64)
    assert fisher_probes(output, "regression").shape == (4,)
    slopes = slopes_of(output, "regression")
    torch.testing.assert_close(slopes.abs(), torch.ones_like(slopes))
    many = slopes_of(output.new_zeros(DRAWS, 2), "regression")
    torch.testing.assert_close(many.mT @ many / DRAWS, torch.eye(2, dtype=torch.float64), atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_and_double_is_kept(dtype: torch.dtype) -> None:
    assert fisher_probes(torch.randn(4, 3).to(dtype), "classification").dtype == torch.float32
    assert fisher_probes(torch.randn(4, 3).to(dtype), "regression").dtype == torch.float32
    assert fisher_probes(torch.randn(4, 3).double(), "regression").dtype == torch.float64


def test_outputs_that_are_no_predictions_are_refused() -> None:
    for bad in (torch.zeros(4), torch.zeros(4, 3, dtype=torch.int64), [1.0], SimpleNamespace(logits=None)):
        with pytest.raises(ConfigError, match=f"got {type(bad).__name__}: pass a function that returns the loss"):
            fisher_probes(bad, "classification")
    with pytest.raises(ConfigError, match="'classification' or 'regression'; got 'ranking'"):
        fisher_probes(torch.zeros(4, 3), "ranking")  # type: ignore[arg-type]


def test_one_number_is_no_choice_between_classes() -> None:
    """A softmax over one class is 1, so that no change of the number would ever be seen."""
    number = torch.randn(3, 1)
    for measured in (
        lambda: fisher_probes(number, "classification"),
        lambda: divergences(number, 2 * number, "classification"),
    ):
        with pytest.raises(ConfigError, match="loss='regression'"):
            measured()
    torch.testing.assert_close(divergences(number, 2 * number, "regression"), number[:, 0].double() ** 2 / 2)
