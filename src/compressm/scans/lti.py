"""The scan of a diagonal linear time-invariant system with several inputs and outputs.

    x_k = diag(lam) x_{k-1} + B u_k,   y_k = Re(C x_k),   lam = exp(log_radius + i phase),   x_{-1} = 0

The ``chunked`` engine computes it without ever holding the states (batch x length x n): inside chunks of T steps the
system is one block-Toeplitz matrix of the impulse response ``K_j = Re(C diag(lam)^j B)``, ``j < T``; chunk-end states
are chained by a recurrence over length / T steps and return through ``C lam^{t+1}``. Everything large is a real
matrix product. (Convolution with the whole kernel by FFT was measured too, at
width 8 and length 784, and was slower.)

The ``loop`` engine is the definition written down: for tests and as documentation.

Powers of ``lam`` that no longer count are set to exactly zero (see `_powers`): left alone they sink into denormal
floats, which slow a CPU twentyfold.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Engine = Literal["chunked", "loop"]


def lti_scan(
    u: Tensor,
    log_radius: Tensor,
    phase: Tensor,
    B_re: Tensor,
    B_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    engine: Engine = "chunked",
) -> Tensor:
    """Run the system over a batch of sequences; differentiable in every tensor argument.

    Args:
        u: real input, shape ``(batch, length, p)``, float32 or float64.
        log_radius: ``log |lam|``, negative, shape ``(n,)``.
        phase: ``arg lam`` in radians, shape ``(n,)``.
        B_re, B_im: input matrix, shape ``(n, p)``.
        C_re, C_im: output matrix, shape ``(q, n)``.
        engine: ``"chunked"`` or, for reference, ``"loop"``.

    Returns:
        ``y``, real, shape ``(batch, length, q)``, of the dtype of ``u``.

    Raises:
        ValueError: an unknown engine.
    """
    if engine == "chunked":
        return _chunked(u, log_radius, phase, B_re, B_im, C_re, C_im)
    if engine == "loop":
        return _loop(u, log_radius, phase, B_re, B_im, C_re, C_im)
    raise ValueError(f"engine must be 'chunked' or 'loop'; got {engine!r}")


def _powers(log_radius: Tensor, phase: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of ``lam^j``, shape ``(len(exponents), n)``, free of denormals.

    Magnitudes below the square of the dtype's precision are exactly zero: relative to the first terms of the same
    geometric series they are far beyond its last digit. The angle is reduced modulo 2 pi in float64, since ``j *
    phase`` in float32 would be off by 1e-4 radians after a thousand steps.
    """
    floor = 2.0 * math.log(torch.finfo(log_radius.dtype).eps)
    log_magnitude = exponents.to(log_radius.dtype)[:, None] * log_radius
    magnitude = torch.where(log_magnitude > floor, log_magnitude.clamp_min(floor).exp(), 0.0)
    angle = exponents.to(torch.float64)[:, None] * phase.to(torch.float64)
    angle = torch.remainder(angle, 2 * torch.pi).to(phase.dtype)
    return magnitude * angle.cos(), magnitude * angle.sin()


