"""Convolution by Fourier transforms, compiled and by PyTorch, against the sum that it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressm.scans import lti_fft, lti_scan, native

compiled, by_torch = lti_fft._NativeConvolution.apply, lti_fft._TorchConvolution.apply
pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


def operands(seed: int, batch: int, length: int, p: int, q: int) -> list[Tensor]:
    """Inputs, impulse response and what the outputs' gradient is: float32 values in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, length, p), (length, q, p), (batch, length, q))
    return [torch.randn(*shape, generator=generator).double() for shape in shapes]


def by_definition(u: Tensor, impulse: Tensor) -> Tensor:
    outputs = [torch.einsum("jqp,bjp->bq", impulse[: k + 1].flip(0), u[:, : k + 1]) for k in range(u.shape[1])]
    return torch.stack(outputs, 1)


def outputs_and_gradients(convolve: Any, u: Tensor, impulse: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [u.detach().requires_grad_(), impulse.detach().requires_grad_()]
    y = convolve(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 40),
    length=st.integers(1, 200),
    p=st.integers(1, 19),
    q=st.integers(1, 19),
)
@example(seed=0, batch=1, length=1, p=1, q=1)
@example(seed=0, batch=16, length=64, p=16, q=8)  # whole vectors only
@example(seed=0, batch=17, length=81, p=9, q=17)
def test_both_forms_equal_the_sum(seed: int, batch: int, length: int, p: int, q: int) -> None:
    values = operands(seed, batch, length, p, q)
    truth = outputs_and_gradients(by_definition, *values)
    single = [value.float() for value in values]
    for form in (compiled, by_torch):
        # Rounding grows with the logarithm of the length: some units of the last digit.
        for got, tolerance in (
            (outputs_and_gradients(form, *values), 1e-14),
            (outputs_and_gradients(form, *single), 1e-6),
        ):
            for a, b in zip(truth, got, strict=True):
                assert (b - a).norm() <= tolerance * a.norm()


@pytest.mark.parametrize("length", [784, 1000, 4999, 16385])
def test_long_sequences_equal_the_torch_form(length: int) -> None:
    values = operands(length, 3, length, 2, 3)
    truth = outputs_and_gradients(by_torch, *values)
    double = outputs_and_gradients(compiled, *values)
    single = outputs_and_gradients(compiled, *(value.float() for value in values))
    for a, b, c in zip(truth, double, single, strict=True):
        assert (b - a).norm() <= 1e-14 * a.norm()
        assert (c - a).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize("native_form", [True, False])
def test_scan_equals_the_loop_in_either_form(native_form: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((17, 99, 3), (7,), (7,), (7, 3), (7, 3), (5, 7), (5, 7))
    values = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]
    values[1] = -0.3 * values[1].abs()
    if not native_form:
        monkeypatch.setattr(native, "usable", lambda *tensors: False)

    def run(engine: Any) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in values]
        y = lti_scan(*leaves, engine=engine)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    for a, b in zip(run("loop"), run("fft"), strict=True):
        assert (b - a).norm() <= 1e-11 * a.norm()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 200),
    p=st.integers(1, 19),
    q=st.integers(1, 19),
    n=st.integers(1, 70),
    skip=st.booleans(),
)
@example(seed=0, length=784, p=8, q=8, n=256, skip=True)
@example(seed=0, length=1, p=1, q=1, n=1, skip=True)
def test_impulse_responses_equal_their_definition(seed: int, length: int, p: int, q: int, n: int, skip: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    skip = skip and p == q
    poles = (-1e-3 - normal(n).abs() / 10, 3 * normal(n))
    system = [*poles, normal(n, p), normal(n, p), normal(q, n), normal(q, n), *([normal(p)] if skip else [])]
    system = [value.float().double() for value in system]  # the same numbers for either dtype
    grad = normal(length, q, p)

    def definition(log_radius: Tensor, phase: Tensor, *matrices: Tensor) -> Tensor:
        B_re, B_im, C_re, C_im, *D = matrices
        lam = torch.polar(log_radius.exp(), phase)
        K = torch.stack(
            [((torch.complex(C_re, C_im) * lam**j) @ torch.complex(B_re, B_im)).real for j in range(length)]
        )
        return K + torch.cat([torch.diag(D[0])[None], torch.zeros_like(K[1:])]) if D else K

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in system]
        K = function(*leaves)
        return [K.detach(), *torch.autograd.grad(K, leaves, grad.to(dtype))]

    def scan(form: Any) -> Any:
        return lambda *leaves: form.apply(*leaves, *([] if skip else [None]), length)

    truth = run(definition, torch.float64)
    # The gradient of a pole is a sum of moments that may cancel.
    terms = length * float(grad.norm() * system[2].norm() * system[4].norm())
    for form in (lti_fft._NativeImpulseResponse, lti_fft._ImpulseResponse):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            for index, (a, b) in enumerate(zip(truth, run(scan(form), dtype), strict=True)):
                assert (b - a).norm() <= tolerance * (a.norm() + 1e-2 * terms * (index in (1, 2)))


