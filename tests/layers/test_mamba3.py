"""Mamba-3 against its definition, one token after the other in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.layers import Mamba3

CASES: dict[str, dict[str, Any]] = {
    "one input": {},
    "all pairs rotate": {"rope_fraction": 1.0},
    "groups, normalised": {"n_groups": 2, "out_norm": True},
    "three inputs": {"mimo_rank": 3},
    "two inputs, groups, normalised": {"mimo_rank": 2, "n_groups": 2, "out_norm": True, "rope_fraction": 1.0},
}


def build(options: dict[str, Any], seed: int = 0, **more: Any) -> Mamba3:
    """A layer whose parameters all matter: none is one or zero."""
    torch.manual_seed(seed)
    layer = Mamba3(6, 8, **{"head_dim": 3, **options, **more}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        layer.dt_bias.add_(2)  # steps large enough for the angles to go round
    return layer


def by_definition(layer: Mamba3, u: Tensor) -> Tensor:
    """The equations of `Mamba3`, head by head, key by key, with a rotation matrix of every step."""
    p = {name: value.detach() for name, value in layer.named_parameters()}
    heads, width, rank, n, groups = layer.n_heads, layer.head_dim, layer.mimo_rank, layer.d_state, layer.n_groups
    rows, inner = u @ p["in_proj.weight"].T, heads * width
    sizes = [inner, inner, rank * groups * n, rank * groups * n, heads, heads, heads]
    z, x, B, C, dt, a, mix, angle = rows.split([*sizes, rows.shape[-1] - sum(sizes)], -1)
    out = torch.zeros(*u.shape[:2], inner, dtype=u.dtype)
    ones = torch.ones(heads, rank, width, dtype=u.dtype)
    x_weight, z_weight, o_weight = (p.get(f"mimo_{name}", ones) for name in "xzo")
    for row in range(u.shape[0]):
        for head in range(heads):
            S, turn = torch.zeros(width, n, dtype=u.dtype), torch.zeros(angle.shape[-1], dtype=u.dtype)
            last: list[tuple[Tensor, Tensor]] = []
            for now in range(u.shape[1]):
                at = row, now
                delta = F.softplus(dt[at][head] + p["dt_bias"][head])
                mu = torch.sigmoid(mix[at][head])
                raw = a[at][head]
                rate = max(float(1 + raw if raw >= 0 else 1 / (1 - raw)), 1e-4)
                turn = turn + math.pi * torch.tanh(angle[at]) * delta
                R = torch.eye(n, dtype=u.dtype)
                for pair, theta in enumerate(turn):
                    i, j = (pair, pair + n // 2) if rank > 1 else (2 * pair, 2 * pair + 1)
                    R[i, i] = R[j, j] = theta.cos()
                    R[j, i], R[i, j] = theta.sin(), -theta.sin()
                group, gate = head * groups // heads, z[at][head * width : (head + 1) * width]
                value = x[at][head * width : (head + 1) * width]
                pairs, queries = list[tuple[Tensor, Tensor]](), list[Tensor]()
                for r in range(rank):
                    begin = (r * groups + group) * n
                    vectors = []
                    for name, vector in (("B", B[at]), ("C", C[at])):
                        raw_vector = vector[begin : begin + n]
                        scaled = raw_vector / (raw_vector.square().mean() + 1e-5).sqrt() * p[f"{name}_norm.weight"]
                        vectors.append(R @ (scaled + p[f"{name}_bias"][head, r]))
                    pairs.append((value * x_weight[head, r], vectors[0]))
                    queries.append(vectors[1])
                alpha = torch.exp(-delta * rate)
                S = alpha * S
                for v, k in last:
                    S = S + (1 - mu) * delta * alpha * torch.outer(v, k)
                for v, k in pairs:
                    S = S + mu * delta * torch.outer(v, k)
                last, total = pairs, torch.zeros(width, dtype=u.dtype)
                for r in range(rank):
                    y = S @ queries[r] + p["D"][head] * pairs[r][0]
                    if layer.norm is not None:
                        y = y / (y.square().mean() + 1e-5).sqrt() * p["norm.weight"].view(heads, width)[head]
                    total = total + o_weight[head, r] * y * F.silu(gate * z_weight[head, r])
                out[row, now, head * width : (head + 1) * width] = total
    return out @ p["out_proj.weight"].T


@pytest.mark.parametrize("case", CASES)
def test_the_layer_computes_its_definition(case: str) -> None:
    layer, u = build(CASES[case]), torch.randn(2, 40, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(u), by_definition(layer, u), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_numerical_differentiation(case: str) -> None:
    layer, u = build(CASES[case]), torch.randn(1, 5, 6, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def run(u: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (u,))

    inputs = (u.requires_grad_(), *(value.detach().clone().requires_grad_() for value in parameters.values()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_sequence(case: str) -> None:
    layer, u = build(CASES[case]), torch.randn(3, 60, 6, dtype=torch.float64)
    state, outputs = layer.initial_state(3), []
    for now in u.unbind(1):
        y, state = layer.step(now, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), layer(u), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_sequences_in_one_row_are_kept_apart(case: str) -> None:
    layer, u = build(CASES[case]), torch.randn(1, 30, 6, dtype=torch.float64)
    parts = u.split([11, 1, 18], 1)
    numbers = torch.cat([torch.full((1, part.shape[1]), i) for i, part in enumerate(parts)], 1)
    torch.testing.assert_close(layer(u, numbers), torch.cat([layer(part) for part in parts], 1), atol=1e-10, rtol=1e-9)


def test_in_half_precision_it_stays_near() -> None:
    layer, u = Mamba3(8, 8, head_dim=4), torch.randn(2, 50, 8)
    with torch.no_grad():
        expected = layer(u)
        found = layer.to(torch.bfloat16)(u.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "at least 1"),
        ({"head_dim": 5}, "head_dim=5 must divide"),
        ({"head_dim": 4, "n_groups": 2}, "n_groups=2 must divide"),
        ({"rope_fraction": 0.7}, "rope_fraction must be 0.5 or 1; got 0.7"),
        ({"d_state": 6}, "d_state=6 must be a multiple of 4"),
        ({"d_state": 5, "rope_fraction": 1.0}, "d_state=5 must be a multiple of 2"),
        ({"dt_min": 1.0}, "dt_min < dt_max"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba3(6, **{"d_state": 8, "head_dim": 4, **options})
