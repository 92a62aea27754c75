"""States and adjoint states of linear layers, from a layer's input and the gradient at its output.

    x_t = lam x_{t-1} + B u_t,    y_t = Re(C x_t) + D u_t,    lambda_t = conj(lam) lambda_{t+1} + C^H g_t

with ``g_t = d loss / d y_t``. The recurrence run backwards gives ``lambda_t = d loss / d x_t``, stacked as ``(Re x, Im
x)``. The feedthrough does not contribute to it, so the gradient at the layer's output is sufficient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressm.layers.padding import reverse
from compressm.scans.chain import chain, chain_engine
from compressm.theory.evidence import Covariances, white_scales
from compressm.theory.systems import DiagonalSystem

# Largest number of entries in one tensor of states: 16 MB of float32.
_BLOCK = 2**22


@dataclass(frozen=True)
class Reading:
    """One run of a layer's recurrence over a batch of sequences.

    Attributes:
        u: input, shape ``(batch, length, p)``; one channel per system where the system is a batch of them.
        g: gradient of each sequence's own loss at the output, shape ``(batch, length, q)``.
        C: output matrix of this run, complex, shape ``(*systems, q, n)``.
        present: 1 for tokens and 0 for padding, shape ``(batch, length)``; None for no padding.
    """

    u: Tensor
    g: Tensor
    C: Tensor
    present: Tensor | None


def readings(
    layer: nn.Module,
    system: DiagonalSystem,
    u: Tensor,
    g: Tensor,
    present: Tensor | None,
    lengths: Tensor | None = None,
) -> list[Reading]:
    """The runs of a layer's recurrence: one, or one in each direction of time.

    The system of a layer with two directions has the outputs of both stacked, each times the root of 2 (see
    `adapters.s5`).

    Args:
        layer: an `LRU`, `S5`, `S4D`, or any other layer whose adapter reads a `DiagonalSystem`.
        system: the system that the adapter reads.
        u, g, present: as in `Reading`, for the layer's input and output.
        lengths: lengths of the sequences, within which a layer with two directions reversed each one, shape
            ``(batch,)``; None for the whole row.
    """
    module: Any = layer
    if not getattr(module, "bidirectional", False):
        return [Reading(u, g, system.C, present)]
    forwards, backwards = (system.C / math.sqrt(2)).chunk(2, -2)
    lengths = None if lengths is None else lengths.to(u.device)
    reversed_present = None if present is None else reverse(present[..., None], lengths)[..., 0]
    turned = Reading(reverse(u, lengths), reverse(g, lengths), backwards, reversed_present)
    return [Reading(u, g, forwards, present), turned]


@torch.no_grad()
def covariances(system: DiagonalSystem, reading: Reading, first: bool = True) -> Covariances:
    """Second moments of the states and adjoint states of one run.

    Args:
        system: gives ``lam`` and B; C is the reading's.
        reading: the run.
        first: whether it is the first run over these sequences. Later runs add tokens, but no sequences.
    """
    batch, length = reading.u.shape[:2]
    states, adjoints = _nothing(system), _nothing(system)
    spreads = [torch.zeros(system.batch_shape, dtype=torch.float64) for _ in range(2)]
    scales = white_scales(system)
    for block in _blocks(reading, system.lam.numel()):
        both = run(system.lam, system.B, block.u), run(system.lam.conj(), block.C.mH, block.g.flip(1)).flip(1)
        for index, (total, x) in enumerate(zip((states, adjoints), both, strict=True)):
            moment, spread = _moments(_stacked(x, block.present, system.lam.ndim > 1), scales[index].to(x))
            total += moment
            spreads[index] += spread
    tokens = float(batch * length if reading.present is None else reading.present.sum())
    count = torch.tensor(float(batch if first else 0), dtype=torch.float64)
    return Covariances(torch.tensor(tokens, dtype=torch.float64), count, count, states, adjoints, *spreads)


def _blocks(reading: Reading, states: int) -> Iterator[Reading]:
    """The reading split into a few sequences at a time, since states take much more memory than inputs."""
    batch, length = reading.u.shape[:2]
    size = max(1, _BLOCK // (2 * states * length))
    for start in range(0, batch, size):
        part = slice(start, start + size)
        present = None if reading.present is None else reading.present[part]
        yield Reading(reading.u[part], reading.g[part], reading.C, present)


def run(lam: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """All states of ``x_t = lam x_{t-1} + B u_t``.

    Args:
        lam: complex, shape ``(n,)``, or ``(systems, n)``, where every system reads one channel.
        B: complex, shape ``(n, p)``, or ``(systems, n, 1)``.
        u: shape ``(batch, length, p)``, or ``(batch, length, systems)``.

    Returns:
        real and imaginary part, shape ``(batch, length, 2, n)``, or ``(batch, length, 2, systems, n)``.
    """
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    parts = [part.to(u) for part in (B.real, B.imag)]
    if lam.ndim == 1:
        driven = torch.stack([u @ part.mT for part in parts], 2)
    else:
        driven = torch.stack([u[..., None] * part[..., 0] for part in parts], 2).flatten(3)
    poles = torch.stack([lam.real.flatten(), lam.imag.flatten()]).to(u)
    start = driven.new_zeros(driven.shape[0], *driven.shape[2:])
    x = chain(driven.contiguous(), poles, start, chain_engine(driven))
    return x if lam.ndim == 1 else x.unflatten(3, lam.shape)


def _stacked(x: Tensor, present: Tensor | None, systems: bool) -> Tensor:
    """States ``(Re x, Im x)``, zero at padding, shape ``(batch, length, 2n)``, or ``(systems, batch, length, 2n)``."""
    if present is not None:
        x = x * present.to(x).reshape(*present.shape, *(1,) * (x.ndim - 2))
    return x.permute(3, 0, 1, 2, 4).flatten(3) if systems else x.flatten(2)


def _moments(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_t x_t x_t^T``, and ``sum over sequences of ||sum_t x_t x_t^T||_F^2`` of the states divided by their scale.

    The latter takes whichever Gram matrix of a sequence is smaller.

    Args:
        x: shape ``(*systems, batch, length, 2n)``.
        scale: shape ``(*systems, 2n)``.
    """
    if x.shape[-2] < x.shape[-1]:
        tokens, scaled = x.flatten(-3, -2), x / scale[..., None, None, :]
        moment, grams = tokens.mT @ tokens, scaled @ scaled.mT
    else:
        each = x.mT @ x
        moment = each.sum(-3, dtype=torch.float64)
        grams = each / (scale[..., :, None] * scale[..., None, :])[..., None, :, :]
    spread = grams.square().sum((-2, -1)).sum(-1, dtype=torch.float64)
    return moment.to("cpu", torch.float64), spread.cpu()


def _nothing(system: DiagonalSystem) -> Tensor:
    return torch.zeros(*system.batch_shape, 2 * system.n, 2 * system.n, dtype=torch.float64)


__all__ = ["Reading", "covariances", "readings", "run"]
