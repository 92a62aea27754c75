"""Cuts through weight normalisation: the parameters of a weight are cut, and the weight with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import compressm
from compressm.adapters import selection_change
from compressm.adapters.composed import composed_tensors, effective_weight
from compressm.adapters.hf_mamba import times
from compressm.errors import UnsupportedModelError
from compressm.layers import Mamba, Mamba2

PARTS = ("in_proj", "conv1d")


def mamba2() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Mamba2(4, 8, head_dim=4, n_groups=2)).double()


def normalised(model: nn.Module) -> nn.Module:
    """A copy of a model whose parts compute their weights by weight normalisation; the function is the same."""
    model = copy.deepcopy(model)
    for part in PARTS:
        module: Any = weight_norm(model.get_submodule(f"0.{part}"), "weight")
        v = module.parametrizations.weight.original1
        with torch.no_grad():  # the scale of every row of v is free
            v.mul_(0.5 + torch.rand(v.shape[0], *[1] * (v.ndim - 1), dtype=v.dtype))
    return model


def test_a_cut_through_weight_normalisation_is_the_cut_of_the_weight() -> None:
    plain = mamba2()
    parametrized, u = normalised(plain), torch.randn(3, 20, 4, dtype=torch.float64)
    torch.testing.assert_close(parametrized(u), plain(u), rtol=1e-12, atol=1e-12)
    for model in (plain, parametrized):
        report = compressm.compress(model, states=3, data=[u])
        assert report.layers[0].states_after == 3
    torch.testing.assert_close(parametrized(u), plain(u), rtol=1e-12, atol=1e-12)
    g = parametrized.get_parameter("0.in_proj.parametrizations.weight.original0")
    assert g.shape[0] == plain.get_parameter("0.in_proj.weight").shape[0]


def test_the_next_step_moves_the_parameters_of_a_normalised_weight() -> None:
    model = normalised(mamba2())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    compressor = compressm.Compressor(model, optimizer, 40, states=3, cuts=1, window=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(3, 12, 4, dtype=torch.float64)).square().sum().backward()
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer.step()
        compressor.step()
    assert compressor.state_dims == {"0": 3}
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_what_weight_normalisation_cannot_follow_is_refused_by_name() -> None:
    model = nn.Sequential(Mamba(4, 8))
    weight_norm(model[0].x_proj, "weight")  # type: ignore[arg-type]  # its rows are combined, and their norms change
    with pytest.raises(UnsupportedModelError, match=r"^0\.x_proj\.weight .*\(weight normalisation\).*parametrizations"):
        compressm.compress(model, states=3, data=[torch.randn(2, 6, 4)])


def test_weights_of_normalisation_over_another_axis_are_not_cut() -> None:
    model = nn.Sequential(Mamba2(4, 8, head_dim=4))
    weight_norm(model[0].in_proj, "weight", dim=1)  # type: ignore[arg-type]
    assert "0.in_proj.weight" not in composed_tensors(model)
    with pytest.raises(UnsupportedModelError, match=r"^0\.in_proj\.weight is computed from other"):
        compressm.compress(model, states=3, data=[torch.randn(2, 6, 4)])


def test_the_effective_weight_of_a_normalised_module_is_its_weight() -> None:
    module: Any = weight_norm(nn.Linear(3, 5))
    expected: Tensor = module.parametrizations.weight.original1
    expected = expected / expected.norm(dim=1, keepdim=True) * module.parametrizations.weight.original0
    torch.testing.assert_close(effective_weight(module), expected)


def test_a_change_of_one_parameter_is_made_in_another_with_the_same_axis() -> None:
    weight, factor, kept = torch.randn(5, 3), torch.randn(2, 5), torch.tensor([3, 0])
    change = selection_change("W", weight, 0, kept)
    assert torch.equal(change.of("A", factor, 1).values[0], factor[:, kept])
    assert torch.equal(times(change, 2.0).values[0], 2 * weight[kept])
    torch.testing.assert_close(times(change, 2.0).of("A", factor, 1).values[0], 2 * factor[:, kept])
