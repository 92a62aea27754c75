"""Batches of no sequence, and sequences of no step, through every layer and model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressm.layers import LanguageModel, SequenceClassifier
from compressm.layers.models import GATED, TIME_INVARIANT
from layer_cases import LAYERS, WIDTH

SIZES = [(0, 5), (3, 0), (0, 0)]
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 3},
    "mamba3": {"head_dim": 3},
    "linear_attention": {"n_heads": 2},
    "gated_linear_attention": {"n_heads": 2},
    "delta_net": {"n_heads": 2},
}


def gradients_are_zero(y: Tensor, model: nn.Module, *inputs: Tensor) -> None:
    leaves = [p for p in model.parameters() if p.requires_grad] + [u.requires_grad_() for u in inputs]
    found = torch.autograd.grad(y.sum(), leaves, allow_unused=True, materialize_grads=True)
    for leaf, grad in zip(leaves, found, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_layers(name: str, batch: int, length: int) -> None:
    layer, u = LAYERS[name](), torch.randn(batch, length, WIDTH, requires_grad=True)
    y = layer(u)
    assert y.shape == u.shape
    assert y.dtype == u.dtype
    gradients_are_zero(y, layer, u)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("s5-both", "bidirectional")])
def test_a_step_of_no_sequence(name: str) -> None:
    layer: Any = LAYERS[name]()
    u, start = torch.randn(0, WIDTH, requires_grad=True), layer.initial_state(0)
    y, state = layer.step(u, start)
    assert y.shape == u.shape
    _, like = layer.step(torch.randn(2, WIDTH), layer.initial_state(2))
    assert [s.shape[1:] for s in tree_leaves(state)] == [s.shape[1:] for s in tree_leaves(like)]
    assert all(s.shape[0] == 0 for s in tree_leaves(state))
    gradients_are_zero(y, layer, u)


@pytest.mark.parametrize("layer", [*TIME_INVARIANT, *GATED])
@pytest.mark.parametrize(("batch", "length"), SIZES)
@pytest.mark.parametrize("training", [True, False])
def test_classifiers(layer: str, batch: int, length: int, training: bool) -> None:
    model = SequenceClassifier(2, 5, WIDTH, 4, n_layers=2, layer=layer, **OPTIONS.get(layer, {})).train(training)
    before = {key: value.clone() for key, value in model.named_buffers()}
    u = torch.randn(batch, length, 2, requires_grad=True)
    logits = model(u)
    assert logits.shape == (batch, 5)
    # The mean over no steps is that of `step` before the first one: zero.
    torch.testing.assert_close(logits, model.decoder.bias.expand(batch, 5))
    parameters = [p for p in model.parameters() if p is not model.decoder.bias]
    for p, grad in zip(parameters, torch.autograd.grad(logits.sum(), parameters), strict=True):
        assert grad.shape == p.shape
        assert not grad.any()
    for key, value in model.named_buffers():
        torch.testing.assert_close(value, before[key])  # nothing was seen: no statistics change


@pytest.mark.parametrize("layer", GATED)
@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_language_models(layer: str, batch: int, length: int) -> None:
    model = LanguageModel(7, WIDTH, 4, layer=layer, **OPTIONS.get(layer, {}))
    logits = model(torch.zeros(batch, length, dtype=torch.int64))
    assert logits.shape == (batch, length, 7)
    gradients_are_zero(logits, model)


def test_models_of_no_sequence_step_by_step() -> None:
    model: Any = SequenceClassifier(2, 5, WIDTH, 4).eval()
    assert model.step(torch.randn(0, 2), model.initial_state(0))[0].shape == (0, 5)
    model = LanguageModel(7, WIDTH, 4)
    assert model.generate(torch.zeros(0, 2, dtype=torch.int64), 3).shape == (0, 5)
    with pytest.raises(ValueError, match=r"at least one token; got tokens \(2, 0\)"):
        model.generate(torch.zeros(2, 0, dtype=torch.int64), 3)
