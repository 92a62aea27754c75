from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import compressm
from compressm.adapters import find_layers
from compressm.adapters.changes import layer_values, write
from compressm.adapters.linear_attention import LinearAttentionAdapter
from compressm.layers import DeltaNet, GatedLinearAttention, LinearAttention, SequenceClassifier
from compressm.layers.linear_attention import MatrixStateLayer
from compressm.observing.moments import Statistics
from compressm.theory.recurrence import ErrorEstimate, SelectiveReduction, balance_selective, moments
from compressm.theory.selection import _balanced_maps, reduce_selective

ADAPTER = LinearAttentionAdapter()


@st.composite
def layers(draw: st.DrawFn) -> LinearAttention:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    heads = draw(st.integers(1, 3))
    layer = LinearAttention(
        draw(st.integers(1, 4)) * heads,
        draw(st.integers(1, 9)),
        heads,
        draw(st.integers(1, 2)),
        draw(st.sampled_from(["none", "fixed", "gated"])),
        d_conv=draw(st.sampled_from([0, 2, 4])),
    )
    torch.nn.init.normal_(layer.norm_weight)
    return layer.double()


def inputs(layer: LinearAttention, length: int = 30, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, length, layer.d_model, generator=generator, dtype=torch.float64)


def convolved(layer: MatrixStateLayer, u: Tensor, t: int) -> Tensor:
    """What keys, queries and values read at one token, tap by tap."""
    x = u[:, t].clone()
    if layer.conv1d is not None:
        taps = layer.conv1d.weight[:, 0]
        for back in range(min(t + 1, taps.shape[1])):
            x += taps[:, taps.shape[1] - 1 - back] * u[:, t - back]
    return x


def by_definition(layer: LinearAttention, u: Tensor) -> Tensor:
    """Token by token, head by head, from the parameters."""
    heads, p, outputs = layer.n_heads, layer.head_dim, []
    gates = [torch.ones(())] * heads
    S = u.new_zeros(u.shape[0], heads, p, layer.d_state)
    for t in range(u.shape[1]):
        x = convolved(layer, u, t)
        k, q, v = (x @ w.weight.T for w in (layer.k_proj, layer.q_proj, layer.v_proj))
        k, q, v = (z.reshape(u.shape[0], heads, -1) for z in (k, q, v))
        if layer.decay == "fixed":
            gates = [torch.tensor(1 - 2.0 ** (-5 - h), dtype=u.dtype) for h in range(heads)]
        if layer.decay == "gated":
            gates = list(torch.sigmoid(layer.decay_proj(x)).pow(1 / 16).T[:, :, None, None])
        S = torch.stack([gates[h] * S[:, h] + v[:, h, :, None] * k[:, h, None, :] for h in range(heads)], 1)
        y = torch.einsum("bhpn,bhn->bhp", S, q)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        outputs.append(layer.out_proj(layer.norm_weight * y.flatten(1) * F.silu(layer.gate_proj(u[:, t]))))
    return torch.stack(outputs, 1)


@settings(max_examples=30)
@given(layer=layers())
def test_the_layer_is_its_definition(layer: LinearAttention) -> None:
    u = inputs(layer)
    torch.testing.assert_close(layer(u), by_definition(layer, u), rtol=1e-9, atol=1e-11)


@torch.no_grad()
def balancing_of(layer: LinearAttention, u: Tensor):
    return balance_selective(moments(ADAPTER.signals(layer, u)))


