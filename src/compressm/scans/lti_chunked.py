"""The LTI scan in chunks: real matrix products inside chunks of T steps, a chain of states between chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.scans.chain import ChainEngine, chain, chain_engine


def scan(
    u: Tensor,
    log_radius: Tensor,
    phase: Tensor,
    B_re: Tensor,
    B_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    initial: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state; see `compressm.scans.lti.lti_scan`. ``initial`` is ``(batch, 2, n)``; ``chunk`` is T."""
    (batch, length, p), (q, n) = u.shape, C_re.shape
    engine = chain_engine(u)
    T = chunk_length(length, p, q, n, engine) if chunk is None else chunk
    chunks = -(-length // T)
    whole = length == chunks * T  # padding and slicing each cost a pass over memory, forward and backward
    inputs = (u if whole else F.pad(u, (0, 0, 0, chunks * T - length))).reshape(batch, chunks, T * p)
    power_re, power_im = powers(log_radius, phase, torch.arange(T + 1, device=u.device))
    across = torch.stack([power_re[T], power_im[T]])  # lam^T

    # Map from the input at step s to the state at the end of its chunk: lam^{T-1-s} B, as (real, imaginary).
    back_re, back_im = power_re[:T].flip(0)[:, None, :], power_im[:T].flip(0)[:, None, :]
    into = torch.cat([back_re * B_re.T - back_im * B_im.T, back_re * B_im.T + back_im * B_re.T], -1)  # (T, p, 2n)
    # Map from a state (Re x; Im x) to the output t steps later: C lam^t for t = 0..T.
    ahead_re, ahead_im = power_re[:, None, :], power_im[:, None, :]
    observe = torch.cat([ahead_re * C_re - ahead_im * C_im, -(ahead_re * C_im + ahead_im * C_re)], -1)  # (T+1, q, 2n)

    if T == 1:
        added = (inputs @ into[0]).view(batch, length, 2, n)
        states = chain(added, across, initial, engine)
        return states.view(batch, length, 2 * n) @ observe[0].T, states[:, -1]

    # Within a chunk: the block-Toeplitz matrix with K_{t-s} in block (s, t), and zero where t < s.
    kernel = observe[:T].reshape(T * q, 2 * n) @ torch.cat([B_re, B_im])
    padded = F.pad(kernel.view(T, q, p), (0, 0, 0, 0, T - 1, 0))  # index t - s + T - 1
    steps = torch.arange(T, device=u.device)
    toeplitz = padded[(steps[None, :] - steps[:, None] + T - 1).reshape(-1)]  # (s t, q, p)
    y = inputs @ toeplitz.view(T, T, q, p).permute(0, 3, 1, 2).reshape(T * p, T * q)

    # The state before every chunk is the state at the end of the previous one.
    observe = observe[1:].reshape(T * q, 2 * n).T
    before = initial[:, None]
    carried = initial.reshape(batch, 1, 2 * n) @ observe
    if chunks > 1:
        added = (inputs[:, :-1] @ into.view(T * p, 2 * n)).view(batch, chunks - 1, 2, n)
        before = chain(added, across, initial, engine)
        carried = torch.cat([carried, before.view(batch, chunks - 1, 2 * n) @ observe], 1)
    y = (y + carried).view(batch, chunks * T, q)
    y = y if whole else y[:, :length]

    rest = length - (chunks - 1) * T  # steps of the last chunk, which may be shorter
    entered = (inputs[:, -1, : rest * p] @ into[T - rest :].reshape(rest * p, 2 * n)).view(batch, 2, n)
    lam_re, lam_im = power_re[rest], power_im[rest]
    re, im = before[:, -1, 0], before[:, -1, 1]
    return y, entered + torch.stack([lam_re * re - lam_im * im, lam_re * im + lam_im * re], 1)


def powers(log_radius: Tensor, phase: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of ``lam^j``, shape ``(len(exponents), n)``, free of denormals.

    Magnitudes below the square of the dtype's precision are set to zero, since they do not change the sum of the
    geometric series. The angle is reduced modulo 2 pi in float64, since ``j * phase`` in float32 would be off by 1e-4
    radians after a thousand steps.
    """
    lowest = 2 * math.log(torch.finfo(log_radius.dtype).eps)
    log_magnitude = exponents.to(log_radius.dtype)[:, None] * log_radius.clamp_min(lowest)  # 0 * -inf would be NaN
    # The condition is false for NaN, so that NaN is kept.
    magnitude = torch.where(log_magnitude <= lowest, 0.0, log_magnitude.clamp_min(lowest).exp())
    angle = exponents.to(torch.float64)[:, None] * phase.to(torch.float64)
    angle = torch.remainder(angle, 2 * torch.pi).to(phase.dtype)
    return magnitude * angle.cos(), magnitude * angle.sin()


def chunk_length(length: int, p: int, q: int, n: int, engine: ChainEngine) -> int:
    """The T that balances the Toeplitz product (2 T p q operations a step) against the chain.

    A compiled chain moves 4 numbers per real state and link through memory, each worth about 24 operations, hence
    T = sqrt(96 n / (p q)). A chain of PyTorch calls costs some thousand operations more per link.
    """
    if engine == "graph":
        return 1  # the length is unknown during export
    ideal = math.sqrt(96 * n / (p * q)) if engine != "torch" else 4 * math.sqrt(n * (p + q) / (p * q))
    shortest = 1 if engine != "torch" else 4
    return min(length, max(shortest, min(64, 2 ** round(math.log2(ideal)))))


def cost(batch: int, length: int, p: int, q: int, n: int) -> float:
    """Operations of a forward pass: those that `chunk_length` balances, and the equivalent of the memory traffic."""
    T = chunk_length(length, p, q, n, "native")
    return batch * length * (4 * n * (p + q) + 2 * T * p * q + 192 * n / T + 50 * (p + q) + 2000)
