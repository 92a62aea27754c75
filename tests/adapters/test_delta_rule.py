"""DeltaNet and Gated DeltaNet, which erase along their keys."""

from __future__ import annotations

import copy

import pytest
import torch
from test_said_and_measured import sequences, stated
from torch import Tensor

import compressm
from compressm.layers import DeltaNet
from compressm.theory.recurrence import ErrorEstimate


def by_definition(layer: DeltaNet, u: Tensor) -> Tensor:
    """Token by token, in float64, from the parameters."""
    weights = {name: value.detach().double() for name, value in layer.named_parameters()}
    u, heads = u.double(), layer.n_heads
    S = u.new_zeros(u.shape[0], heads, layer.head_dim, layer.d_state)
    outputs = []
    for x in u.unbind(1):
        k, q, v = ((x @ weights[f"{name}_proj.weight"].T).unflatten(-1, (heads, -1)) for name in "kqv")
        k, q = k / k.norm(dim=-1, keepdim=True), q / q.norm(dim=-1, keepdim=True)
        beta = torch.sigmoid(x @ weights["beta_proj.weight"].T + weights["beta_proj.bias"])[..., None, None]
        if layer.gated:
            decay = torch.sigmoid(x @ weights["decay_proj.weight"].T + weights["decay_proj.bias"])
            S = decay[..., None, None] ** (1 / 16) * S
        S = S - beta * (S @ k[..., None]) * k[..., None, :] + beta * v[..., None] * k[..., None, :]
        y = (S @ q[..., None])[..., 0]
        y = (y / (y.square().mean(-1, keepdim=True) + layer.norm_eps).sqrt()).flatten(-2)
        gate = x @ weights["gate_proj.weight"].T
        outputs.append((weights["norm_weight"] * y * gate * torch.sigmoid(gate)) @ weights["out_proj.weight"].T)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rank", [3, 8])
def test_the_delta_rule_keeps_the_space_of_its_keys(rank: int, gated: bool) -> None:
    torch.manual_seed(0)
    layer = DeltaNet(16, 32, 2, gated=gated)
    smaller = copy.deepcopy(layer)

    def inputs(seed: int) -> Tensor:
        directions = torch.randn(rank, 16, generator=torch.Generator().manual_seed(99))
        return torch.randn(8, 150, rank, generator=torch.Generator().manual_seed(seed)) @ directions / rank**0.5

    (report,) = compressm.compress(smaller, states=rank, data=[inputs(1)]).layers
    before, after = by_definition(layer, inputs(2)), by_definition(smaller, inputs(2))
    made = float((after - before).norm() / before.norm())
    # Keys and queries each span a space of that rank, and these two have nothing in common. In the space of the keys
    # the cut is exact but for the epsilon of the norm, whose weight changes with the length of the queries.
    assert made < 0.008
    assert stated(report) < 0.016


@pytest.mark.parametrize("seed", range(4))
def test_what_the_delta_rule_erases_along_counts_as_read(seed: int) -> None:
    """Keys in a plane, and queries along one axis of it: the output does not read the state across, but the erasure
    does, and it changes what is stored along the axis."""
    torch.manual_seed(seed)
    layer = DeltaNet(4, 3, 1)
    with torch.no_grad():
        layer.k_proj.weight.zero_()
        layer.k_proj.weight[:2] = torch.randn(2, 4)
        layer.q_proj.weight.zero_()
        layer.q_proj.weight[0] = torch.randn(4)
        layer.q_proj.weight[2] = 0.1 * torch.randn(4)  # where nothing is stored
    u = torch.randn(16, 60, 4)
    smaller = copy.deepcopy(layer)
    (report,) = compressm.compress(smaller, states=1, data=[u]).layers
    before, after = by_definition(layer, u), by_definition(smaller, u)
    made = float((after - before).norm() / before.norm())
    assert isinstance(report.certificate, ErrorEstimate)
    assert 0.5 < report.certificate.relative_error / made < 2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("states", [4, 8, 12])
def test_the_delta_rules_estimate_is_right_on_white_noise_too(states: int, gated: bool) -> None:
    torch.manual_seed(0)
    layer = DeltaNet(16, 32, 2, gated=gated)
    smaller = copy.deepcopy(layer)
    (report,) = compressm.compress(smaller, states=states, data=[sequences("white noise", 1)]).layers
    fresh = sequences("white noise", 2, 8)
    before, after = by_definition(layer, fresh), by_definition(smaller, fresh)
    made = float((after - before).norm() / before.norm())
    assert isinstance(report.certificate, ErrorEstimate)
    assert 0.5 < report.certificate.relative_error / made < 2
    assert 0.8 < stated(report) / made < 1.25