def test_threads_change_no_bit_of_an_impulse_response() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((40,), (40,), (40, 5), (40, 5), (5, 40), (5, 40), (5,))
    system = [torch.randn(*shape, generator=generator) for shape in shapes]
    system[0] = -0.1 * system[0].abs()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [value.clone().requires_grad_() for value in system]
            K: Any = lti_fft._NativeImpulseResponse.apply(*leaves, 150)
            results.append([K.detach(), *torch.autograd.grad(K, leaves, K.detach() ** 2)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_feedthrough_is_a_part_of_the_impulse_response() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((17, 99, 3), (7,), (7,), (7, 3), (7, 3), (3, 7), (3, 7), (3,))
    values = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]
    values[1] = -0.3 * values[1].abs()

    def run(engine: Any) -> list[Tensor]:
        *leaves, D = (value.clone().requires_grad_() for value in values)
        y = lti_scan(*leaves, D=D, engine=engine)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [*leaves, D])]

    for a, b in zip(run("loop"), run("fft"), strict=True):
        assert (b - a).norm() <= 1e-11 * a.norm()


@pytest.mark.parametrize(("batch", "length", "form"), [(1, 4096, compiled), (1, 5000, by_torch), (20, 5000, compiled)])
def test_few_long_signals_are_left_to_torch(batch: int, length: int, form: Any) -> None:
    u, impulse, _ = operands(0, batch, length, 1, 1)
    if form is by_torch and native.vector_bytes() < 64:
        pytest.skip("a single signal fills enough of a short vector")
    assert torch.equal(lti_fft._convolution(u, impulse), form(u, impulse))


def test_gradients_by_finite_differences() -> None:
    u, impulse, _ = operands(0, 9, 7, 3, 2)
    assert torch.autograd.gradcheck(compiled, [u.requires_grad_(), impulse.requires_grad_()])


def test_any_strides() -> None:
    u, impulse, grad = operands(1, 5, 20, 4, 3)
    expected = outputs_and_gradients(compiled, u, impulse, grad)

    def strided(x: Tensor) -> Tensor:
        return x.transpose(0, 2).contiguous().transpose(0, 2)

    got = outputs_and_gradients(compiled, strided(u), strided(impulse), strided(grad))
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


def test_threads_change_no_bit() -> None:
    u, impulse, grad = (value.float() for value in operands(2, 20, 100, 5, 6))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(compiled, u, impulse, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_out_of_its_own_sequence_only(value: float) -> None:
    u, impulse, grad = operands(3, 20, 30, 2, 2)
    u[18, 4, 1] = value
    y, to_u, to_impulse = outputs_and_gradients(compiled, u, impulse, grad)
    finite = y.isfinite().all(-1).all(-1)
    assert not finite[18]
    assert finite.sum() == 19
    assert to_u.isfinite().all()
    assert not to_impulse.isfinite().all()


def test_sizes_are_products_of_small_factors() -> None:
    for length in [*range(1, 300), 784, 1024, 16000, 99991]:
        n1, n2 = lti_fft._rectangle(length)
        assert 1 < n1 <= n2
        assert length <= n1 * n2 <= max(4, 1.2 * length + 1)
        for n in (n1, n2):
            radices = torch.tensor(lti_fft._radices(n))
            assert len(radices) >= 2
            assert radices.prod() == n
            assert set(radices.tolist()) <= {1, 2, 3, 4, 5, 8}
