"""Gated linear attention and the delta rule, against loops."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from compressm.scans import delta_scan, delta_step, gla_scan, gla_step, native

SCANS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gla": (gla_scan, gla_step),
    "delta": (delta_scan, delta_step),
}


def arguments(kind: str, seed: int, batch: int, length: int, heads: int, p: int, n: int, fastest: float = 1.0) -> Any:
    """The scan's arguments in order, the initial state last; float64 that float32 can hold."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def decay(*shape: int) -> Tensor:
        return -fastest * torch.rand(*shape, generator=generator) ** 3

    k, q, v = normal(batch, length, heads, n), normal(batch, length, heads, n), normal(batch, length, heads, p)
    start = normal(batch, heads, p, n)
    if kind == "gla":
        values = [v, decay(batch, length, heads, n), k, q, start]
    else:
        beta = torch.rand(batch, length, heads, generator=generator)
        values = [v, decay(batch, length, heads), beta, F.normalize(k, dim=-1), q, start]
    return [value.double() for value in values]


def outputs_and_gradients(kind: str, values: list[Tensor], dtype: torch.dtype, engine: str) -> list[Tensor]:
    leaves = [value.to(dtype, copy=True).requires_grad_() for value in values]
    y, state = SCANS[kind][0](*leaves, return_state=True, engine=engine)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(dtype) for t in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def names(kind: str) -> tuple[str, ...]:
    return ("y", "state", "v", "log_decay", *(("beta",) if kind == "delta" else ()), "k", "q", "initial_state")


@pytest.mark.parametrize("kind", SCANS)
def test_reference_engine_is_the_definition(kind: str) -> None:
    values = arguments(kind, 0, 2, 6, 2, 4, 3)
    v, log_decay, *rest, k, q, start = (value.numpy() for value in values)
    y = np.zeros_like(v)
    for b in range(2):
        for h in range(2):
            S = start[b, h].copy()
            for t in range(6):
                key, share = k[b, t, h], 1.0
                S = S @ np.diag(np.exp(np.broadcast_to(log_decay[b, t, h], 3)))
                if kind == "delta":
                    share = rest[0][b, t, h]
                    S = S @ (np.eye(3) - share * np.outer(key, key))
                S = S + share * np.outer(v[b, t, h], key)
                y[b, t, h] = S @ q[b, t, h]
    np.testing.assert_allclose(SCANS[kind][0](*values, engine="loop").numpy(), y, rtol=1e-11)


@pytest.mark.parametrize("engine", ["chunked", "native"])
@pytest.mark.parametrize("kind", SCANS)
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    length=st.integers(1, 150),
    heads=st.integers(1, 3),
    p=st.integers(1, 9),
    n=st.integers(1, 20),
    fastest=st.sampled_from([1e-6, 1.0, 30.0, 500.0]),
)
def test_engines_equal_a_float64_loop(
    kind: str, engine: str, seed: int, batch: int, length: int, heads: int, p: int, n: int, fastest: float
) -> None:
    values = arguments(kind, seed, batch, length, heads, p, n, fastest)
    truth = outputs_and_gradients(kind, values, torch.float64, "loop")
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        result = outputs_and_gradients(kind, values, dtype, engine)
        for name, a, b in zip(names(kind), truth, result, strict=True):
            # A decay's gradient sums terms that cancel; it is held against the largest of them.
            scale = float(a.norm()) if name != "log_decay" else float(a.norm() + values[0].norm() * values[-2].norm())
            factor = 1 if name in ("y", "state") else 10
            assert (b.double() - a).norm() <= factor * tolerance * scale + 1e-37, (name, dtype)  # float32 underflows


@pytest.mark.parametrize("kind", SCANS)
def test_gradients_by_finite_differences(kind: str) -> None:
    leaves = [value.requires_grad_() for value in arguments(kind, 0, 1, 70, 1, 2, 2)]
    assert torch.autograd.gradcheck(lambda *x: SCANS[kind][0](*x, return_state=True), leaves, fast_mode=True)


def random_case(kind: str, seed: int) -> list[Tensor]:
    """Shapes, strides, lengths, decays from 1 - 1e-7 to 1e-7 and precision, all drawn."""
    draw = random.Random(seed)
    length = draw.choices([1, 7, 64, draw.randint(2, 200), 1000], [3, 3, 3, 8, 1])[0]
    largest = 24 if length == 1000 else 70
    p, n = draw.randint(1, largest), draw.randint(1, largest)
    values = arguments(kind, seed, draw.randint(1, 3), length, draw.randint(1, 3), p, n)
    slowest, fastest = sorted(10 ** draw.uniform(-7, 1.2) for _ in range(2))
    shares = torch.rand(values[1].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values[1] = -(slowest ** (1 - shares)) * fastest**shares
    dtype = draw.choice([torch.float32, torch.bfloat16])
    values = [value.to(dtype) for value in values]
    if draw.random() < 0.5:  # every second number of larger tensors, or the first axes exchanged
        return [torch.stack([v, v.new_full(v.shape, torch.nan)], -1)[..., 0] for v in values]
    return [v.transpose(0, 1).contiguous().transpose(0, 1) for v in values] if draw.random() < 0.5 else values


def errors_of_native(kind: str, values: list[Tensor]) -> dict[str, float]:
    """Norm of the error over norm, for outputs and gradients, against the definition in float64."""
    results = list[list[Tensor]]()
    for engine, leaves in (("loop", [value.double() for value in values]), ("native", values)):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        outputs = SCANS[kind][0](*leaves, return_state=True, engine=engine)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(y.shape, generator=generator).to(values[0].dtype).to(y.dtype) for y in outputs]
        results.append([*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, weights)])
    return {
        name: float((b.double() - a).norm() / a.norm().clamp_min(1e-30))
        for name, a, b in zip(names(kind), *results, strict=True)
    }


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("cases", [20, pytest.param(500, marks=pytest.mark.exhaustive)])
def test_gradients_over_random_shapes_strides_and_decays(kind: str, cases: int) -> None:
    worst: dict[tuple[str, str], float] = {}
    for seed in range(cases):
        values = random_case(kind, seed)
        for name, error in errors_of_native(kind, values).items():
            key = (str(values[0].dtype).removeprefix("torch."), name)
            worst[key] = max(error, worst.get(key, 0.0))
    print(f"{kind}, worst of {cases}:", {" ".join(key): f"{error:.1e}" for key, error in sorted(worst.items())})
    for (dtype, name), error in worst.items():
        assert error < (1e-5 if dtype == "float32" else 2e-2), (dtype, name, error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCANS)
