"""NaN and Inf, in the loss, the gradients and the weights, before a cut, in a training loop of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from harness import Record
from torch import Tensor, nn

import compressm
from compressm.cutting.metrics import MetricWarning
from compressm.errors import InvalidSystemError
from compressm.layers import SequenceClassifier, parameter_groups

# Accuracies of so few digits cannot resolve a max_drop of 0, and setbacks end the cutting.
pytestmark = pytest.mark.filterwarnings("ignore::compressm.training.cushion.CushionWarning")

LAYERS = {"lru": {}, "mamba": {}, "mamba2": {"head_dim": 4}, "linear_attention": {"n_heads": 2}}


def prepared(layer: str) -> tuple[nn.Module, torch.optim.Optimizer, compressm.Compressor]:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, d_model=4, d_state=8, n_layers=2, layer=layer, **LAYERS[layer])
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-2))
    return model, optimizer, compressm.Compressor(model, optimizer, 20, states=3, cuts=2, window=0.5)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, factor: float = 1.0) -> None:
    u = torch.randn(5, 12, 1, generator=torch.Generator().manual_seed(number))
    loss = nn.functional.cross_entropy(model(u), torch.arange(5) % 3) * factor
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states: list[Any] = [value for entry in optimizer.state.values() for value in entry.values()]
    return [value.clone() for value in (*model.state_dict().values(), *states) if isinstance(value, Tensor)]


def alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in zip(a, b, strict=True)
    )


def poison_loss(model: nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
    step(model, optimizer, 4, value)


def poison_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
    handle = next(model.blocks[1].ssm.parameters()).register_hook(lambda grad: grad * value)  # type: ignore[union-attr, index]
    step(model, optimizer, 4)
    handle.remove()


def poison_weights(model: nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
    step(model, optimizer, 4)
    with torch.no_grad():
        next(model.blocks[1].ssm.parameters()).view(-1)[0] = value  # type: ignore[union-attr, index]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("poison", [poison_loss, poison_gradients, poison_weights])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_is_not_cut(
    layer: str, poison: Callable[[nn.Module, torch.optim.Optimizer, float], None], value: float, tried: Record
) -> None:
    """The cut at step 5 meets weights that are no numbers: it says so in one line, and touches nothing."""
    model, optimizer, compressor = prepared(layer)
    for number in range(4):
        step(model, optimizer, number)
        assert compressor.step() is None
    poison(model, optimizer, value)
    before, dims = bits(model, optimizer), compressor.state_dims
    with pytest.raises(InvalidSystemError) as caught:
        compressor.step()
    assert "\n" not in str(caught.value)
    assert alike(bits(model, optimizer), before)
    assert compressor.state_dims == dims
    tried(f"NaN or Inf in {poison.__name__.removeprefix('poison_')} before a cut", stopped=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_cushion_undoes_a_divergence(value: float, tried: Record) -> None:
    """Weights that become no numbers while a cut is under observation are rolled back with it."""
    model, optimizer, _ = prepared("lru")

    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        return float(model.eval()(torch.ones(1, 6, 1)).sum())

    compressor = compressm.Compressor(
        model, optimizer, 40, states=3, cuts=1, window=0.25, max_drop=1e9, evaluate=evaluate, check_after=3
    )
    before: list[Tensor] = []
    kinds = []
    for number in range(13):
        step(model, optimizer, number)
        if number == 9:
            before = bits(model, optimizer)
        if number == 11:
            poison_weights(model, optimizer, value)
        with pytest.warns(MetricWarning) if number == 12 else nullcontext():
            event = compressor.step()
        kinds += [] if event is None else [event.kind]
    assert kinds == ["cut", "rolled_back"]
    assert alike(bits(model, optimizer), before)
    tried("NaN or Inf while a cut is under observation")