@settings(max_examples=30)
@given(layer=layers())
def test_a_balancing_change_of_basis_changes_no_output(layer: LinearAttention) -> None:
    torch.manual_seed(0)
    u, n, heads = inputs(layer), layer.d_state, layer.n_heads
    before = layer(u)
    # Random but well conditioned: the balancing one of few states can be singular to working precision.
    into = torch.linalg.qr(torch.randn(heads, n, n, dtype=torch.float64))[0] * torch.rand(heads, n, 1).double().add(0.5)
    out = torch.linalg.inv(into).mT
    reduction = SelectiveReduction(into, out, None, ErrorEstimate(n, n, 0.0, 0.0))
    write(layer, ADAPTER.plan(layer_values(layer), reduction))
    torch.testing.assert_close(layer(u), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("d_conv", [0, 4])
def test_balanced_coordinates_at_full_rank_are_exact(d_conv: int) -> None:
    torch.manual_seed(0)
    layer = LinearAttention(16, 6, 2, d_conv=d_conv).double()
    u = inputs(layer, 60)
    before = layer(u)
    balancing = balancing_of(layer, u)
    into, out = _balanced_maps(balancing, 6)
    write(layer, ADAPTER.plan(layer_values(layer), SelectiveReduction(into, out, None, ErrorEstimate(6, 6, 0.0, 0.0))))
    torch.testing.assert_close(layer(u), before, rtol=1e-10, atol=1e-10)
    again = balancing_of(layer, u)
    sigma = torch.diag_embed(balancing.hsv)
    scale = (again.P.diagonal(dim1=1, dim2=2).sum(1) / balancing.hsv.sum(1))[:, None, None]  # free in every head
    torch.testing.assert_close(again.P / scale, sigma, rtol=1e-4, atol=1e-5 * float(sigma.max()))  # states are float32
    torch.testing.assert_close(again.W * scale, sigma, rtol=1e-4, atol=1e-5 * float(sigma.max()))


def test_keys_and_queries_keep_their_balance_whatever_the_output_is_scaled_by() -> None:
    def ratio(layer: LinearAttention) -> Tensor:
        k, q = (layer.get_parameter(f"{name}_proj.weight").unflatten(0, (2, -1)) for name in "kq")
        return k.norm(dim=(1, 2)) / q.norm(dim=(1, 2))

    for scale in (0.01, 1.0, 100.0):
        torch.manual_seed(0)
        layer = LinearAttention(16, 8, 2).double()
        layer.out_proj.weight.data *= scale
        before = ratio(layer)
        compressm.compress(layer, states=4, data=[inputs(layer, 60)])
        torch.testing.assert_close(ratio(layer), before)


@pytest.mark.parametrize("d_conv", [0, 4])
def test_a_cut_attains_the_least_error_and_makes_about_that(d_conv: int) -> None:
    torch.manual_seed(1)
    layer = LinearAttention(16, 12, 2, d_conv=d_conv).double()
    u = inputs(layer, 400)
    reduction = reduce_selective(balancing_of(layer, u), 6, ADAPTER.folds_into, ADAPTER.folds_out)
    assert 0 < reduction.estimate.least_error < 1
    assert reduction.estimate.relative_error == pytest.approx(reduction.estimate.least_error, rel=1e-6)

    @torch.no_grad()
    def weighted(layer: LinearAttention) -> Tensor:
        v, log_decay, k, q = layer.recurrence(u)
        y = compressm.scans.ssd_scan(v, log_decay, k, q, engine="loop").flatten(-2)
        gain = ADAPTER.signals(layer, u).gain
        assert gain is not None
        return y * gain

    before = weighted(layer)
    write(layer, ADAPTER.plan(layer_values(layer), reduction))
    assert layer.d_state == layer.k_proj.out_features // 2 == 6
    made = float((weighted(layer) - before).norm() / before.norm())
    assert 0.5 * reduction.estimate.relative_error < made < 2 * reduction.estimate.relative_error


def test_directions_that_no_key_has_go_without_loss() -> None:
    torch.manual_seed(2)
    layer = LinearAttention(8, 10, 2).double()
    with torch.no_grad():  # keys of rank 3 in each head
        for rows in layer.k_proj.weight.view(2, 10, 8):
            U, s, Vh = torch.linalg.svd(rows)
            rows.copy_(U[:, :3] * s[:3] @ Vh[:3])
    u = inputs(layer)
    before = layer(u)
    report = compressm.compress(layer, states=3, data=[u])
    assert layer.d_state == 3
    assert report.layers[0].certificate.relative_error < 1e-3
    torch.testing.assert_close(layer(u), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"layer": "linear_attention"}, {"layer": "delta_net", "d_conv": 3}])
def test_cut_while_training_saved_and_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = SequenceClassifier(1, 3, 8, 16, n_layers=2, n_heads=2, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    compressor = compressm.Compressor(model, optimizer, 20, states=5, cuts=2, window=0.5)
    for _ in range(20):
        u = torch.randn(4, 20, 1)
        loss = F.cross_entropy(model(u), u.mean((1, 2)).gt(0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        compressor.step()
    assert list(compressor.state_dims.values()) == [5, 5]
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())
    compressm.save(model.eval(), tmp_path / "small")
    u = torch.randn(2, 12, 1)
    assert torch.equal(compressm.load(tmp_path / "small").eval()(u), model(u))


@pytest.mark.parametrize("make", [LinearAttention, GatedLinearAttention, DeltaNet])
@pytest.mark.parametrize("taps", [1, -2])
def test_a_convolution_of_too_few_taps_is_refused(make: Any, taps: int) -> None:
    with pytest.raises(ValueError, match=rf"d_conv must be at least 2 taps, or 0 for no convolution; got {taps}$"):
        make(8, 4, 2, d_conv=taps)


def test_calls_of_forward_alone_are_observed_by_what_enters_the_layer() -> None:
    """Not by what keys and queries read behind the convolution."""
    torch.manual_seed(5)
    layer = LinearAttention(8, 6, 2, d_conv=3)
    u, found = torch.randn(2, 15, 8), []
    for call in (layer, layer.forward):
        statistics = Statistics(layer, sequences=None, memory=1.0)
        statistics.observe_next(training_only=False)
        call(u)
        statistics.close()
        found.append(statistics.moments()[""].tensors())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_weights_of_any_size_are_loaded() -> None:
    torch.manual_seed(4)
    cut, fresh = LinearAttention(8, 9, 2), LinearAttention(8, 9, 2)
    compressm.compress(cut, states=4, data=[torch.randn(2, 30, 8)])
    ((_, adapter),) = find_layers(fresh).values()
    write(fresh, adapter.resized(fresh, 4))
    fresh.load_state_dict(copy.deepcopy(cut.state_dict()))
    u = torch.randn(2, 10, 8)
    assert torch.equal(fresh(u), cut(u))


@pytest.mark.parametrize(
    "arguments", [{"d_state": 0}, {"n_heads": 3}, {"decay": "fast"}], ids=["d_state", "n_heads", "decay"]
)
def test_impossible_arguments_are_named(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LinearAttention(8, **arguments)