def test_long_memory_does_not_drift(kind: str) -> None:
    """Over 30,001 steps, most of whose decays are 1 - 1e-7: rounding them to single precision would add up."""
    values = arguments(kind, 5, 1, 30_001, 1, 3, 4)
    drawn = torch.rand(2, *values[1].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    values[1] = torch.where(drawn[0] < 0.9999, -1e-7, -(10 ** (8.2 * drawn[1] - 7)))
    if kind == "delta":
        values[2] *= 1e-3  # of what is stored, little is replaced
    for name, error in errors_of_native(kind, [value.float() for value in values]).items():
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("kind", SCANS)
def test_threads_do_not_change_a_bit(kind: str) -> None:
    values = arguments(kind, 6, 2, 100, 3, 20, 12)
    before, results = torch.get_num_threads(), list[list[Tensor]]()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(kind, values, torch.float32, "native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", SCANS)
def test_a_nan_or_an_infinity_is_not_lost(kind: str) -> None:
    for bad in (torch.nan, torch.inf):
        for at in range(5 if kind == "delta" else 4):
            values = arguments(kind, 7, 1, 40, 2, 4, 5)
            if at == 1 and bad == torch.inf:
                continue  # a logarithm of infinity is no decay
            values[at][0, 20, 1] = bad
            y, state = SCANS[kind][0](*values, return_state=True, engine="native")
            assert y[:, :, 0].isfinite().all()
            assert y[:, :16].isfinite().all()
            assert not y[:, 20, 1].isfinite().all()
            last = at == len(values) - 2  # a query touches no state
            assert state[:, 1].isfinite().all() == last


@pytest.mark.parametrize("kind", SCANS)
def test_no_state_of_every_step_is_kept_and_the_kernel_runs(kind: str) -> None:
    batch, length, heads, p, n = 2, 256, 2, 32, 64
    leaves = [value.float().requires_grad_() for value in arguments(kind, 0, batch, length, heads, p, n)]
    sizes, called = list[int](), list[str]()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t),
        native.watched(lambda name, _: called.append(name)),
    ):
        SCANS[kind][0](*leaves).sum().backward()
    assert called == [f"{kind}_forward", f"{kind}_backward"]
    inputs = sum(leaf.numel() for leaf in leaves)
    assert sum(sizes) <= inputs + batch * heads * (length * p + length // 64 * p * n)


@pytest.mark.parametrize("kind", SCANS)
def test_compiled_graphs_run_the_kernel(kind: str) -> None:
    values = [value.float().requires_grad_() for value in arguments(kind, 8, 1, 20, 2, 3, 4)]
    whole = torch.compile(lambda *x: SCANS[kind][0](*x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*values), SCANS[kind][0](*values, engine="loop"), rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(whole(*values).sum(), values),
        torch.autograd.grad(SCANS[kind][0](*values, engine="loop").sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SCANS)
def test_a_sequence_in_two_parts_or_in_steps_is_the_same(kind: str) -> None:
    scan, step = SCANS[kind]
    *sequences, start = arguments(kind, 1, 2, 150, 2, 4, 5)
    whole, last = scan(*sequences, start, return_state=True)
    parts, state = [], start
    for now in (slice(0, 81), slice(81, 150)):
        y, state = scan(*(s[:, now] for s in sequences), state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)
    outputs = []
    for t in range(150):
        y, start = step(start, *(s[:, t] for s in sequences))
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), whole)


@pytest.mark.parametrize("kind", SCANS)
def test_half_precision_keeps_float32_states(kind: str) -> None:
    *sequences, _ = arguments(kind, 2, 2, 200, 2, 8, 4)
    halves = [value.bfloat16() for value in sequences]
    y, state = SCANS[kind][0](*halves, return_state=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    truth = SCANS[kind][0](*(value.double() for value in halves), engine="loop")
    assert (y.double() - truth).norm() <= 2**-7 * truth.norm()


def test_any_rotation_of_keys_and_queries_leaves_the_delta_rule_as_it_is() -> None:
    v, log_decay, beta, k, q, start = arguments("delta", 3, 2, 100, 2, 4, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    rotated = delta_scan(v, log_decay, beta, k @ rotation, q @ rotation, start @ rotation)
    torch.testing.assert_close(rotated, delta_scan(v, log_decay, beta, k, q, start), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SCANS)
def test_bad_arguments_are_named(kind: str) -> None:
    scan = SCANS[kind][0]
    *sequences, start = arguments(kind, 0, 2, 5, 2, 3, 4)
    with pytest.raises(ValueError, match="log_decay must have shape"):
        scan(sequences[0], sequences[1][:, :, :1], *sequences[2:])
    with pytest.raises(ValueError, match="must have shape"):
        scan(*sequences[:-1], sequences[-1][..., :2])
    with pytest.raises(ValueError, match="initial_state"):
        scan(*sequences, start[:1])
    with pytest.raises(ValueError, match="engine"):
        scan(*sequences, engine="triton")
