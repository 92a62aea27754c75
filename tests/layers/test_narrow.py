"""The fused parts of narrow blocks, against PyTorch's functions in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.layers import SequenceClassifier, narrow
from compressm.layers.models import GLUBlock, SequenceBatchNorm
from compressm.layers.narrow import gated_residual, linear
from compressm.scans import native
from compressm.training.step_cost import step_cost

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler: others are used")
WIDTHS = [1, 2, 3, 4, 8, 13, 16, 17, 33]  # 17 and 33 are beyond some, or all, of the kernels


def plain_tail(u: Tensor, x: Tensor, module: nn.Linear) -> Tensor:
    return u + F.glu(F.linear(F.gelu(x, approximate="tanh"), module.weight, module.bias), -1)


def compare(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], module: nn.Module, inputs: list[Tensor]
) -> None:
    """Results and gradients, of inputs and parameters, in both precisions."""
    results = []
    for function, dtype in ((theirs, torch.float64), (ours, torch.float64), (ours, torch.float32)):
        module.to(dtype)
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        y = function(*leaves)
        weight = torch.linspace(-1, 2, y.numel(), dtype=dtype).view(y.shape)
        results.append([y.detach(), *torch.autograd.grad((y * weight).sum(), [*leaves, *module.parameters()])])
    for truth, double, single in zip(*results, strict=True):
        torch.testing.assert_close(double, truth, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(single.double(), truth, rtol=1e-4, atol=2e-5 * max(1.0, float(truth.abs().max())))


@settings(max_examples=40)
@given(rows=st.integers(1, 300), d=st.sampled_from(WIDTHS), seed=st.integers(0, 10**6), training=st.booleans())
def test_without_dropout_the_tail_is_pytorchs(rows: int, d: int, seed: int, training: bool) -> None:
    torch.manual_seed(seed)
    module = nn.Linear(d, 2 * d)
    compare(
        lambda u, x: gated_residual(u, x, module, 0.0 if training else 0.5, training),
        lambda u, x: plain_tail(u, x, module),
        module,
        [torch.randn(1, rows, d) * 3 for _ in range(2)],
    )


@settings(max_examples=40)
@given(rows=st.integers(1, 300), p=st.sampled_from([1, 3, 8, 11]), q=st.sampled_from(WIDTHS), seed=st.integers(0, 99))
def test_linear_is_pytorchs(rows: int, p: int, q: int, seed: int) -> None:
    torch.manual_seed(seed)
    module, x = nn.Linear(p, q), torch.randn(rows, 1, p)
    compare(lambda x: linear(module, x), lambda x: F.linear(x, module.weight, module.bias), module, [x])


def test_linear_leaves_other_modules_alone() -> None:
    x = torch.randint(0, 5, (2, 3))
    embedding, biasless, hooked = nn.Embedding(5, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    assert torch.equal(linear(embedding, x), embedding(x))
    z = torch.randn(2, 3, 4)
    assert torch.equal(linear(biasless, z), biasless(z))
    hooked.register_forward_hook(lambda module, given, result: result + 1)
    assert torch.equal(linear(hooked, z), hooked(z))


@settings(max_examples=40)
@given(
    rows=st.integers(2, 700),
    d=st.sampled_from(WIDTHS),
    momentum=st.sampled_from([0.1, 1.0, None]),
    offset=st.sampled_from([0.0, 1e3]),
)
def test_batch_norm_is_pytorchs_with_its_running_statistics(
    rows: int, d: int, momentum: float | None, offset: float
) -> None:
    torch.manual_seed(rows)
    ours, theirs = SequenceBatchNorm(d, momentum=momentum), nn.BatchNorm1d(d, momentum=momentum)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    single = SequenceBatchNorm(d, momentum=momentum)
    single.load_state_dict(theirs.state_dict())
    ours.double()
    theirs.double()
    for training in (True, True, False):
        results = []
        x, weight = torch.randn(rows, d) * 3 + offset, torch.randn(rows, d)
        for module, dtype in ((theirs, torch.float64), (ours, torch.float64), (single, torch.float32)):
            module.train(training)
            leaf = x.to(dtype, copy=True).requires_grad_()
            y = module(leaf) if module is theirs else module(leaf[None])[0]
            gradients = torch.autograd.grad((y * weight.to(dtype)).sum(), [leaf, *module.parameters()])
            results.append([y.detach(), *gradients, *(b.clone() for b in module.buffers())])
        for truth, double, rough in zip(*results, strict=True):
            torch.testing.assert_close(double, truth, rtol=1e-8, atol=1e-8)
            # An input of 1000 +- 3 has 3e-5 / 3 of its deviation as rounding error, twice that of two rows far more.
            if rows > 9:
                tolerance = 1e-4 if offset == 0 else 1e-3
                scale = max(1.0, float(truth.abs().max()))
                torch.testing.assert_close(rough.to(truth.dtype), truth, rtol=tolerance, atol=tolerance * scale)


def test_batch_norm_adds_the_gradient_of_a_residual_connection() -> None:
    norm, x = SequenceBatchNorm(5).double(), torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    plain = nn.BatchNorm1d(5).double()
    target = (plain(x.view(-1, 5)).view_as(x) * x).sum() + x.exp().sum()
    (truth,) = torch.autograd.grad(target, x)
    y, same = norm.with_input(x)
    assert torch.equal(same, x)
    (both,) = torch.autograd.grad((y * same).sum() + same.exp().sum(), x)
    torch.testing.assert_close(both, truth, rtol=1e-11, atol=1e-11)
    (second,) = torch.autograd.grad(norm.with_input(x)[1].exp().sum(), x)
    torch.testing.assert_close(second, x.detach().exp())
    (first,) = torch.autograd.grad((norm(x) * x.detach()).sum(), x)
    (expected,) = torch.autograd.grad((plain(x.view(-1, 5)).view_as(x) * x.detach()).sum(), x)
    torch.testing.assert_close(first, expected, rtol=1e-11, atol=1e-11)


def test_batch_norm_of_one_row_is_refused_as_by_pytorch() -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        SequenceBatchNorm(4)(torch.randn(1, 1, 4))


@pytest.mark.parametrize("d", [1, 3, 8])
def test_gradients_by_finite_differences(d: int) -> None:
    torch.manual_seed(0)
    u, x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, 5, d), (2, 5, d), (2 * d, d), (2 * d,)))
    module, norm = nn.Linear(d, 2 * d).double(), SequenceBatchNorm(d).double()
    module_of_x = nn.Linear(d, 5).double()

    def tail(u: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same elements are dropped every time
        del module.weight, module.bias
        module.weight, module.bias = weight, bias  # type: ignore[assignment]
        return gated_residual(u, x, module, 0.4, True)

    assert torch.autograd.gradcheck(tail, [t.requires_grad_() for t in (u, x, weight, bias)])
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradcheck(lambda x: linear(module_of_x, x), x)


def masks(d: int, rows: int, p: float, seed: int) -> tuple[Tensor, Tensor]:
    """Where the first and the second dropout of one call keep an element, from gradient and result."""
    module = nn.Linear(d, 2 * d)
    with torch.no_grad():
        module.weight.fill_(0.01)
        module.bias.fill_(1.0)
    x = torch.ones(rows, d, requires_grad=True)
    torch.manual_seed(seed)
    y = gated_residual(torch.zeros(rows, d), x, module, p, True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    some = y.detach().ne(0).any(1, keepdim=True)  # where the second drops a whole row, no gradient comes through
    return (grad != 0) | ~some, y.detach() != 0


@pytest.mark.parametrize("d", [3, 8])
def test_both_dropouts_drop_the_share_asked_for_independently(d: int) -> None:
    p, rows = 0.3, 40_000
    first, second = (m.double() for m in masks(d, rows, p, 0))
    other, _ = masks(d, rows, p, 1)

    def uncorrelated(a: Tensor, b: Tensor) -> None:
        deviation = p * (1 - p) / a.numel() ** 0.5
        assert abs(float(((a - 1 + p) * (b - 1 + p)).mean())) <= 5 * deviation

    lost = p**d  # where `masks` cannot see the first dropout
    for mask in (first, second):
        assert float(mask.mean()) == pytest.approx(1 - p, abs=5 * (p * (1 - p) / mask.numel()) ** 0.5 + lost)
    if d == 3:
        return
    for a, b in ((first, second), (first, other.double())):
        for shift in range(d):
            uncorrelated(a, b.roll(shift, 1))
        uncorrelated(a[1:], b[:-1])
        uncorrelated(a[16:], b[:-16])
    for mask in (first, second):
        uncorrelated(mask[:, 1:], mask[:, :-1])
        for lag in (1, 8, 16):
            uncorrelated(mask[lag:], mask[:-lag])


def test_neighbouring_seeds_drop_independently() -> None:
    x, count = torch.ones(200_000), 200_000
    kept = []
    for seed in (0, 1, 2, 3, 4, 1 << 32, 1 << 63):
        out = torch.empty_like(x)
        native.call("gelu", x, count, x, None, out, seed - (seed >> 63 << 64), 0.5)
        kept.append((out != 0).double() - 0.5)
    for i, a in enumerate(kept):
        for b in kept[:i]:
            for lag in (0, 1, 2, 16):
                assert abs(float((a[lag:] * b[: count - lag]).mean())) <= 5 * 0.25 / count**0.5


def test_forward_and_backward_drop_the_same_and_scale_what_stays() -> None:
    d, p, rows = 8, 0.25, 1001
    first, second = masks(d, rows, p, 5)
    module = nn.Linear(d, 2 * d)
    with torch.no_grad():
        module.weight.copy_(torch.cat([torch.eye(d), torch.zeros(d, d)]))
        module.bias.copy_(torch.cat([torch.zeros(d), torch.full((d,), 40.0)]))
    torch.manual_seed(5)  # as `masks` did, with other weights: a sigmoid of one, and a = dropout(GELU(1))
    x = torch.ones(rows, d, requires_grad=True)
    y = gated_residual(torch.zeros(rows, d), x, module, p, True)
    full = float(F.gelu(torch.ones(()), approximate="tanh")) / (1 - p) ** 2
    torch.testing.assert_close(y, torch.where(first & second, full, 0.0))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad != 0, first & second)


def test_results_do_not_depend_on_threads_and_repeat_exactly() -> None:
    torch.manual_seed(0)
    module, norm, x = nn.Linear(8, 16), SequenceBatchNorm(8), torch.randn(3, 77, 8)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            y = gated_residual(x, norm(x), module, 0.5, True)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [*module.parameters()])])
    finally:
        torch.set_num_threads(before)
    for one, two, again in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
        assert torch.equal(two, again)


def test_what_is_not_finite_stays_so() -> None:
    module, norm = nn.Linear(8, 16), SequenceBatchNorm(8)
    for value in (torch.nan, torch.inf):
        x = torch.randn(20, 8)
        x[7, 3] = value
        x.requires_grad_()
        y = gated_residual(torch.zeros(20, 8), x, module, 0.0, True)
        assert not bool(y[7].isfinite().all())
        assert bool(y[:7].isfinite().all())
        assert bool(y[8:].isfinite().all())
        y.sum().backward()
        assert module.weight.grad is not None
        assert not bool(module.weight.grad.isfinite().all())
        module.zero_grad()
        assert bool(norm(x[None])[0, :, 3].isnan().all())
        assert not bool(linear(module, x)[7].isfinite().any())


def test_half_precision_and_compiled_models_take_pytorchs_own() -> None:
    u, x = torch.randn(2, 4, 6, dtype=torch.bfloat16).unbind()
    module, norm = nn.Linear(6, 12).bfloat16(), SequenceBatchNorm(6).bfloat16()
    assert torch.equal(gated_residual(u, x, module, 0.0, True), plain_tail(u, x, module))
    assert torch.equal(linear(module, x), module(x))
    assert torch.equal(norm(x[None])[0], nn.BatchNorm1d(6).bfloat16()(x))
    module, norm = module.float(), norm.float()
    compiled = torch.compile(
        lambda u, x: linear(module, gated_residual(u, norm(x), module, 0.0, True)), backend="eager", fullgraph=True
    )
    u, x = torch.randn(2, 3, 4, 6).unbind()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    got = compiled(u, x)
    after = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.load_state_dict(before)
    torch.testing.assert_close(got, linear(module, gated_residual(u, norm(x), module, 0.0, True)))
    torch.testing.assert_close(dict(norm.state_dict()), after)


def test_a_classifier_is_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, u = SequenceClassifier(2, 3, 8, 5, n_layers=2, dropout=0.0).double(), torch.randn(4, 30, 2).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    results, costs = [], []
    for widest in (16, 0):
        for name in ("_WIDEST_TAIL", "_WIDEST_LINEAR", "_WIDEST_NORM"):
            monkeypatch.setattr(narrow, name, widest)
        model.load_state_dict(state)
        costs.append(step_cost(model, lambda model: model(u).square().sum()))
        gradients = torch.autograd.grad(model(u).square().sum(), [*model.parameters()])
        results.append([*gradients, *(buffer.clone() for buffer in model.buffers())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    assert costs[0].flops - costs[1].flops == 2 * 4 * (4 * 30) * 8**2  # one product in either block is computed twice,
    assert costs[0].kept_bytes < costs[1].kept_bytes  # and its result is not kept


def test_a_norm_that_somebody_waits_for_is_called() -> None:
    block, seen = GLUBlock("lru", 4, 3, 0.0), list[Tensor]()
    plain = block(torch.ones(2, 5, 4))
    block.norm.register_forward_hook(lambda module, given, result: seen.append(result))
    torch.testing.assert_close(block(torch.ones(2, 5, 4)), plain)
    assert len(seen) == 1
