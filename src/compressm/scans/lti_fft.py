"""The LTI scan as a convolution with the whole impulse response ``K_j = Re(C lam^j B)``, by FFT.

On the CPU it is compiled code (``kernels/convolution.h``). PyTorch's transforms are used on other devices, and for few
long signals.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.scans import native
from compressm.scans.graph import exporting
from compressm.scans.lti_chunked import powers
from compressm.scans.transforms import gradients, twice


def scan(
    u: Tensor,
    log_radius: Tensor,
    phase: Tensor,
    B_re: Tensor,
    B_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor | None = None,
) -> Tensor:
    """Outputs for a zero initial state; see `compressm.scans.lti.lti_scan`. ``D`` is a part of the impulse response."""
    system = (log_radius, phase, B_re, B_im, C_re, C_im, D)
    compiles = torch.compiler.is_compiling()  # it takes operators only, and fuses PyTorch's own
    form = _ImpulseResponse if compiles or not native.usable(u) else _NativeImpulseResponse
    impulse: Any = form.apply(*system, u.shape[1])
    return _convolution(u, impulse)


def cost(batch: int, length: int, p: int, q: int, n: int, compiled: bool = False, itemsize: int = 4) -> float:
    """Operations of a forward pass, in units of those of a large matrix product.

    The weights of the compiled form were measured on one core of a busy machine, forward and backward, against the
    step-by-step form (`lti_direct.cost`). They count the transforms of the signals in all lanes, a small complex matrix
    product for each frequency, the impulse response, and the constant cost of one more operation.
    """
    if compiled:
        lanes = native.vector_bytes() // itemsize
        tiles, size = -(-batch // lanes), length  # the size of the transform is only a little larger
        transforms = (tiles * (3 * p + 2 * q) + 2 * -(-p * q // lanes)) * size * math.log2(max(2, size))
        impulse = n * length * p * q
        in_cache = 256 * size * max(p, q) < 2 << 20
        return (1 if in_cache else 2) * (45 * transforms + 120 * tiles * size * p * q) + 3.3 * impulse + 3e6
    size = _fft_size(length)
    transforms = batch * (p + q) * 2.5 * size * math.log2(size)
    products = batch * size * 4 * p * q
    impulse = length * 4 * n * p * q
    return 10 * transforms + 3 * products + impulse


def compiled(u: Tensor, q: int) -> bool:
    """Whether the compiled convolution is used for this input and ``q`` outputs."""
    return native.usable(u) and not exporting() and _fills_vectors(u, q)


def _fft_size(length: int) -> int:
    """The smallest 2^a 3^b 5^c (b, c at most 1) that a linear convolution of two sequences of this length fits in."""
    return min(factor * 2 ** math.ceil(math.log2(max(2, (2 * length - 1) / factor))) for factor in (1, 3, 5, 15))


def _steps(length: int) -> int:
    """The number of fine powers of `_ImpulseResponse`, m."""
    return math.isqrt(length - 1) + 1


class _NativeImpulseResponse(torch.autograd.Function):
    """As `_ImpulseResponse`, compiled (``kernels/impulse.h``). The backward pass computes the tables again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *system, length = arguments
        ctx.save_for_backward(*system)
        ctx.length = length
        log_radius, *others = (None if tensor is None else tensor.contiguous() for tensor in system)
        (n, p), q = system[2].shape, system[4].shape[0]
        impulse = system[2].new_empty(length, q, p)
        native.call("impulse_forward", impulse, length, p, q, n, _steps(length), log_radius, *others, impulse)
        return impulse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        system = ctx.saved_tensors
        if twice():
            return gradients(lambda *system: _impulse_response(*system)[0], (*system, ctx.length), (grad,))
        *tensors, D = (None if tensor is None else tensor.contiguous() for tensor in system)
        grads = [None if tensor is None else torch.empty_like(tensor) for tensor in (*tensors, D)]
        length, q, p = grad.shape
        sizes = (length, p, q, system[0].shape[0], _steps(length))
        native.call("impulse_backward", grad, *sizes, *tensors, grad.contiguous(), *grads)
        return *grads, None


