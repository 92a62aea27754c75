from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressm.scans import native, selective_scan, selective_step

NAMES = ("y", "state", "u", "delta", "A", "B", "C", "initial_state")
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
ENGINES = [pytest.param("native", marks=needs_compiler), "torch"]


def arguments(
    seed: int, batch: int, length: int, d: int, n: int, smallest: float = 1e-2, largest: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spread = torch.rand(batch, length, d, generator=generator)
    delta = smallest * (largest / smallest) ** spread
    rates = -torch.exp(normal(d, n)) * n**0.5
    values = [
        normal(batch, length, d),
        delta,
        rates,
        normal(batch, length, n),
        normal(batch, length, n),
        normal(batch, d, n),
    ]
    return [value.double() for value in values]


def outputs_and_gradients(values: list[Tensor], dtype: torch.dtype, engine: str) -> list[Tensor]:
    leaves = [value.to(dtype, copy=True).requires_grad_() for value in values]
    y, state = selective_scan(*leaves, return_state=True, engine=engine)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(dtype) for t in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def by_hand(u: np.ndarray, delta: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, h: np.ndarray) -> np.ndarray:
    batch, length, d = u.shape
    y = np.zeros_like(u)
    for b in range(batch):
        state = h[b].copy()
        for t in range(length):
            for c in range(d):
                for i in range(A.shape[1]):
                    state[c, i] = (
                        math.exp(delta[b, t, c] * A[c, i]) * state[c, i] + delta[b, t, c] * B[b, t, i] * u[b, t, c]
                    )
                    y[b, t, c] += C[b, t, i] * state[c, i]
    return y


def test_reference_engine_is_the_definition() -> None:
    values = arguments(3, 2, 6, 3, 4)
    y = selective_scan(*values, engine="loop")
    np.testing.assert_allclose(y.numpy(), by_hand(*(v.numpy() for v in values)), rtol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    length=st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 97])),
    d=st.one_of(st.integers(1, 9), st.sampled_from([16, 33])),
    n=st.integers(1, 19),
    steps=st.sampled_from([(1e-2, 1.0), (1e-7, 1e-4), (1.0, 100.0)]),
)
def test_engines_equal_a_float64_loop(
    engine: str, seed: int, batch: int, length: int, d: int, n: int, steps: tuple[float, float]
) -> None:
    values = [v.float().double() for v in arguments(seed, batch, length, d, n, *steps)]
    truth = outputs_and_gradients(values, torch.float64, "loop")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        result = outputs_and_gradients(values, dtype, engine)
        for name, a, b in zip(NAMES, truth, result, strict=True):
            # Gradients to A may cancel over the steps: they are held against the size of their terms instead.
            limit = tolerance * (1 if name in ("y", "state") else 10)
            floor = 1e-30 if name != "A" else float(values[1].max() * truth[2].norm())
            assert (b.double() - a).norm() <= limit * max(float(a.norm()), floor), (name, dtype)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_by_finite_differences(engine: str) -> None:
    leaves = [value.requires_grad_() for value in arguments(0, 2, 9, 3, 2)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, return_state=True, engine=engine), leaves)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sequence_in_two_parts_or_in_steps_is_the_same(engine: str) -> None:
    u, delta, A, B, C, start = arguments(1, 2, 50, 5, 3)
    whole, last = selective_scan(u, delta, A, B, C, start, return_state=True, engine=engine)
    first, state = selective_scan(
        u[:, :21], delta[:, :21], A, B[:, :21], C[:, :21], start, return_state=True, engine=engine
    )
    second, after = selective_scan(
        u[:, 21:], delta[:, 21:], A, B[:, 21:], C[:, 21:], state, return_state=True, engine=engine
    )
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(after, last)
    outputs = []
    for t in range(u.shape[1]):
        y, start = selective_step(start, u[:, t], delta[:, t], A, B[:, t], C[:, t])
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), whole)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_states(engine: str, dtype: torch.dtype) -> None:
    u, delta, A, B, C, _ = (value.float() for value in arguments(2, 2, 200, 8, 4))
    halves = [value.to(dtype) for value in (u, delta, B, C)]
    y, state = selective_scan(halves[0], halves[1], A, halves[2], halves[3], return_state=True, engine=engine)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    truth = selective_scan(*(v.double() for v in (halves[0], halves[1], A, halves[2], halves[3])), engine="loop")
    # One rounding of the result, none along the way.
    assert (y.double() - truth).norm() <= torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_of_the_size_of_all_states_is_kept(engine: str) -> None:
    batch, length, d, n = 2, 400, 16, 64
    leaves = [value.float().requires_grad_() for value in arguments(0, batch, length, d, n)]
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        selective_scan(*leaves, engine=engine)
    assert sizes
    assert sum(sizes) < batch * length * d * n / 4
    sizes.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        selective_scan(*leaves, engine="loop")
    assert sum(sizes) > batch * length * d * n  # the measure sees what it should


@pytest.mark.parametrize("engine", ENGINES)
def test_a_nan_stays_visible_and_in_its_own_channel(engine: str) -> None:
    u, delta, A, B, C, _ = (value.float() for value in arguments(4, 2, 30, 20, 3))
    u[1, 7, 2] = math.nan
    y = selective_scan(u, delta, A, B, C, engine=engine)
    assert y[1, 7:, 2].isnan().all()
    y[1, 7:, 2] = 0
    assert y.isfinite().all()


@needs_compiler
def test_strided_and_transposed_inputs() -> None:
    u, delta, A, B, C, _ = arguments(5, 2, 20, 12, 6)
    strided = [torch.stack([v, v], -1)[..., 0] for v in (u, delta, A, B, C)]
    channels_first = u.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(
        selective_scan(channels_first, *strided[1:], engine="native"), selective_scan(u, delta, A, B, C, engine="loop")
    )


@needs_compiler
def test_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    values = [value.float().requires_grad_() for value in arguments(6, 2, 20, 12, 6)]
    compiled = torch.compile(lambda *x: selective_scan(*x), backend="aot_eager", fullgraph=True)
    expected, got = selective_scan(*values), compiled(*values)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), values), torch.autograd.grad(expected.sum(), values), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_arguments_are_named() -> None:
    u, delta, A, B, C, start = arguments(0, 2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"B must have shape \(2, 5, 4\)"):
        selective_scan(u, delta, A, B[..., :3], C)
    with pytest.raises(ValueError, match="initial_state"):
        selective_scan(u, delta, A, B, C, start.transpose(1, 2))
    with pytest.raises(ValueError, match="engine"):
        selective_scan(u, delta, A, B, C, engine="cuda")
