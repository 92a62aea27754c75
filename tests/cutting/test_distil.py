"""Long convolutions as state space models, against scipy and frequency grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hankel
from torch import Tensor

import compressm
from compressm.cutting.distil import as_s4d, realize
from compressm.errors import InvalidRankRuleError, InvalidSystemError, UnsupportedModelError
from compressm.layers import Hyena, LanguageModel, SequenceClassifier


def response(seed: int, length: int, decay: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    window = decay ** torch.arange(length, dtype=torch.float64)
    return torch.randn(3, length, dtype=torch.float64, generator=generator).cumsum(1) * window


def test_hankel_values_are_the_singular_values_of_the_hankel_matrix() -> None:
    h = response(0, 40, 0.9)
    expected = np.linalg.svd(hankel(h[1].numpy()), compute_uv=False)
    np.testing.assert_allclose(realize(h, 3).hsv[1].numpy(), expected, rtol=1e-10, atol=1e-12 * expected[0])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(2, 60),
    decay=st.floats(0.5, 1.0),
    order=st.integers(1, 20),
)
def test_the_bound_holds_on_a_grid_and_the_h2_error_in_time(seed: int, length: int, decay: float, order: int) -> None:
    h = response(seed, length, decay)
    found = realize(h, order)
    assert float(found.system.lam.abs().max()) < 1
    long = 20_000
    kernel = found.system.kernel(long)[..., 0, 0]
    error = torch.nn.functional.pad(h, (0, long - length)) - kernel
    if float(found.system.lam.abs().max()) < 0.999:
        torch.testing.assert_close(error.norm(dim=1), found.h2_error, rtol=1e-6, atol=1e-9 * float(h.norm()))
    gain = torch.fft.rfft(error, dim=1).abs().amax(1)
    assert bool((gain <= found.bound + 1e-8 * found.hsv[:, 0]).all())
    if length > 30 and order <= 4:  # far from a delay line, which has no eigenvectors
        torch.testing.assert_close(found.bound, 2 * found.hsv[:, order:].sum(1))


def test_a_filter_that_is_a_state_space_model_is_found_exactly() -> None:
    steps = torch.arange(400, dtype=torch.float64)
    h = 0.9**steps * torch.cos(0.3 * steps) + 0.5 * 0.8**steps
    found = realize(h[None], 3)
    assert found.relative_h2_error < 1e-9
    lam = sorted(found.system.lam[0].tolist(), key=abs)
    np.testing.assert_allclose(lam, [0.8, 0.9 * np.exp(0.3j)], rtol=1e-8)


def test_the_layer_computes_the_realised_filters() -> None:
    h = response(3, 80, 0.95)
    found = realize(h, 7)
    layer = as_s4d(found.system, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    u = torch.randn(2, 200, 3, dtype=torch.float64)
    kernel, expected = found.system.kernel(200)[..., 0, 0], layer.D * u
    for j in range(200):
        expected[:, j:] = expected[:, j:] + kernel[:, j] * u[:, : 200 - j]
    torch.testing.assert_close(layer(u), expected, rtol=1e-6, atol=1e-6)


def test_a_distilled_model_is_close_trains_is_cut_and_is_saved(tmp_path) -> None:
    torch.manual_seed(4)
    model = LanguageModel(9, 8, 0, 2, layer="hyena", max_length=48)
    tokens = torch.randint(9, (2, 48))
    with torch.no_grad():
        before = model(tokens)
    reports = compressm.distil(model, order=24)
    assert [report.name for report in reports] == ["blocks.0.ssm.filter", "blocks.1.ssm.filter"]
    assert all(report.relative_h2_error < 0.05 and report.largest_bound < report.largest_gain for report in reports)
    with torch.no_grad():
        assert float((model(tokens) - before).norm() / before.norm()) < 0.05
    model(tokens).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert set(compressm.compress(model, states=4).state_dims.values()) == {4}
    compressm.save(model, tmp_path / "model")
    again = compressm.load(tmp_path / "model")
    assert torch.equal(again(tokens), model(tokens))


def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidRankRuleError, match="order must be at least 1; got 0"):
        realize(torch.ones(1, 4), 0)
    with pytest.raises(InvalidSystemError, match=r"must be \(filters, L\); got \(4,\)"):
        realize(torch.ones(4), 2)
    with pytest.raises(InvalidSystemError, match="finite"):
        realize(torch.tensor([[1.0, float("nan")]]), 2)
    with pytest.raises(UnsupportedModelError, match="no long convolution"):
        compressm.distil(Hyena(4, 3))


def test_a_distilled_s4_classifier_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, 4, 8, layer="s4", max_length=32).eval()
    compressm.distil(model, order=4)
    compressm.save(model, tmp_path)
    u = torch.randn(2, 32, 1)
    torch.testing.assert_close(compressm.load(tmp_path).eval()(u), model(u))
