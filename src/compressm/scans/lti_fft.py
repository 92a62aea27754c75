"""The LTI scan as a convolution with the whole impulse response ``K_j = Re(C lam^j B)``, by FFT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compressm.scans.lti_chunked import powers


def scan(
    u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor
) -> Tensor:
    """Outputs from zero state; see `compressm.scans.lti.lti_scan`."""
    (q, n), (length, p) = C_re.shape, u.shape[1:]
    # Re(c lam^j b) = Re(c b) Re(lam^j) - Im(c b) Im(lam^j)
    residue_re = C_re[:, None, :] * B_re.T - C_im[:, None, :] * B_im.T
    residue_im = C_re[:, None, :] * B_im.T + C_im[:, None, :] * B_re.T
    residues = torch.cat([residue_re, -residue_im], -1).view(q * p, 2 * n)
    impulse: Any = _ImpulseResponse.apply(residues, log_radius, phase, length)
    y: Any = _Convolution.apply(u, impulse.view(length, q, p))
    return y


def cost(batch: int, length: int, p: int, q: int, n: int) -> float:
    """Operations of a forward pass, weighted by the rate at which they run (a large matrix product's is 1)."""
    size = _fft_size(length)
    transforms = batch * (p + q) * 2.5 * size * math.log2(size)
    products = batch * size * 4 * p * q
    impulse = length * 4 * n * p * q
    return 10 * transforms + 3 * products + impulse


def _fft_size(length: int) -> int:
    """The smallest 2^a 3^b 5^c (b, c at most 1) that a linear convolution of two sequences of this length fits in."""
    return min(factor * 2 ** math.ceil(math.log2(max(2, (2 * length - 1) / factor))) for factor in (1, 3, 5, 15))


class _ImpulseResponse(torch.autograd.Function):
    """``K_j = residues . (Re lam^j; Im lam^j)`` for j < length, shape ``(length, outputs)``: one matrix product."""

    @staticmethod
    def forward(ctx: Any, residues: Tensor, log_radius: Tensor, phase: Tensor, length: int) -> Tensor:
        # lam^(a m + b) = lam^(a m) lam^b: two short tables instead of one long one. Products of two powers above the
        # floor 1 are above the floor 2.
        m = math.isqrt(length - 1) + 1
        steps = torch.arange(m, device=residues.device)
        coarse_re, coarse_im = powers(log_radius, phase, m * steps[: -(-length // m)], floor=1.0)
        fine_re, fine_im = powers(log_radius, phase, steps, floor=1.0)
        re = coarse_re[:, None] * fine_re - coarse_im[:, None] * fine_im
        im = coarse_re[:, None] * fine_im + coarse_im[:, None] * fine_re
        table = torch.cat([re, im], -1).view(-1, residues.shape[1])[:length]
        ctx.save_for_backward(residues, table)
        return table @ residues.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        residues, table = ctx.saved_tensors
        to_re, to_im = (grad @ residues).chunk(2, 1)
        re, im = table.chunk(2, 1)
        steps = torch.arange(table.shape[0], dtype=table.dtype, device=table.device)
        # d lam^j = j lam^j (d log_radius + i d phase)
        to_log_radius = steps @ (to_re * re + to_im * im)
        to_phase = steps @ (to_im * re - to_re * im)
        return grad.T @ table, to_log_radius, to_phase, None


class _Convolution(torch.autograd.Function):
    """``y_k = sum_j K_j u_{k-j}``, ``K`` of shape ``(length, q, p)``.

    Per frequency the complex (q, p) matrix is applied as a real (2q, 2p) one: real matrix products are the fastest that
    there are, and the transposed products of the backward pass need no conjugated copies.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, impulse: Tensor) -> Tensor:
        size = _fft_size(u.shape[1])
        spectrum = _to_frequencies(u, size)
        matrices = _real_matrices(torch.fft.rfft(impulse, n=size, dim=0))
        ctx.save_for_backward(spectrum, matrices)
        ctx.size = size
        return _to_time(spectrum @ matrices, size, u.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        spectrum, matrices = ctx.saved_tensors
        length, size = grad.shape[1], ctx.size
        of_grad = _to_frequencies(grad, size)
        to_input = _to_time(of_grad @ matrices.transpose(1, 2), size, length)
        # Every complex entry stands twice in its real 2x2 block; its gradient is that of their sum (over the batch,
        # U* Y). What irfft reads is conj(U) Y per frequency.
        blocks = (spectrum.transpose(1, 2) @ of_grad).view(-1, spectrum.shape[2] // 2, 2, grad.shape[2], 2)
        re, im = blocks[:, :, 0, :, 0] + blocks[:, :, 1, :, 1], blocks[:, :, 0, :, 1] - blocks[:, :, 1, :, 0]
        to_impulse = torch.fft.irfft(torch.complex(re, im), n=size, dim=0)[:length]
        return to_input, to_impulse.transpose(1, 2)


def _to_frequencies(u: Tensor, size: int) -> Tensor:
    """``(frequencies, batch, 2 channels)`` of ``(batch, length, channels)``; real and imaginary parts take turns."""
    spectrum = torch.fft.rfft(u, n=size, dim=1).permute(1, 0, 2).contiguous()
    return torch.view_as_real(spectrum).flatten(2)


def _to_time(spectrum: Tensor, size: int, length: int) -> Tensor:
    complex_spectrum = torch.view_as_complex(spectrum.unflatten(2, (-1, 2)))
    return torch.fft.irfft(complex_spectrum.permute(1, 0, 2), n=size, dim=1)[:, :length]


def _real_matrices(transfer: Tensor) -> Tensor:
    """Real matrices ``(frequencies, 2p, 2q)`` that do to interleaved rows what the complex ``(q, p)`` do."""
    re, im = transfer.real.transpose(1, 2), transfer.imag.transpose(1, 2)
    rows = torch.stack([torch.stack([re, im], -1), torch.stack([-im, re], -1)], 2)  # (frequencies, p, 2, q, 2)
    return rows.flatten(3).flatten(1, 2)