class _ImpulseResponse(torch.autograd.Function):
    """``K_j = Re(C lam^j B)`` for j < length, shape ``(length, q, p)``: one matrix product; and D added to ``K_0``.

    With ``j = a m + b`` it is the product of ``C lam^(a m)``, for all a, and ``lam^b B``, for all b. Two short tables
    of powers replace a long one, for the same number of operations.
    """

    @staticmethod
    def forward(
        ctx: Any, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor,
        D: Tensor | None, length: int,
    ) -> Tensor:  # fmt: skip
        system = (log_radius, phase, B_re, B_im, C_re, C_im, D)
        impulse, tables = _impulse_response(*system, length)
        ctx.save_for_backward(*system, *tables)
        ctx.length = length
        return impulse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *system, B, C, coarse, fine, observe, reach = ctx.saved_tensors
        if twice():
            return gradients(lambda *system: _impulse_response(*system)[0], (*system, ctx.length), (grad,))
        m, (length, q, p) = len(fine), grad.shape
        missing = len(coarse) * m - length
        padded = F.pad(grad, (0, 0, 0, 0, 0, missing)) if missing else grad
        by_step = padded.reshape(-1, m, q, p).transpose(1, 2).reshape(-1, m * p)  # (a q, m p)
        to_C, from_C = _factors(by_step @ reach, C.conj(), coarse.conj(), m)
        to_B, from_B = _factors(by_step.T @ observe, B, fine, 1)
        # d lam^j = j lam^j (d log_radius + i d phase)
        return (
            from_B.real + from_C.real,
            from_B.imag - from_C.imag,
            to_B.real.T,
            to_B.imag.T,
            to_C.real,
            -to_C.imag,
            None if system[-1] is None else grad[0].diagonal().clone(),
            None,
        )


