from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressm.scans import lti_chunked, lti_direct, lti_fft, lti_scan, lti_step, native
from compressm.scans.lti_chunked import powers

ENGINES = ["chunked", "fft", *(["direct"] if native.library() else [])]


def arguments(seed: int, batch: int, length: int, p: int, q: int, n: int, slowest: float = 1e-4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    decay = -slowest - torch.rand(n, dtype=torch.float64, generator=generator) ** 3
    phase = 2 * torch.pi * torch.rand(n, dtype=torch.float64, generator=generator)
    values = [normal(batch, length, p), decay, phase, normal(n, p), normal(n, p), normal(q, n), normal(q, n)]
    # Reference and engine see the same numbers when these are all float32 values to begin with.
    return [value.float().double() for value in values]


def outputs_and_gradients(values: list[Tensor], dtype: torch.dtype, engine: str, weight: Tensor) -> list[Tensor]:
    leaves = [value.to(dtype, copy=True).requires_grad_() for value in values]
    y = lti_scan(*leaves, engine=engine)
    return [y.detach(), *torch.autograd.grad((y * weight.to(dtype)).sum(), leaves)]


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    length=st.integers(1, 150),
    p=st.integers(1, 9),
    q=st.integers(1, 9),
    n=st.integers(1, 40),
    slowest=st.sampled_from([1e-1, 1e-3, 1e-6]),
)
def test_engines_equal_a_float64_loop(
    engine: str, seed: int, batch: int, length: int, p: int, q: int, n: int, slowest: float
) -> None:
    values = arguments(seed, batch, length, p, q, n, slowest)
    weight = torch.randn(batch, length, q, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    truth = outputs_and_gradients(values, torch.float64, "loop", weight)
    exact = outputs_and_gradients(values, torch.float64, engine, weight)
    single = outputs_and_gradients(values, torch.float32, engine, weight)
    # Poles' gradients can cancel to nothing: they are held against the size of what they are sums of.
    terms = float(weight.norm() * values[0].norm() * values[3].norm() * values[5].norm())
    for index, (a, b, c) in enumerate(zip(truth, exact, single, strict=True)):
        poles = index in (2, 3)
        scale = float(a.norm()) + poles * 1e-2 * terms + 1e-12
        assert (b - a).norm() <= 1e-11 * scale  # rounding in float64 over 150 steps
        assert (c - a).norm() <= (1e-4 if index else 1e-5) * scale


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 70),
    chunk=st.sampled_from([1, 2, 3, 8, 64]),
    n=st.integers(1, 40),
    engine=st.sampled_from(["native", "torch"] if native.library() else ["torch"]),
)
def test_every_chunk_length_and_chain_with_states(seed: int, length: int, chunk: int, n: int, engine: str) -> None:
    values = arguments(seed, 2, length, 3, 2, n)
    generator = torch.Generator().manual_seed(seed + 1)
    start, to_y, to_state = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((2, 2, n), (2, length, 2), (2, 2, n))
    )

    def run(scan: Any) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in (*values, start)]
        y, state = scan(*leaves)
        return [y, state, *torch.autograd.grad((y * to_y).sum() + (state * to_state).sum(), leaves)]

    truth = run(lambda *x: lti_scan(*x, return_state=True, engine="loop"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lti_chunked, "chain_engine", lambda tensor: engine)
        result = run(lambda *x: lti_chunked.scan(*x, chunk=min(chunk, length)))
    for a, b in zip(truth, result, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_by_finite_differences(engine: str) -> None:
    leaves = [value.requires_grad_() for value in arguments(0, 2, 13, 3, 2, 4)]
    assert torch.autograd.gradcheck(lambda *tensors: lti_scan(*tensors, engine=engine), leaves)


@pytest.mark.skipif(native.library() is None, reason="needs the compiled kernels")
@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 40), length=st.integers(1, 70), n=st.integers(1, 11))
def test_direct_with_states_and_feedthrough(seed: int, batch: int, length: int, n: int) -> None:
    values = arguments(seed, batch, length, 3, 3, n)
    generator = torch.Generator().manual_seed(seed + 1)
    start, D, to_y, to_state = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((batch, 2, n), (3,), (batch, length, 3), (batch, 2, n))
    )

    def run(engine: Any) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in (*values, start, D)]
        y, state = lti_scan(*leaves[:-1], return_state=True, engine=engine, D=leaves[-1])
        return [y, state, *torch.autograd.grad((y * to_y).sum() + (state * to_state).sum(), leaves)]

    for a, b in zip(run("loop"), run("direct"), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(native.library() is None, reason="needs the compiled kernels")
def test_direct_is_the_same_on_several_threads_and_lets_nan_through() -> None:
    values = [value.float() for value in arguments(5, 70, 40, 4, 4, 9)]
    weight, threads = torch.ones(70, 40, 4, dtype=torch.float64), torch.get_num_threads()
    alone = outputs_and_gradients(values, torch.float32, "direct", weight)
    try:
        torch.set_num_threads(3)
        together = outputs_and_gradients(values, torch.float32, "direct", weight)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().max()))  # sums in another order
    values[0][3, 7, 2] = torch.nan
    y = lti_scan(*values, engine="direct")
    assert y[3, 7:].isnan().all()
    assert y[3, :7].isfinite().all()
    assert y[[2, 4]].isfinite().all()


