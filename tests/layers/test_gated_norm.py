"""The gated norm's kernel against its formula in float64: shapes, strides, dtypes, threads, extremes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressm.layers.gated_norm import gated_rms_norm
from compressm.scans import native

pytestmark = pytest.mark.skipif(not native.available("matrix_states"), reason="no C++ compiler: plain PyTorch is used")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}
VIEWS = {
    "contiguous": lambda t: t.contiguous(),
    "part of a projection": lambda t: torch.cat([t, t[..., :5], t], -1)[..., : t.shape[-1]],
    "time first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "without the first step": lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
    "channels apart": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "one for all sequences": lambda t: t[:1].expand_as(t),
}


def formula(x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, *, gate_last: bool) -> Tensor:
    gate = z / (1 + torch.exp(-z))
    v = x if gate_last else x * gate
    parts = [part / (part.square().mean(-1, keepdim=True) + eps).sqrt() for part in v.chunk(groups, -1)]
    normed = weight * torch.cat(parts, -1)
    return normed * gate if gate_last else normed


def results(
    function: Callable[..., Tensor],
    dtype: torch.dtype | None,
    given: tuple[Tensor, ...],
    groups: int,
    eps: float,
    gate_last: bool,
) -> list[Tensor]:
    """The output and all gradients; in ``dtype``, or in each argument's own."""
    *arguments, incoming = (t.detach() if dtype is None else t.detach().to(dtype) for t in given)
    leaves = [t.requires_grad_() for t in arguments]
    y = function(*leaves, groups, eps, gate_last=gate_last)
    return [y.detach(), *torch.autograd.grad(y, leaves, incoming.to(y.dtype))]


@settings(max_examples=60)
@given(
    rows=st.tuples(st.integers(1, 3), st.integers(1, 90)), width=st.integers(1, 70), groups=st.integers(1, 5),
    gate_last=st.booleans(), dtype=st.sampled_from(list(TOLERANCE)),
    views=st.tuples(*[st.sampled_from(list(VIEWS))] * 3), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_it_is_the_formula(
    rows: tuple[int, int], width: int, groups: int, gate_last: bool, dtype: torch.dtype, views: tuple[str, ...],
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    d = width * groups
    x, z, incoming = (VIEWS[view](torch.randn(*rows, d, generator=generator).to(dtype) * 2) for view in views)
    weight = torch.randn(d, generator=generator).to(dtype)
    eps = 1e-5 if width > 8 else 1.0  # the gradient of a short vector's direction cancels to almost nothing
    given = (x, z, weight, incoming)
    for got, exact in zip(
        results(gated_rms_norm, None, given, groups, eps, gate_last),
        results(formula, torch.float64, given, groups, eps, gate_last),
        strict=True,
    ):
        assert got.dtype == dtype
        assert float((got.double() - exact).norm() / exact.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("gate_last", [False, True])
def test_dtypes_may_differ(gate_last: bool) -> None:
    x, z, weight, incoming = (
        torch.randn(2, 3, 12),
        torch.randn(2, 3, 12).bfloat16(),
        torch.randn(12),
        torch.ones(2, 3, 12),
    )
    for x_dtype, weight_dtype, out in (
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ):
        given = (x.to(x_dtype), z, weight.to(weight_dtype), incoming)
        found = results(gated_rms_norm, None, given, 2, 1e-5, gate_last)
        assert [t.dtype for t in found] == [out, x_dtype, torch.bfloat16, weight_dtype]
        for got, exact in zip(found, results(formula, torch.float64, given, 2, 1e-5, gate_last), strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("gate_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_give_the_same_bits_and_only_the_inputs_are_kept(gate_last: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 97, 60).to(dtype), torch.randn(60).to(dtype)
    z = torch.randn(7, 97, 150).to(dtype)[..., 10:70]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(gated_rms_norm, None, (x, z, weight, torch.ones_like(x)), 3, 1e-5, gate_last))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))

    kept = list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_rms_norm(x.requires_grad_(), z, weight, 3, 1e-5, gate_last=gate_last)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), z.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize("gate_last", [False, True])
def test_extremes(gate_last: bool) -> None:
    """Rows of zeros, tiny and huge numbers, closed and open gates, in float32. NaN stays in its row."""
    torch.manual_seed(0)
    sizes = torch.tensor([0.0, 1e-25, 1e-12, 1.0, 1e12, 1e15])
    x = torch.randn(6, 40) * sizes[:, None]
    z = torch.randn(6, 40)
    z[:, :8] = torch.tensor([-80.0, -20.0, 0.0, 1e-20, 20.0, 80.0, 1e3, -60.0])
    given = (x, z, torch.randn(40), torch.randn(6, 40))
    found = results(gated_rms_norm, None, given, 2, 1e-5, gate_last)
    exact = results(formula, torch.float64, given, 2, 1e-5, gate_last)
    for row in range(6):
        for got, truth in zip(found[:3], exact[:3], strict=True):
            assert float((got[row].double() - truth[row]).norm()) <= 1e-5 * float(truth[row].norm())
    torch.testing.assert_close(found[3].double(), exact[3], rtol=1e-5, atol=1e-5)

    x[2, 3] = torch.nan
    y = gated_rms_norm(x, z, given[2], 1, 1e-5, gate_last=gate_last)
    assert y.isnan().any(-1).tolist() == [False, False, True, False, False, False]
    half = gated_rms_norm(x.bfloat16(), z.bfloat16(), given[2], 1, 1e-5, gate_last=gate_last)
    assert half.isnan().any(-1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("gate_last", [False, True])
@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (2, 1, 2, 2)])
def test_derivatives_by_differences(gate_last: bool, rows: tuple[int, ...]) -> None:
    """Also second derivatives and forward mode, which run on PyTorch's operations."""
    shapes = ((*rows, 6), (*rows, 6), (6,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    call = lambda x, z, weight: gated_rms_norm(x, z, weight, 2, 1e-5, gate_last=gate_last)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)
    with torch.no_grad():
        x, z, weight = leaves
        torch.testing.assert_close(call(*leaves), formula(x, z, weight, 2, 1e-5, gate_last=gate_last))
