"""Every layer and model, step by step, against its own forward pass over the whole sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from compressm.layers import (
    LRU,
    S4D,
    S5,
    GLUBlock,
    LanguageModel,
    LinearAttention,
    Mamba,
    Mamba2,
    ResidualBlock,
    SequenceClassifier,
)

WIDTH = 6
LAYERS: dict[str, Callable[[], Any]] = {
    "LRU": lambda: LRU(WIDTH, 9, r_min=0.8),
    "S5": lambda: S5(WIDTH, 9),
    "S4D": lambda: S4D(WIDTH, 9),
    "Mamba": lambda: Mamba(WIDTH, 5),
    "Mamba2": lambda: Mamba2(WIDTH, 5, head_dim=4),
    "LinearAttention": lambda: LinearAttention(WIDTH, 5, n_heads=2, expand=2),
    "RetNet": lambda: LinearAttention(WIDTH, 5, n_heads=3, decay="fixed"),
    "LinearAttention with a convolution": lambda: LinearAttention(WIDTH, 5, n_heads=2, d_conv=3),
    "GLUBlock, batch norm": lambda: GLUBlock("lru", WIDTH, 9),
    "GLUBlock, layer norm": lambda: GLUBlock("lru", WIDTH, 9, norm="layer"),
    "ResidualBlock": lambda: ResidualBlock("mamba", WIDTH, 5, dropout=0.1),
    "Mamba2Block": lambda: ResidualBlock("mamba2", WIDTH, 5, dropout=0.1, head_dim=4),
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "lru": {"d_state": [9, 4], "norm": "batch"},
    "lru, layer norm": {"d_state": [9, 4], "norm": "layer"},
    "s5": {"layer": "s5", "d_state": [9, 4]},
    "s4d": {"layer": "s4d", "d_state": [9, 4]},
    "mamba": {"layer": "mamba", "d_state": [5, 3]},
    "mamba2": {"layer": "mamba2", "d_state": [5, 3], "head_dim": 4},
    "linear_attention": {"layer": "linear_attention", "d_state": [5, 3], "n_heads": 2, "decay": "none"},
}


def used(model: Any) -> Any:
    """In evaluation mode, after a pass in training mode that moved the running statistics away from 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module(2 * torch.randn(3, 50, module.num_features) + 1)
    return model.eval()


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_step_by_step_is_the_sequence(kind: str) -> None:
    torch.manual_seed(0)
    layer, u = used(LAYERS[kind]()), torch.randn(3, 200, WIDTH)
    state, outputs = layer.initial_state(3), []
    for now in u.unbind(1):
        y, state = layer.step(now, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), layer(u), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifier_gives_after_every_step_the_logits_of_the_sequence_so_far(kind: str) -> None:
    torch.manual_seed(1)
    model, u = used(SequenceClassifier(2, 4, d_model=8, n_layers=2, **CLASSIFIERS[kind])), torch.randn(3, 200, 2)
    state = model.initial_state(3)
    for k, now in enumerate(u.unbind(1), 1):
        logits, state = model.step(now, state)
        if k in (1, 2, 77, 200):
            torch.testing.assert_close(logits, model(u[:, :k]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_language_model_step_by_step_is_the_sequence(layer: str) -> None:
    torch.manual_seed(2)
    options = {"head_dim": 4} if layer == "mamba2" else {}
    model = LanguageModel(11, 8, [5, 3], layer=layer, **options).eval()
    tokens, state, outputs = torch.randint(11, (2, 60)), model.initial_state(2), []
    for now in tokens.unbind(1):
        logits, state = model.step(now, state)
        outputs.append(logits)
    torch.testing.assert_close(torch.stack(outputs, 1), model(tokens), atol=1e-5, rtol=1e-5)


def test_a_step_in_training_mode_is_refused_where_it_would_use_the_statistics_of_one_step() -> None:
    model = SequenceClassifier(2, 4, d_model=8, d_state=3)
    before = model.state_dict()["blocks.0.norm.running_mean"].clone()
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        model.step(torch.zeros(5, 2), model.initial_state(5))
    assert torch.equal(model.state_dict()["blocks.0.norm.running_mean"], before)


def test_padding_does_not_count_step_by_step_either() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, 4, 6, layer="mamba", vocabulary=9).eval()
    tokens = torch.tensor([[3, 1, 4, 0, 0], [5, 0, 0, 0, 0], [2, 6, 5, 3, 5]])
    state = model.initial_state(3)
    for t in range(5):
        logits, state = model.step(tokens[:, t], state)
    torch.testing.assert_close(logits, model(tokens))
