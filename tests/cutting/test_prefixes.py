"""Training with a random prefix of the states: what the model computes meanwhile is what its slices compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm import random_prefixes, sort_states
from compressm.cutting import state_dims
from compressm.errors import ConfigError, UnsupportedModelError
from compressm.integrations.hf_scan import fast_scan
from compressm.layers import LanguageModel, SequenceClassifier
from sorting_cases import model_of, tokens

OWN = ("mamba", "mamba2", "linear_attention", "gated_linear_attention", "delta_net", "rg_lru")
THEIRS = ("mamba", "mamba2", "recurrent_gemma")
ALL = [*(("own", name) for name in OWN), *(("transformers", name) for name in THEIRS)]


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out: Any = model(x)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize(("where", "name"), ALL)
def test_a_drawn_prefix_is_the_slice(where: str, name: str) -> None:
    model, x = model_of(where, name), tokens(seed=1)
    order = sort_states(model, [tokens()])
    tolerance: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9} if where == "own" else {"rtol": 2e-3, "atol": 2e-4}
    n = next(iter(state_dims(model).values()))
    smaller, whole = copy.deepcopy(model).train(), logits(model, x)
    order.slice(smaller, states=n // 2)
    model.train()
    torch.manual_seed(0)  # of dropout, if there is any
    expected = logits(smaller, x)
    with random_prefixes(model, least=0.5, whole=0.0, seed=3) as prefixes:
        prefixes.draw = lambda: setattr(prefixes, "share", 0.5)  # type: ignore[method-assign]
        torch.manual_seed(0)
        found = logits(model, x)
        torch.testing.assert_close(found, expected, **tolerance)
        model.eval()
        torch.testing.assert_close(logits(model, x), whole, **tolerance)
    assert all("forward" not in module.__dict__ for module in model.modules())
    model.train()
    torch.manual_seed(0)
    torch.testing.assert_close(logits(model, x), logits(model.eval(), x), **tolerance)


def test_fast_scans_stay_in_place() -> None:
    model, x = model_of("transformers", "mamba2").train(), tokens(seed=1)
    name = next(iter(state_dims(model)))
    with fast_scan(model):
        fast = model.get_submodule(name).forward
        with random_prefixes(model, least=0.5, whole=0.0) as prefixes:
            prefixes.draw = lambda: setattr(prefixes, "share", 0.5)  # type: ignore[method-assign]
            quick = logits(model, x)
        assert model.get_submodule(name).forward is fast
    with random_prefixes(model, least=0.5, whole=0.0) as prefixes:
        prefixes.draw = lambda: setattr(prefixes, "share", 0.5)  # type: ignore[method-assign]
        torch.testing.assert_close(logits(model, x), quick, rtol=1e-4, atol=1e-5)


def test_shares_are_drawn_as_they_were_asked_for() -> None:
    model, x = model_of("own", "mamba2").train(), tokens(seed=1)
    with random_prefixes(model, least=0.25, whole=0.4, seed=1) as prefixes:
        drawn = []
        for _ in range(400):
            prefixes.draw()
            drawn.append(prefixes.share)
        again: list[float] = []
        logits(model, x)
    with random_prefixes(model, least=0.25, whole=0.4, seed=1) as prefixes:
        for _ in range(400):
            prefixes.draw()
            again.append(prefixes.share)
    assert again == drawn
    parts = torch.tensor([share for share in drawn if share < 1])
    assert 0.3 < 1 - len(parts) / 400 < 0.5
    assert float(parts.min()) >= 0.25
    assert float((parts < 0.5).double().mean()) == pytest.approx(0.5, abs=0.1)  # uniform in the logarithm


@pytest.mark.parametrize("name", ["qwen3_next", "olmo_hybrid"])
def test_in_the_delta_rule_of_transformers_a_layer_is_its_slice_but_for_the_constant_in_its_norm(name: str) -> None:
    """A slice scales queries by its own dimension. The norm of the heads takes that out, except for its constant."""
    model = model_of("transformers", name)
    order = sort_states(model, [tokens()])
    model.double()
    path, n = next(iter(state_dims(model).items()))
    smaller = copy.deepcopy(model)
    order.slice(smaller, states=n // 2)
    layers: list[Any] = [one.get_submodule(path).train() for one in (model, smaller)]
    norm = getattr(layers[0], "norm", None) or layers[0].o_norm
    for layer in layers:
        (getattr(layer, "norm", None) or layer.o_norm).variance_epsilon = 0.0
    assert norm.variance_epsilon == 0.0
    width = model.get_input_embeddings().embedding_dim
    hidden = torch.randn(2, 20, width, dtype=torch.float64)
    with random_prefixes(model, least=0.5, whole=0.0) as prefixes:
        prefixes.share = 0.5
        found, expected = (layer(hidden) for layer in layers)
    found, expected = (one[0] if isinstance(one, tuple) else one for one in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


def test_trained_prefixes_are_better_than_untrained_ones() -> None:
    """Copies of what stood six places before, which a model with few states cannot all remember."""
    torch.manual_seed(0)
    model = LanguageModel(12, 32, 16, n_layers=2, layer="gated_linear_attention", n_heads=2, d_conv=3)
    generator = torch.Generator().manual_seed(0)

    def batch() -> Tensor:
        return torch.randint(12, (32, 6), generator=generator).repeat(1, 2)

    def loss(model: nn.Module, seen: Tensor) -> Tensor:
        return F.cross_entropy(model(seen)[:, 5:-1].flatten(0, 1), seen[:, 6:].flatten())

    def train(model: nn.Module, steps: int) -> None:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model, batch()).backward()
            optimizer.step()

    train(model, 200)
    order = sort_states(model, [batch()])
    plain, nested = copy.deepcopy(model), copy.deepcopy(model)
    train(plain, 100)
    with random_prefixes(nested):
        train(nested, 100)
    held_out = batch()
    for states in (8, 4, 2):
        found = []
        for one in (plain, nested):
            smaller = copy.deepcopy(one)
            order.slice(smaller, states=states)
            with torch.no_grad():
                found.append(float(loss(smaller, held_out)))
        assert found[1] < 0.8 * found[0], states


def test_what_has_no_prefix_is_refused() -> None:
    model = model_of("own", "mamba2")
    for wrong in ({"least": 0.0}, {"least": 1.5}, {"whole": -0.1}, {"whole": 2}):
        with pytest.raises(ConfigError, match="least must be in"), random_prefixes(model, **wrong):
            pass
    pairs = LanguageModel(40, 16, 8, layer="mamba3", head_dim=8)
    with pytest.raises(UnsupportedModelError, match="cannot be used with a part of its states"), random_prefixes(pairs):
        pass
    linear = SequenceClassifier(1, 2, 4, 6)
    with pytest.raises(UnsupportedModelError, match="no layer with an order"), random_prefixes(linear):
        pass
    compiled = torch.compile(model)
    with pytest.raises(UnsupportedModelError, match="compiled anew"), random_prefixes(compiled):  # type: ignore[arg-type]
        pass
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert compressm.random_prefixes is random_prefixes


def test_gradients_are_those_of_the_drawn_prefix_under_checkpointing() -> None:
    model = model_of("transformers", "mamba2").train()
    plain = copy.deepcopy(model)
    newer = getattr(model, "activation_checkpointing_enable", None)  # older versions call it by the other name
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    x = tokens(seed=1)
    for one in (model, plain):
        with random_prefixes(one, least=0.2, whole=0.0, seed=5):
            for _ in range(2):
                logits(one, x).square().mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
