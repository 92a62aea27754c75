"""Losses against targets that are drawn from the model's own prediction: their values, how often, and their sums."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compressm.errors import ConfigError
from compressm.observing.labels import sampled_losses

DRAWS = 20000


def test_classes_are_drawn_as_often_as_the_model_expects_them() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    p = logits.softmax(0)
    losses = sampled_losses(logits.expand(DRAWS, 3), "classification")
    assert losses.shape == (DRAWS,)
    for one in p:
        share = float(((losses + one.log()).abs() < 1e-9).double().mean())
        assert share == pytest.approx(float(one), abs=0.02)
    assert float(losses.mean()) == pytest.approx(float(-(p * p.log()).sum()), abs=0.03)  # the entropy


def test_the_slope_is_what_is_predicted_less_what_was_drawn() -> None:
    torch.manual_seed(0)
    logits = torch.randn(DRAWS, 1, dtype=torch.float64).expand(-1, 3) + torch.tensor([0.0, 1.0, 0.3])
    leaf = logits.detach().clone().requires_grad_()
    losses = sampled_losses(leaf, "classification")
    (slope,) = torch.autograd.grad(losses.sum(), leaf)
    p = leaf.detach().softmax(-1)
    drawn = p - slope  # one-hot
    assert torch.allclose(drawn.sort(-1).values, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close((drawn * p.log()).sum(-1), -losses.detach())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_sequence_of_tokens_is_the_sum_over_those_that_are_no_padding(wrapped: bool) -> None:
    logits = torch.randn(4, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    present = torch.arange(6) < torch.tensor([[6], [1], [3], [0]])

    def losses(present: torch.Tensor | None) -> torch.Tensor:
        torch.manual_seed(1)
        return sampled_losses(SimpleNamespace(logits=logits) if wrapped else logits, "classification", present)

    torch.manual_seed(1)
    flat = sampled_losses(logits.flatten(0, 1), "classification").view(4, 6)
    torch.testing.assert_close(losses(None), flat.sum(1))
    torch.testing.assert_close(losses(present), (flat * present).sum(1))
    torch.testing.assert_close(losses(present.double()[:, :5]), flat.sum(1))  # of another form: it is of other tokens


@pytest.mark.parametrize("shape", [(DRAWS, 2), (DRAWS, 3, 2)])
def test_numbers_are_drawn_with_variance_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    output = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    losses = sampled_losses(output, "regression")
    assert losses.shape == (DRAWS,)
    (slope,) = torch.autograd.grad(losses.sum(), output)  # output - target, since the target has no gradient
    torch.testing.assert_close(losses.detach(), slope.square().flatten(1).sum(1) / 2)
    assert float(slope.mean()) == pytest.approx(0, abs=0.02)
    assert float(slope.square().mean()) == pytest.approx(1, abs=0.03)
    if len(shape) == 3:
        present = torch.tensor([1.0, 1.0, 0.0]).expand(DRAWS, 3)
        assert float(sampled_losses(output, "regression", present).mean().detach()) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_and_double_is_kept(dtype: torch.dtype) -> None:
    assert sampled_losses(torch.randn(4, 3).to(dtype), "classification").dtype == torch.float32
    assert sampled_losses(torch.randn(4, 3).to(dtype), "regression").dtype == torch.float32
    assert sampled_losses(torch.randn(4, 3).double(), "regression").dtype == torch.float64


def test_outputs_that_are_no_predictions_are_refused() -> None:
    for bad in (torch.zeros(4), torch.zeros(4, 3, dtype=torch.int64), [1.0], SimpleNamespace(logits=None)):
        with pytest.raises(ConfigError, match=f"got {type(bad).__name__}: pass a function that returns the loss"):
            sampled_losses(bad, "classification")
    with pytest.raises(ConfigError, match="'classification' or 'regression'; got 'ranking'"):
        sampled_losses(torch.zeros(4, 3), "ranking")  # type: ignore[arg-type]
