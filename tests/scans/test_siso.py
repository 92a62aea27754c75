from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressm.scans import lti_scan, siso_scan, siso_step


def arguments(seed: int, batch: int, length: int, channels: int, n: int, slowest: float = 1e-4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    decay = -slowest - torch.rand(channels, n, generator=generator) ** 3
    phase = 2 * torch.pi * torch.rand(channels, n, generator=generator)
    values = [normal(batch, length, channels), decay, phase, normal(channels, n), normal(channels, n)]
    return [value.double() for value in (*values, normal(batch, 2, channels, n))]


def outputs_and_gradients(values: list[Tensor], dtype: torch.dtype, engine: Any) -> list[Tensor]:
    leaves = [value.to(dtype, copy=True).requires_grad_() for value in values]
    y, state = siso_scan(*leaves, return_state=True, engine=engine)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(dtype) for t in (y, state)]
    return [
        y.detach(),
        state.detach(),
        *torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), leaves),
    ]


def test_reference_engine_is_the_definition() -> None:
    u, log_radius, phase, c_re, c_im, _ = (value.numpy() for value in arguments(0, 2, 7, 3, 4))
    lam, c, x = np.exp(log_radius + 1j * phase), c_re + 1j * c_im, np.zeros((2, 3, 4), dtype=complex)
    y = np.zeros_like(u)
    for k in range(7):
        x = lam * x + u[:, k, :, None]
        y[:, k] = (c * x).sum(-1).real
    np.testing.assert_allclose(siso_scan(*arguments(0, 2, 7, 3, 4)[:5], engine="loop").numpy(), y, rtol=1e-11)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    length=st.integers(1, 150),
    channels=st.integers(1, 9),
    n=st.integers(1, 20),
    slowest=st.sampled_from([1e-1, 1e-3, 1e-6]),
)
def test_chunked_engine_equals_a_float64_loop(
    seed: int, batch: int, length: int, channels: int, n: int, slowest: float
) -> None:
    values = arguments(seed, batch, length, channels, n, slowest)
    truth = outputs_and_gradients(values, torch.float64, "loop")
    terms = float(values[0].norm() * values[3].norm())
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        for index, (a, b) in enumerate(zip(truth, outputs_and_gradients(values, dtype, "chunked"), strict=True)):
            # Poles' gradients can cancel to nothing: they are held against the size of what they are sums of.
            scale = float(a.norm()) + terms * (index in (3, 4))
            assert (b.double() - a).norm() <= tolerance * (1 if index < 2 else 10) * scale


def test_gradients_by_finite_differences() -> None:
    leaves = [value.requires_grad_() for value in arguments(0, 2, 19, 2, 3)]
    assert torch.autograd.gradcheck(lambda *x: siso_scan(*x, return_state=True), leaves)


def test_one_channel_is_an_lti_scan_with_one_input_and_output() -> None:
    u, log_radius, phase, c_re, c_im, _ = arguments(3, 2, 90, 1, 6)
    one, zero = torch.ones(6, 1, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)
    torch.testing.assert_close(
        siso_scan(u, log_radius, phase, c_re, c_im), lti_scan(u, log_radius[0], phase[0], one, zero, c_re, c_im)
    )


def test_a_sequence_in_two_parts_or_in_steps_is_the_same() -> None:
    u, *system, start = arguments(1, 2, 50, 5, 3)
    whole, last = siso_scan(u, *system, start, return_state=True)
    first, state = siso_scan(u[:, :21], *system, start, return_state=True)
    second, after = siso_scan(u[:, 21:], *system, state, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(after, last)
    outputs = []
    for k in range(50):
        y, start = siso_step(start, u[:, k], *system)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), whole)


def test_bad_arguments_are_named() -> None:
    u, log_radius, phase, c_re, c_im, start = arguments(0, 2, 5, 3, 4)
    with pytest.raises(ValueError, match="phase must have shape"):
        siso_scan(u, log_radius, phase[:2], c_re, c_im)
    with pytest.raises(ValueError, match="channels"):
        siso_scan(u[..., :2], log_radius, phase, c_re, c_im)
    with pytest.raises(ValueError, match="initial_state"):
        siso_scan(u, log_radius, phase, c_re, c_im, start[:1])
    with pytest.raises(ValueError, match="engine"):
        siso_scan(u, log_radius, phase, c_re, c_im, engine="fft")
