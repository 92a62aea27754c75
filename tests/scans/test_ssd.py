from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressm.scans import ssd_scan, ssd_step

NAMES = ("y", "state", "x", "log_decay", "B", "C", "initial_state")


def arguments(
    seed: int, batch: int, length: int, groups: int, per_group: int, p: int, n: int, fastest: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads = groups * per_group
    log_decay = -fastest * torch.rand(batch, length, heads, generator=generator) ** 3
    vectors = [normal(batch, length, groups, n) for _ in range(2)]
    return [v.double() for v in (normal(batch, length, heads, p), log_decay, *vectors, normal(batch, heads, p, n))]


def outputs_and_gradients(values: list[Tensor], dtype: torch.dtype, engine: str) -> list[Tensor]:
    leaves = [value.to(dtype, copy=True).requires_grad_() for value in values]
    y, state = ssd_scan(*leaves, return_state=True, engine=engine)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(dtype) for t in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def test_reference_engine_is_the_definition() -> None:
    values = arguments(0, 2, 5, 2, 3, 4, 3)
    x, log_decay, B, C, start = (v.numpy() for v in values)
    y = np.zeros_like(x)
    for b in range(2):
        for h in range(6):
            S = start[b, h].copy()
            for t in range(5):
                S = math.exp(log_decay[b, t, h]) * S + np.outer(x[b, t, h], B[b, t, h // 3])
                y[b, t, h] = S @ C[b, t, h // 3]
    np.testing.assert_allclose(ssd_scan(*values, engine="loop").numpy(), y, rtol=1e-11)


@pytest.mark.parametrize("engine", ["chunked", "native"])
@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    length=st.integers(1, 140),
    groups=st.integers(1, 2),
    per_group=st.integers(1, 3),
    p=st.integers(1, 9),
    n=st.integers(1, 20),
    fastest=st.sampled_from([1e-6, 1.0, 200.0]),
)
def test_engines_equal_a_float64_loop(
    engine: str, seed: int, batch: int, length: int, groups: int, per_group: int, p: int, n: int, fastest: float
) -> None:
    values = [v.float().double() for v in arguments(seed, batch, length, groups, per_group, p, n, fastest)]
    truth = outputs_and_gradients(values, torch.float64, "loop")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        result = outputs_and_gradients(values, dtype, engine)
        for name, a, b in zip(NAMES, truth, result, strict=True):
            # A decay's gradient sums terms that cancel; it is held against the largest of them.
            scale = float(a.norm()) if name != "log_decay" else float(a.norm() + values[0].norm() * values[2].norm())
            bound = tolerance * (1 if name in ("y", "state") else 10) * scale
            assert (b.double() - a).norm() <= bound + 10 * torch.finfo(dtype).tiny, (name, dtype)  # no denormal numbers


def test_gradients_by_finite_differences() -> None:
    leaves = [value.requires_grad_() for value in arguments(0, 1, 19, 1, 2, 2, 3)]
    assert torch.autograd.gradcheck(lambda *x: ssd_scan(*x, return_state=True), leaves)


def test_a_sequence_in_two_parts_or_in_steps_is_the_same() -> None:
    x, log_decay, B, C, start = arguments(1, 2, 50, 2, 2, 4, 5)
    whole, last = ssd_scan(x, log_decay, B, C, start, return_state=True)
    parts, state = [], start
    for now in (slice(0, 21), slice(21, 50)):
        y, state = ssd_scan(x[:, now], log_decay[:, now], B[:, now], C[:, now], state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)
    outputs = []
    for t in range(50):
        y, start = ssd_step(start, x[:, t], log_decay[:, t], B[:, t], C[:, t])
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), whole)


def test_half_precision_keeps_float32_states() -> None:
    x, log_decay, B, C, _ = (value.float() for value in arguments(2, 2, 200, 1, 2, 8, 4))
    halves = [value.bfloat16() for value in (x, log_decay, B, C)]
    y, state = ssd_scan(*halves, return_state=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    truth = ssd_scan(*(value.double() for value in halves), engine="loop")
    assert (y.double() - truth).norm() <= 2**-8 * truth.norm()


def test_no_state_of_every_step_is_kept() -> None:
    batch, length, heads, p, n = 2, 400, 2, 32, 64
    leaves = [value.float().requires_grad_() for value in arguments(0, batch, length, 1, heads, p, n)]
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        ssd_scan(*leaves)
    assert sizes
    assert sum(sizes) < batch * length * heads * p * n / 2


def test_bad_arguments_are_named() -> None:
    x, log_decay, B, C, start = arguments(0, 2, 5, 2, 2, 3, 4)
    with pytest.raises(ValueError, match="3 heads"):
        ssd_scan(x[:, :, :3], log_decay[:, :, :3], B, C)
    with pytest.raises(ValueError, match="C must have shape"):
        ssd_scan(x, log_decay, B, C[..., :2])
    with pytest.raises(ValueError, match="initial_state"):
        ssd_scan(x, log_decay, B, C, start[:1])
    with pytest.raises(ValueError, match="engine"):
        ssd_scan(x, log_decay, B, C, engine="triton")
