from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressm.scans.lti import _powers, lti_scan


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
    leaves = [value.to(dtype).requires_grad_() for value in values]
    y = lti_scan(*leaves, engine=engine)  # type: ignore[arg-type]
    return [y.detach(), *torch.autograd.grad((y * weight.to(dtype)).sum(), leaves)]


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
def test_chunked_engine_equals_a_float64_loop(
    seed: int, batch: int, length: int, p: int, q: int, n: int, slowest: float
) -> None:
    values = arguments(seed, batch, length, p, q, n, slowest)
    weight = torch.randn(batch, length, q, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    truth = outputs_and_gradients(values, torch.float64, "loop", weight)
    exact = outputs_and_gradients(values, torch.float64, "chunked", weight)
    single = outputs_and_gradients(values, torch.float32, "chunked", weight)
    for index, (a, b, c) in enumerate(zip(truth, exact, single, strict=True)):
        scale = a.norm().clamp_min(1e-12)
        assert (b - a).norm() <= 1e-11 * scale  # rounding in float64 over 150 steps
        limit = 1e-5 if index == 0 else 1e-4
        assert (c - a).norm() <= limit * scale + 1e-4 * (index == 2)  # a phase's gradient can cancel to nothing


def test_gradients_by_finite_differences() -> None:
    leaves = [value.requires_grad_() for value in arguments(0, 2, 13, 3, 2, 4)]
    assert torch.autograd.gradcheck(lambda *tensors: lti_scan(*tensors), leaves)


def test_long_sequence_in_single_precision() -> None:
    values = arguments(1, 1, 5000, 2, 2, 8)
    truth = lti_scan(*values, engine="loop")
    single = lti_scan(*(value.float() for value in values))
    assert (single - truth).norm() <= 1e-5 * truth.norm()


def test_powers_hold_no_denormal_numbers() -> None:
    tiny = torch.finfo(torch.float32).tiny
    re, im = _powers(torch.tensor([-0.5, -0.1, -1e-3]), torch.tensor([1.0, 2.0, 3.0]), torch.arange(5000))
    magnitude = torch.hypot(re.double(), im.double())
    assert ((magnitude == 0) | (magnitude >= tiny)).all()
    assert (magnitude[:, 0] == 0).any()
    # The square of what is left is no denormal either: gradients multiply powers with each other.
    assert ((magnitude == 0) | (magnitude.square() >= tiny)).all()


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="engine must be"):
        lti_scan(*arguments(0, 1, 3, 1, 1, 1), engine="fast")  # type: ignore[arg-type]