def test_reference_engine_is_the_definition() -> None:
    u, log_radius, phase, *rest = (value.numpy() for value in arguments(2, 2, 9, 3, 2, 4))
    lam, B, C = np.exp(log_radius + 1j * phase), rest[0] + 1j * rest[1], rest[2] + 1j * rest[3]
    y = np.zeros((2, 9, 2))
    for b in range(2):
        x = np.zeros(4, dtype=complex)
        for k in range(9):
            x = lam * x + B @ u[b, k]
            y[b, k] = (C @ x).real
    result = lti_scan(*arguments(2, 2, 9, 3, 2, 4), engine="loop")
    np.testing.assert_allclose(result.numpy(), y, rtol=1e-12)


def test_a_sequence_in_two_parts_or_in_steps_is_the_same() -> None:
    u, *system = arguments(3, 2, 50, 3, 2, 20)
    whole, last = lti_scan(u, *system, return_state=True)
    first, state = lti_scan(u[:, :21], *system, return_state=True)
    second, after = lti_scan(u[:, 21:], *system, state, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(after, last)
    outputs, state = [], torch.zeros(2, 2, 20, dtype=torch.float64)
    for k in range(u.shape[1]):
        y, state = lti_step(state, u[:, k], *system)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("length", [4999, 5000])
def test_long_sequence_in_single_precision(engine: str, length: int) -> None:
    values = arguments(1, 1, length, 2, 2, 8)
    truth = lti_scan(*values, engine="loop")
    single = lti_scan(*(value.float() for value in values), engine=engine)
    assert (single - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_is_widened_inside(engine: str) -> None:
    values = [value.float() for value in arguments(1, 2, 100, 4, 4, 8)]
    y = lti_scan(values[0].bfloat16(), *values[1:], engine=engine)
    assert y.dtype == torch.bfloat16
    truth = lti_scan(values[0].bfloat16().double(), *(v.double() for v in values[1:]), engine="loop")
    assert (y.double() - truth).norm() <= 2**-8 * truth.norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_leaves_the_recurrence_in_its_own_precision(engine: str) -> None:
    values = [value.float().requires_grad_() for value in arguments(1, 2, 100, 4, 4, 8)]
    plain = lti_scan(*values, engine=engine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lti_scan(*values, engine=engine)
    assert torch.equal(y, plain)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), values), torch.autograd.grad(plain.square().sum(), values), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_state_of_every_step_is_kept(engine: str) -> None:
    batch, length, n = 16, 400, 256
    leaves = [value.float().requires_grad_() for value in arguments(0, batch, length, 2, 2, n)]
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        lti_scan(*leaves, engine=engine)
    assert sizes
    assert max(sizes) < batch * length * 2 * n / 4 + (engine == "fft") * length * 2 * n  # fft: one table for all


def test_the_cheapest_engine_is_taken() -> None:
    narrow, wide = (lti_fft.cost(50, 784, h, h, 256) / lti_chunked.cost(50, 784, h, h, 256) for h in (8, 128))
    assert narrow < 1 < wide
    assert lti_fft.cost(50, 784, 8, 8, 16) > lti_chunked.cost(50, 784, 8, 8, 16)
    small, large = (
        lti_fft.cost(50, 784, 8, 8, n, compiled=True) / lti_direct.cost(50, 784, 8, 8, n) for n in (13, 256)
    )
    assert large < 1 < small
    full, alone = (lti_direct.cost(b, 784, 8, 8, 32) / lti_chunked.cost(b, 784, 8, 8, 32) for b in (48, 1))
    assert full < 1 < alone  # a single sequence fills one lane only
    assert lti_direct.cost(48, 784, 256, 256, 256) > lti_chunked.cost(48, 784, 256, 256, 256)


@pytest.mark.parametrize("engine", ["chunked", *(["direct"] if native.library() else [])])
def test_compiles_without_a_graph_break(engine: str) -> None:
    torch.compiler.reset()
    values = [value.float().requires_grad_() for value in arguments(6, 2, 20, 12, 6, 5)]
    compiled = torch.compile(lambda *x: lti_scan(*x, engine=engine), backend="aot_eager", fullgraph=True)
    expected, got = lti_scan(*values, engine=engine), compiled(*values)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), values), torch.autograd.grad(expected.sum(), values), strict=True):
        torch.testing.assert_close(a, b)


def test_powers_hold_no_denormal_numbers() -> None:
    tiny = torch.finfo(torch.float32).tiny
    re, im = powers(torch.tensor([-0.5, -0.1, -1e-3]), torch.tensor([1.0, 2.0, 3.0]), torch.arange(5000))
    magnitude = torch.hypot(re.double(), im.double())
    assert ((magnitude == 0) | (magnitude >= tiny)).all()
    assert (magnitude[:, 0] == 0).any()
    # The square of what is left is no denormal either: gradients multiply powers with each other.
    assert ((magnitude == 0) | (magnitude.square() >= tiny)).all()


def test_bad_arguments_are_named() -> None:
    u, *system = arguments(0, 1, 3, 1, 1, 1)
    with pytest.raises(ValueError, match="engine must be"):
        lti_scan(u, *system, engine="fast")
    with pytest.raises(ValueError, match="no states"):
        lti_scan(u, *system, return_state=True, engine="fft")
    with pytest.raises(ValueError, match=r"B_im must have shape \(1, 1\)"):
        lti_scan(u, *system[:3], torch.zeros(2, 1), *system[4:])
    with pytest.raises(ValueError, match="initial_state"):
        lti_scan(u, *system, torch.zeros(1, 1))


@pytest.mark.parametrize("engine", ["chunked", "fft", "loop"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_out(engine: str, value: float) -> None:
    """A diverging training must be seen: no engine takes a NaN for a pole that has decayed."""
    for index in range(7):
        values = arguments(0, batch=1, length=70, p=2, q=2, n=3)
        values[index].view(-1)[0] = value
        assert not bool(lti_scan(*values, engine=engine).isfinite().all())  # type: ignore[call-overload]
