"""Layers in the form of flash-linear-attention's, with plain kernels in place of its own, which need a GPU.

They have the attributes of the package's layers and call their kernel as a global function. `test_fla` has the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_recurrence import by_loop
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import (
    FLADeltaNetAdapter,
    FLAGatedDeltaNetAdapter,
    FLAGatedLinearAttentionAdapter,
    SelectiveAdapter,
    layer_values,
)
from compressm.adapters.changes import write
from compressm.errors import UnsupportedModelError
from compressm.theory.recurrence import ErrorEstimate, SelectiveReduction, balance_selective, moments
from compressm.theory.selection import reduce_selective

WIDTH, HEADS, N, V = 6, 2, 4, 3


def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **_: Any) -> tuple[Tensor, None]:
    S, outputs = q.new_zeros(q.shape[0], HEADS, q.shape[-1], V), []
    for t in range(q.shape[1]):
        S = g[:, t].exp()[..., None] * S + k[:, t][..., None] * v[:, t][..., None, :]
        outputs.append((q[:, t][..., None] * S).sum(-2))
    return torch.stack(outputs, 1), None


def chunk_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Any = None, **given: Any) -> tuple[Tensor, None]:
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if given.get("use_beta_sigmoid_in_kernel"):
        beta = beta.sigmoid()
    if given.get("allow_neg_eigval"):
        beta = 2 * beta
    if given.get("use_gate_in_kernel"):
        g = -given["A_log"].exp() * F.softplus(g + given["dt_bias"])
    S, outputs = q.new_zeros(q.shape[0], HEADS, q.shape[-1], V), []
    for t in range(q.shape[1]):
        S = S if g is None else g[:, t].exp()[..., None, None] * S
        read = (k[:, t][..., None] * S).sum(-2)
        S = S + beta[:, t][..., None, None] * k[:, t][..., None] * (v[:, t] - read)[..., None, :]
        outputs.append((q[:, t][..., None] * S).sum(-2))
    return torch.stack(outputs, 1), None


class Form(nn.Module):
    """What the layers have in common."""

    def __init__(self, norm: str, gated: bool = True) -> None:
        super().__init__()
        self.head_k_dim, self.key_dim = N, HEADS * N
        self.q_proj, self.k_proj = (nn.Linear(WIDTH, HEADS * N, bias=False) for _ in range(2))
        self.v_proj, self.o_proj = nn.Linear(WIDTH, HEADS * V, bias=False), nn.Linear(HEADS * V, WIDTH, bias=False)
        if gated:
            self.g_proj = nn.Linear(WIDTH, HEADS * V, bias=False)
        self.norm_name = norm
        self.register_module(norm, nn.RMSNorm(V, eps=0.0))
        nn.init.normal_(self.get_parameter(f"{norm}.weight"))

    def heads(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(u).unflatten(-1, (HEADS, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def read_out(self, o: Tensor, u: Tensor) -> Tensor:
        o = self.get_submodule(self.norm_name)(o).flatten(-2)
        return self.o_proj(o * F.silu(self.g_proj(u)) if hasattr(self, "g_proj") else o)


class Gated(Form):
    def __init__(self) -> None:
        super().__init__("g_norm_swish_gate")
        self.gk_proj = nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, HEADS * N))
        self.num_kv_groups, self.use_short_conv, self.feature_map_fn, self.key_dim_per_group = 1, False, None, HEADS * N

    def forward(self, u: Tensor) -> Tensor:
        q, k, v = self.heads(u)
        gk = F.logsigmoid(self.gk_proj(u)).unflatten(-1, (HEADS, -1)) / 16
        return self.read_out(chunk_gla(q=q, k=k, v=v, g=gk)[0], u)


class Delta(Form):
    def __init__(self) -> None:
        super().__init__("o_norm", gated=False)
        self.b_proj = nn.Linear(WIDTH, HEADS)
        for name in ("q_conv1d", "k_conv1d"):
            conv = nn.Conv1d(HEADS * N, HEADS * N, 3, groups=HEADS * N, padding=2)
            conv.hidden_size = HEADS * N  # type: ignore[assignment]
            self.register_module(name, conv)

    def convolved(self, x: Tensor, name: str) -> Tensor:
        return F.silu(self.get_submodule(name)(x.mT)[..., : x.shape[1]].mT).unflatten(-1, (HEADS, -1))

    def forward(self, u: Tensor) -> Tensor:
        v = self.heads(u)[2]
        q, k = self.convolved(self.q_proj(u), "q_conv1d"), self.convolved(self.k_proj(u), "k_conv1d")
        beta = self.b_proj(u).sigmoid()
        return self.read_out(chunk_delta(q=q, k=k, v=v, beta=beta, use_qk_l2norm_in_kernel=True)[0], u)


class GatedDelta(Form):
    def __init__(self) -> None:
        super().__init__("o_norm")
        self.b_proj, self.a_proj = nn.Linear(WIDTH, HEADS), nn.Linear(WIDTH, HEADS)
        self.A_log, self.dt_bias = nn.Parameter(torch.randn(HEADS)), nn.Parameter(torch.randn(HEADS))

    def forward(self, u: Tensor) -> Tensor:
        q, k, v = self.heads(u)
        given = dict.fromkeys(
            ("use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "use_gate_in_kernel", "allow_neg_eigval"), True
        )
        beta, g = self.b_proj(u), self.a_proj(u)
        o = chunk_delta(q=F.silu(q), k=F.silu(k), v=v, beta=beta, g=g, A_log=self.A_log, dt_bias=self.dt_bias, **given)
        return self.read_out(o[0], u)


FORMS: dict[str, tuple[Callable[[], Any], Callable[..., Any], str]] = {
    "gated": (Gated, FLAGatedLinearAttentionAdapter, "chunk_gla"),
    "delta": (Delta, FLADeltaNetAdapter, "chunk_delta"),
    "gated delta": (GatedDelta, FLAGatedDeltaNetAdapter, "chunk_delta"),
}


def built(kind: str) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(1)
    make, adapter, kernel = FORMS[kind]
    layer = make()
    return layer, adapter(f"{make.__module__}.{make.__qualname__}", (kernel,)), torch.randn(2, 9, WIDTH)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", FORMS)
@torch.no_grad()
def test_the_recurrence_of_the_signals_is_the_layers(kind: str) -> None:
    layer, adapter, u = built(kind)
    s = adapter.signals(layer, u)
    found = moments(s)
    for name, value in by_loop(s, np.ones((2, 9)), False).items():
        np.testing.assert_allclose(found.tensors()[name], value, rtol=1e-4, atol=1e-5 * abs(value).max())
    # Read along C, the states give the layer's output, but for the norm, which divides by one number for a head.
    x, step = s.x.double(), s.step.double()
    h, outputs = torch.zeros(2, HEADS, V, N, dtype=torch.float64), []
    for t in range(9):
        decay = torch.exp(-step[:, t])[:, :, None] if step.ndim == 4 else torch.exp(-step[:, t]).view(2, HEADS, V, 1)
        h, b = decay * h, s.B[:, t, :, None].double()
        if s.erase is not None:
            h = h - s.erase[:, t, :, None, None] * (h * b).sum(-1, keepdim=True) * b
        h = h + x[:, t].view(2, HEADS, V, 1) * b
        outputs.append((h * s.C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1)
    y = (y / y.square().mean(-1, keepdim=True).sqrt()).flatten(-2)
    assert s.gain is not None
    # The gain is the norm's weight and the gate, times the norms of the columns of the output projection.
    columns = layer.o_proj.weight / layer.o_proj.weight.norm(dim=0)
    torch.testing.assert_close((y * s.gain).float() @ columns.mT, layer(u), rtol=1e-4, atol=1e-5)


def selection(kept: Tensor, moments: Any = None) -> SelectiveReduction:
    rows = torch.eye(N, dtype=torch.float64)[kept]
    return SelectiveReduction(rows, rows, kept, ErrorEstimate(N, kept.shape[1], 0.0, 0.0), moments)


@pytest.mark.parametrize("kind", FORMS)
@torch.no_grad()
def test_states_that_nothing_reaches_are_cut_without_trace(kind: str) -> None:
    layer, adapter, u = built(kind)
    kept = torch.tensor([[0, 2], [1, 3]])
    silent = torch.tensor([1, 3, 4, 6])
    for name in ("q_proj.weight", "k_proj.weight"):
        layer.get_parameter(name)[silent] = 0
    if kind == "delta":
        for name in ("q_conv1d.bias", "k_conv1d.bias"):
            layer.get_parameter(name)[silent] = 0
    before, smaller = layer(u), copy.deepcopy(layer)
    write(smaller, adapter.plan(layer_values(smaller), selection(kept)))
    torch.testing.assert_close(smaller(u), before)
    assert adapter.state_dim(layer) == 4
    assert adapter.state_dim(smaller) == 2
    assert smaller.q_proj.out_features == smaller.k_proj.out_features == smaller.key_dim == 4
    if kind == "gated":
        assert smaller.gk_proj[1].out_features == smaller.key_dim_per_group == 4
    if kind == "delta":
        for conv in (smaller.q_conv1d, smaller.k_conv1d):
            assert {conv.in_channels, conv.out_channels, conv.groups, conv.hidden_size} == {4}
    resized = copy.deepcopy(layer)
    write(resized, adapter.resized(resized, 2))
    resized.load_state_dict(smaller.state_dict())
    torch.testing.assert_close(resized(u), before)


@torch.no_grad()
def test_queries_take_over_where_they_are_linear() -> None:
    layer, adapter, u = built("gated")
    assert adapter.maps(layer) == (False, True, False)
    balancing = balance_selective(moments(adapter.signals(layer, u)))
    reduction = reduce_selective(balancing, 2)
    assert reduction.kept is not None
    old_q, old_k = layer.q_proj.weight.clone(), layer.k_proj.weight.clone()
    write(layer, adapter.plan(layer_values(layer), reduction))
    for head in range(HEADS):
        rows = slice(head * N, (head + 1) * N)
        torch.testing.assert_close(
            layer.q_proj.weight[2 * head : 2 * head + 2], reduction.out[head].float() @ old_q[rows]
        )
        torch.testing.assert_close(layer.k_proj.weight[2 * head : 2 * head + 2], old_k[rows][reduction.kept[head]])
    layer.use_short_conv = True
    assert adapter.maps(layer) == (False, False, False)
    layer.use_short_conv, layer.feature_map_fn = False, F.relu
    assert adapter.maps(layer) == (False, False, False)
    for kind in ("delta", "gated delta"):
        other, of_other, _ = built(kind)
        assert of_other.maps(other) == (False, False, False)


@torch.no_grad()
def test_maps_of_all_states_fold_into_both_projections() -> None:
    layer, adapter, _ = built("gated delta")
    into, out = torch.randn(2, HEADS, 3, N, dtype=torch.float64)
    old_q, old_k = layer.q_proj.weight.clone(), layer.k_proj.weight.clone()
    reduction = SelectiveReduction(into, out, None, ErrorEstimate(N, 3, 0.0, 0.0))
    change = adapter.plan(layer_values(layer), reduction)
    for name, old, maps in (("q_proj.weight", old_q, out), ("k_proj.weight", old_k, into)):
        expected = (maps @ old.double().unflatten(0, (HEADS, N))).flatten(0, 1)
        torch.testing.assert_close(change.values()[name], expected.float())


def test_what_is_not_supported_is_named() -> None:
    layer, adapter, u = built("gated")
    layer.num_kv_groups = 2
    with pytest.raises(UnsupportedModelError, match="grouped keys"):
        adapter.signals(layer, u)
    unknown = FLADeltaNetAdapter("a.Delta", ("chunk_other", "fused_other"))
    with pytest.raises(UnsupportedModelError, match="Gated calls none of chunk_other, fused_other: this version"):
        unknown.signals(layer, u)
    layer, adapter, u = built("delta")
    layer.v_proj = nn.Linear(WIDTH, 2 * HEADS * V)
    layer.heads = lambda u: (None, None, layer.v_proj(u).unflatten(-1, (2 * HEADS, -1)))
    with pytest.raises(UnsupportedModelError, match="Delta with 4 value heads for 2 key heads"):
        adapter.signals(layer, u)


@pytest.mark.parametrize("kind", FORMS)
def test_the_config_is_told_the_size_of_a_head(kind: str) -> None:
    _, adapter, _ = built(kind)
    assert isinstance(adapter, SelectiveAdapter)
    config: Any = {"gated delta": SimpleNamespace(hidden_size=WIDTH, num_heads=HEADS, head_dim=N, expand_v=0.75)}.get(
        kind, SimpleNamespace(hidden_size=WIDTH, num_heads=HEADS, expand_k=9.0)
    )
    adapter.tell_config(config, 3)
    if kind == "gated delta":
        assert (config.head_dim, config.expand_v) == (3, 0.75 * N / 3)
    else:
        assert config.expand_k == 3 * HEADS / WIDTH
