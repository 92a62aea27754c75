from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from compressm.layers.activations import causal_conv, gated, gelu_dropout, glu_residual, step_sizes
from compressm.scans import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: plain PyTorch is used")


@settings(max_examples=30)
@given(rows=st.integers(1, 300), d=st.one_of(st.integers(1, 40), st.just(600)), seed=st.integers(0, 10**6))
def test_without_dropout_they_are_pytorchs(rows: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, v, weight = (torch.randn(1, rows, k, generator=generator) * 3 for k in (d, 2 * d, d))
    for ours, theirs in (
        (lambda u, v: gelu_dropout(u, 0.0, True), lambda u, v: F.gelu(u, approximate="tanh")),
        (lambda u, v: gelu_dropout(u, 0.5, False), lambda u, v: F.gelu(u, approximate="tanh")),
        (lambda u, v: glu_residual(u, v, 0.0, True), lambda u, v: u + F.glu(v, -1)),
        (lambda u, v: glu_residual(u, v, 0.5, False), lambda u, v: u + F.glu(v, -1)),
    ):
        results = []
        for function, dtype in ((ours, torch.float32), (ours, torch.float64), (theirs, torch.float64)):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in (u, v)]
            y = function(*leaves)
            gradients = torch.autograd.grad((y * weight.to(dtype)).sum(), leaves, allow_unused=True)
            results.append([y.detach(), *(g for g in gradients if g is not None)])
        for single, double, truth in zip(*results, strict=True):
            torch.testing.assert_close(double, truth, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(single.double(), truth, rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 40), d=st.integers(1, 40), taps=st.integers(1, 5), bias=st.booleans()
)
def test_convolution_and_gate_are_pytorchs(batch: int, length: int, d: int, taps: int, bias: bool) -> None:
    torch.manual_seed(length)
    both, y, D = torch.randn(batch, length, 2 * d), torch.randn(batch, length, d), torch.randn(d)
    weight = torch.randn(batch, length, d, dtype=torch.float64)
    conv = nn.Conv1d(d, d, taps, groups=d, padding=taps - 1, bias=bias).double()

    def reference(both: torch.Tensor, y: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        u, z = both.chunk(2, -1)  # halves of a projection: rows that do not follow each other closely
        u = F.silu(conv(u.transpose(1, 2))[..., :length]).transpose(1, 2)
        return (y + D * u) * F.silu(z)

    def ours(both: torch.Tensor, y: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        u, z = both.chunk(2, -1)
        return gated(y, causal_conv(conv, u), D, z)

    results = []
    for function, dtype in ((reference, torch.float64), (ours, torch.float64), (ours, torch.float32)):
        conv = conv.to(dtype)
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (both, y, D)]
        out = function(*leaves)
        gradients = torch.autograd.grad((out * weight.to(dtype)).sum(), [*leaves, *conv.parameters()])
        results.append([out.detach(), *gradients])
    for truth, double, single in zip(*results, strict=True):
        torch.testing.assert_close(double, truth, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(single.double(), truth, rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(rows=st.integers(1, 60), d=st.integers(1, 70), rank=st.integers(1, 9), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_step_sizes_are_pytorchs(rows: int, d: int, rank: int, scale: float) -> None:
    torch.manual_seed(rows)
    both = torch.randn(2, rows, rank + 5, dtype=torch.float64) * scale
    weight = torch.randn(2, rows, d, dtype=torch.float64)
    projection = nn.Linear(rank, d).double()

    def reference(dt: torch.Tensor) -> torch.Tensor:
        return F.softplus(projection(dt), threshold=700.0)  # PyTorch's own threshold of 20 costs digits

    results = []
    for function, dtype in (
        (reference, torch.float64),
        (lambda dt: step_sizes(projection, dt), torch.float64),
        (lambda dt: step_sizes(projection, dt), torch.float32),
    ):
        projection.to(dtype)
        leaf = both.to(dtype, copy=True).requires_grad_()
        out = function(leaf[..., :rank])  # columns of a projection: rows that do not follow each other closely
        gradients = torch.autograd.grad((out * weight.to(dtype)).sum(), [leaf, *projection.parameters()])
        results.append([out.detach(), *gradients])
        projection.double()
    for truth, double, single in zip(*results, strict=True):
        torch.testing.assert_close(double, truth, rtol=1e-9 if rank > 8 else 1e-12, atol=1e-11)
        torch.testing.assert_close(single.double(), truth, rtol=1e-4, atol=1e-4 * max(1.0, scale))


def test_step_sizes_at_the_ends() -> None:
    """Small step sizes keep their digits, and what is not finite stays so."""
    projection = nn.Linear(1, 1)
    with torch.no_grad():
        projection.weight.fill_(1.0)
        projection.bias.zero_()
    x = torch.tensor([-80.0, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4, torch.inf, -torch.inf, torch.nan])
    got = step_sizes(projection, x[None, :, None])[0, :, 0].detach()
    exact = x.double().exp().log1p()
    exact[6:8] = x[6:8].double()
    torch.testing.assert_close(got.double()[:8], exact[:8], rtol=5e-6, atol=0.0)
    assert 0 <= float(got[8]) < 1e-37
    assert bool(got[9].isnan())


def test_dropout_keeps_the_mean_and_drops_as_many_as_asked() -> None:
    torch.manual_seed(0)
    x = torch.full((1000, 1000), 2.0)
    full = float(F.gelu(x[0, 0], approximate="tanh"))
    y = gelu_dropout(x, 0.1, True)
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, full / 0.9], rel=1e-6)
    assert float((y == 0).float().mean()) == pytest.approx(0.1, abs=4 * (0.09 / x.numel()) ** 0.5)
    # Neighbours, and the same element of two calls, are dropped independently of each other.
    dropped, again = (y == 0).double(), (gelu_dropout(x, 0.1, True) == 0).double()
    for a, b in ((dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1]), (dropped, again)):
        assert abs(float(((a - 0.1) * (b - 0.1)).mean())) <= 4 * 0.09 / a.numel() ** 0.5


def test_the_seed_decides_and_the_backward_pass_drops_the_same() -> None:
    x = torch.randn(50, 33).requires_grad_()
    v = torch.randn(50, 66).requires_grad_()
    torch.manual_seed(1)
    first, residual = gelu_dropout(x, 0.3, True), glu_residual(x.detach(), v, 0.3, True)
    torch.manual_seed(1)
    assert torch.equal(gelu_dropout(x, 0.3, True), first)
    assert not torch.equal(gelu_dropout(x, 0.3, True), first)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient == 0, first == 0)
    (to_v,) = torch.autograd.grad(residual.sum(), v)
    dropped = residual == x
    assert 0.2 < float(dropped.float().mean()) < 0.4
    assert torch.equal(to_v[:, :33] == 0, dropped)


def test_gradients_by_finite_differences_with_dropout() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)

    def with_fixed_seed(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return glu_residual(gelu_dropout(x, 0.4, True), v, 0.4, True)

    assert torch.autograd.gradcheck(with_fixed_seed, (x, v))


def test_half_precision_and_compiled_models_take_pytorchs_own() -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    assert torch.equal(gelu_dropout(x, 0.0, True), F.gelu(x, approximate="tanh"))
    assert torch.equal(glu_residual(x[:, :3], x, 0.0, True), x[:, :3] + F.glu(x, -1))