def _impulse_response(
    log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor, D: Tensor | None,
    length: int,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """The result of `_ImpulseResponse`, and the tensors for its backward pass."""
    m = _steps(length)
    fine_steps = torch.arange(m, device=phase.device)
    coarse = torch.complex(*powers(log_radius, phase, m * fine_steps[: -(-length // m)]))
    fine = torch.complex(*powers(log_radius, phase, fine_steps))
    B, C = torch.complex(B_re.T, B_im.T), torch.complex(C_re, C_im)
    # Re(x y) is the inner product of conj(x) and y as vectors (real part, imaginary part).
    observe = _real(coarse.conj()[:, None] * C.conj())  # (a q, 2n)
    reach = _real(fine[:, None] * B)  # (m p, 2n)
    impulse = (observe @ reach.T).view(len(coarse), len(C), m, -1).transpose(1, 2)
    impulse = impulse.reshape(-1, *impulse.shape[2:])[:length]
    if D is not None:
        impulse = impulse + F.pad(torch.diag_embed(D)[None], (0, 0, 0, 0, 0, length - 1))
    return impulse, (B, C, coarse, fine, observe, reach)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()).flatten(-2).flatten(0, 1)


def _factors(grad: Tensor, x: Tensor, powers: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of ``log_radius + i phase``, from the gradient of ``x lam^j``, j = 0, stride, ..."""
    complex_grad = torch.view_as_complex(grad.view(len(powers), *x.shape, 2))
    products = torch.view_as_real(complex_grad * powers.conj()[:, None])
    steps = stride * torch.arange(len(powers), dtype=grad.dtype, device=grad.device)
    moments = torch.stack([torch.ones_like(steps), steps]) @ products.flatten(1)
    to_x, first = torch.view_as_complex(moments.view(2, *x.shape, 2))
    return to_x, (first * x.conj()).sum(0)


def _convolution(u: Tensor, impulse: Tensor) -> Tensor:
    """``y_k = sum_j K_j u_{k-j}``, ``K`` of shape ``(length, q, p)``, ``u`` of shape ``(batch, length, p)``."""
    form = _NativeConvolution if compiled(u, impulse.shape[1]) else _TorchConvolution
    y: Any = form.apply(u, impulse)
    return y


def _fills_vectors(u: Tensor, q: int) -> bool:
    """Whether the compiled form is faster. It computes empty vector lanes too.

    Measured on one core, forward and backward: with fewer than three signals for 16 lanes both take about the same time
    at 4096 steps, and PyTorch's transforms take two thirds of the time at 65536. Otherwise the compiled form is faster,
    often three times.
    """
    (batch, length, p), lanes = u.shape, native.vector_bytes() // u.element_size()
    signals = batch * (p + q) + p * q
    vectors = -(-batch // lanes) * (p + q) + -(-p * q // lanes)
    return length <= 4096 or 16 * signals >= 3 * lanes * vectors


class _NativeConvolution(torch.autograd.Function):
    """Compiled, with one sequence per vector lane; see ``kernels/fft.h`` and ``kernels/convolution.h``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, impulse: Tensor) -> Tensor:
        signals, u = (u, impulse), u.contiguous()
        y, transfer = _native(u, impulse.contiguous())
        ctx.save_for_backward(u, transfer, *signals)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, transfer, *signals = ctx.saved_tensors
        if twice():
            return gradients(lambda *signals: _by_transforms(*signals)[0], signals, (grad,))
        return _native_backward(grad.contiguous(), u, transfer)


@torch.library.custom_op("compressm::convolution", mutates_args=(), device_types="cpu")
def _native(u: Tensor, impulse: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and the transform of ``impulse``, ``(size, 2, q, p)``, for `_native_backward`."""
    (batch, length, p), q = u.shape, impulse.shape[1]
    shape, tables = _plan(length, u.dtype)
    y, transfer = u.new_empty(batch, length, q), u.new_empty(transform_size(length), 2, q, p)
    native.call("impulse_to_transfer", u, length, q * p, shape, tables, impulse, transfer)
    native.call("convolve", u, batch, length, p, q, shape, tables, u, transfer, y)
    return y, transfer


@_native.register_fake
def _(u: Tensor, impulse: Tensor) -> tuple[Tensor, Tensor]:
    (batch, length, p), q = u.shape, impulse.shape[1]
    return u.new_empty(batch, length, q), u.new_empty(transform_size(length), 2, q, p)


@torch.library.custom_op("compressm::convolution_backward", mutates_args=(), device_types="cpu")
def _native_backward(grad: Tensor, u: Tensor, transfer: Tensor) -> tuple[Tensor, Tensor]:
    (batch, length, p), q = u.shape, grad.shape[2]
    shape, tables = _plan(length, u.dtype)
    to_u, to_transfer, to_impulse = torch.empty_like(u), torch.zeros_like(transfer), u.new_empty(length, q, p)
    native.call("convolve_backward", u, batch, length, p, q, shape, tables, u, transfer, grad, to_u, to_transfer)
    native.call("transfer_to_impulse", u, length, q * p, shape, tables, to_impulse, to_transfer)
    return to_u, to_impulse


@_native_backward.register_fake
def _(grad: Tensor, u: Tensor, transfer: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), u.new_empty(u.shape[1], grad.shape[2], u.shape[2])


def transform_size(length: int) -> int:
    """Number of points of the compiled transforms for sequences of this length."""
    n1, n2 = _rectangle(length)
    return n1 * n2


@functools.lru_cache(maxsize=32)
def _plan(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors and roots of unity of the compiled transforms; see `Plan` in ``kernels/fft.h``."""
    n1, n2 = _rectangle(length)
    size, both = n1 * n2, (_radices(n1), _radices(n2))
    k1, t2 = (torch.arange(n, dtype=torch.float64) for n in (n1, n2))
    turns = [k1 / (4 * n1), torch.outer(k1 + 0.25, t2) / size]
    for n, radices in zip((n1, n2), both, strict=True):
        for index in range(len(radices) - 1):
            rest = n // math.prod(radices[:index])
            groups, factors = torch.arange(rest // radices[index]), torch.arange(1, radices[index])
            turns.append(torch.outer(groups, factors).double() / rest)
    start, *others = (torch.polar(torch.ones_like(turn), -2 * torch.pi * turn) for turn in turns)
    tables = torch.cat([table.flatten() for table in (start, start / size, *others)])
    shape = torch.tensor([n1, n2, *(number for radices in both for number in (len(radices), *radices))])
    return shape, torch.view_as_real(tables).to(dtype)


@functools.lru_cache(maxsize=256)
def _rectangle(length: int) -> tuple[int, int]:
    """``n1 <= n2`` as equal as can be, with the smallest product of at least ``length``; factors 2, 3 and 5."""
    size = max(length, 4)
    while True:
        n1 = next((n for n in range(math.isqrt(size), 1, -1) if size % n == 0), 1)
        if n1 > 1 and _smooth(size):
            return n1, size // n1
        size += 1


def _smooth(number: int) -> bool:
    for factor in (2, 3, 5):
        while number % factor == 0:
            number //= factor
    return number == 1


def _radices(number: int) -> list[int]:
    """Factors of ``number`` among 1, 2, 3, 4, 5 and 8, at least two of them."""
    radices: list[int] = []
    twos = number & -number
    while twos > 1:
        radices.append(twos if twos in (2, 4) else 4 if twos == 16 else 8)
        twos //= radices[-1]
    rest = number // math.prod(radices)
    for factor in (5, 3):
        while rest % factor == 0:
            radices.append(factor)
            rest //= factor
    return radices if len(radices) > 1 else [1, *radices]


class _TorchConvolution(torch.autograd.Function):
    """``y_k = sum_j K_j u_{k-j}``, ``K`` of shape ``(length, q, p)``.

    Per frequency the complex (q, p) matrix is applied as a real (2q, 2p) one. Real matrix products are faster than
    complex ones, and the transposed products of the backward pass need no conjugated copies.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, impulse: Tensor) -> Tensor:
        y, spectrum, matrices = _by_transforms(u, impulse)
        ctx.save_for_backward(spectrum, matrices, u, impulse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        spectrum, matrices, *signals = ctx.saved_tensors
        if twice():
            return gradients(lambda *signals: _by_transforms(*signals)[0], signals, (grad,))
        length, size = grad.shape[1], _fft_size(grad.shape[1])
        of_grad = _to_frequencies(grad, size)
        to_input = _to_time(of_grad @ matrices.transpose(1, 2), size, length)
        # Every complex entry occurs twice in its real 2x2 block, so its gradient is the sum of two (over the batch,
        # U* Y). irfft needs conj(U) Y per frequency.
        blocks = (spectrum.transpose(1, 2) @ of_grad).view(-1, spectrum.shape[2] // 2, 2, grad.shape[2], 2)
        re, im = blocks[:, :, 0, :, 0] + blocks[:, :, 1, :, 1], blocks[:, :, 0, :, 1] - blocks[:, :, 1, :, 0]
        to_impulse = torch.fft.irfft(torch.complex(re, im), n=size, dim=0)[:length]
        return to_input, to_impulse.transpose(1, 2)


def _by_transforms(u: Tensor, impulse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution, and the transforms of its arguments for the backward pass."""
    size = _fft_size(u.shape[1])
    spectrum = _to_frequencies(u, size)
    matrices = _real_matrices(torch.fft.rfft(impulse, n=size, dim=0))
    return _to_time(spectrum @ matrices, size, u.shape[1]), spectrum, matrices


def _to_frequencies(u: Tensor, size: int) -> Tensor:
    """``(batch, length, channels)`` to ``(frequencies, batch, 2 channels)``, real and imaginary parts interleaved."""
    spectrum = torch.fft.rfft(u, n=size, dim=1).permute(1, 0, 2).contiguous()
    return torch.view_as_real(spectrum).flatten(2)


def _to_time(spectrum: Tensor, size: int, length: int) -> Tensor:
    complex_spectrum = torch.view_as_complex(spectrum.unflatten(2, (-1, 2)))
    return torch.fft.irfft(complex_spectrum.permute(1, 0, 2), n=size, dim=1)[:, :length]


def _real_matrices(transfer: Tensor) -> Tensor:
    """Real matrices ``(frequencies, 2p, 2q)`` that act on interleaved rows like the complex ``(q, p)`` matrices."""
    re, im = transfer.real.transpose(1, 2), transfer.imag.transpose(1, 2)
    rows = torch.stack([torch.stack([re, im], -1), torch.stack([-im, re], -1)], 2)  # (frequencies, p, 2, q, 2)
    return rows.flatten(3).flatten(1, 2)