def _chunked(
    u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor
) -> Tensor:
    (batch, length, p), (q, n) = u.shape, C_re.shape
    chunk = _chunk_length(p, q, n, length)
    chunks = -(-length // chunk)
    inputs = F.pad(u, (0, 0, 0, chunks * chunk - length)).reshape(batch, chunks, chunk * p)
    power_re, power_im = _powers(log_radius, phase, torch.arange(chunk + 1, device=u.device))

    # C lam^t for t = 0..T as real matrices: times (Re x, Im x) they give the outputs of a state t steps later.
    ahead_re, ahead_im = power_re[:, None, :], power_im[:, None, :]
    observe = torch.stack([ahead_re * C_re - ahead_im * C_im, -(ahead_re * C_im + ahead_im * C_re)], -1)
    observe = observe.reshape(chunk + 1, q, 2 * n)

    # Within a chunk: the block-Toeplitz matrix with K_{t-s} in block (s, t), and zero where t < s.
    kernel = observe[:chunk].reshape(chunk * q, 2 * n) @ torch.stack([B_re, B_im], 1).reshape(2 * n, p)
    padded = F.pad(kernel.view(chunk, q, p), (0, 0, 0, 0, chunk - 1, 0))  # index t - s + chunk - 1
    steps = torch.arange(chunk, device=u.device)
    toeplitz = padded[(steps[None, :] - steps[:, None] + chunk - 1).reshape(-1)]  # (s t, q, p)
    toeplitz = toeplitz.view(chunk, chunk, q, p).permute(0, 3, 1, 2).reshape(chunk * p, chunk * q)
    y = inputs @ toeplitz

    if chunks > 1:
        # What each chunk adds to the state at its end: sum_s lam^{T-1-s} B u_s.
        back_re, back_im = power_re[:chunk].flip(0)[:, None, :], power_im[:chunk].flip(0)[:, None, :]
        into = torch.stack([back_re * B_re.T - back_im * B_im.T, back_re * B_im.T + back_im * B_re.T], -1)
        added = (inputs[:, :-1] @ into.reshape(chunk * p, 2 * n)).view(batch, chunks - 1, n, 2)
        across = torch.stack([power_re[chunk], power_im[chunk]], -1)  # lam^T
        # Autocast makes the products half precision; states are summed over the whole sequence: as precise as lam.
        states = _Chain.apply(added.to(across.dtype), across)
        carried = states.reshape(batch, chunks - 1, 2 * n) @ observe[1:].reshape(chunk * q, 2 * n).T
        y = y + F.pad(carried, (0, 0, 1, 0))
    return y.reshape(batch, chunks * chunk, q)[:, :length]


def _chunk_length(p: int, q: int, n: int, length: int) -> int:
    """Balances the Toeplitz product (T p q per step) against going through the states (2 n (p + q) / T per step)."""
    ideal = 4 * math.sqrt(n * (p + q) / (p * q))
    return min(length, max(4, min(64, 2 ** round(math.log2(ideal)))))


class _Chain(torch.autograd.Function):
    """``s_m = lam s_{m-1} + v_m`` along dim 1 of ``v`` (batch, m, n, 2), with ``lam`` (n, 2); the last dim holds real
    and imaginary part. Backward is the same recurrence reversed.

    Its arguments are real since Dynamo cannot trace an `autograd.Function` of complex ones."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, lam: Tensor) -> Tensor:
        ctx.save_for_backward(states := _chain(v, torch.view_as_complex(lam)), lam)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, lam = ctx.saved_tensors
        adjoint = _chain(grad.flip(1), torch.view_as_complex(lam).conj().resolve_conj()).flip(1)
        product = torch.view_as_complex(adjoint[:, 1:]) * torch.view_as_complex(states[:, :-1]).conj()
        return adjoint, torch.view_as_real(product.sum((0, 1)))


def _chain(v: Tensor, lam: Tensor) -> Tensor:
    inputs = torch.view_as_complex(v.contiguous())
    states = [inputs[:, 0]]
    for m in range(1, v.shape[1]):
        states.append(torch.addcmul(inputs[:, m], lam, states[-1]))
    return torch.view_as_real(torch.stack(states, 1))


def _loop(
    u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor
) -> Tensor:
    radius = log_radius.exp()
    lam_re, lam_im = radius * phase.cos(), radius * phase.sin()
    re = im = u.new_zeros(u.shape[0], log_radius.shape[0])
    outputs = []
    for k in range(u.shape[1]):
        re, im = (
            lam_re * re - lam_im * im + u[:, k] @ B_re.T,
            lam_re * im + lam_im * re + u[:, k] @ B_im.T,
        )
        outputs.append(re @ C_re.T - im @ C_im.T)
    return torch.stack(outputs, 1)
