"""Parts that several layers share: short convolutions over time, and distributions of initial parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.layers.packing import steps_since


def short_conv(conv: nn.Conv1d, u: Tensor, starts: Tensor | None = None) -> Tensor:
    """A causal depthwise convolution over time, without an activation.

    It is computed as a sum of shifted products. For a few taps this is faster on CPUs than a convolution, which would
    also need two transposed copies.

    Args:
        conv: depthwise; its last tap belongs to the present input. Its ``padding`` is ignored.
        u: shape ``(batch, length, channels)``.
        starts: True where a sequence begins, before which nothing is read, shape ``(batch, length)``; None for one
            sequence a row.
    """
    bias = u.new_zeros(u.shape[2]) if conv.bias is None else conv.bias
    since = None if starts is None else steps_since(starts)
    return shifted_products(u, conv.weight[:, 0].T, bias, since)


def shifted_products(u: Tensor, taps: Tensor, bias: Tensor, since: Tensor | None = None) -> Tensor:
    """``bias + sum_i taps_i u_{t - (m - 1) + i}`` over the m taps.

    Args:
        u: shape ``(batch, length, channels)``.
        taps: shape ``(m, channels)``, the last one for the present input.
        bias: shape ``(channels,)``.
        since: how many steps of its sequence lie before each, if a row holds several, shape ``(batch, length)``.
    """
    padded, length = F.pad(u, (0, 0, len(taps) - 1, 0)), u.shape[1]
    out = bias.expand(1, length, len(bias))
    for at, tap in enumerate(taps):
        shifted = padded[:, at : at + length]
        if since is not None:
            shifted = shifted.masked_fill((since < len(taps) - 1 - at)[..., None], 0)
        out = torch.addcmul(out, shifted, tap)
    return out


def short_conv_step(conv: nn.Conv1d, u: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """One step of `short_conv`: the output for ``u`` (batch, channels), and the next window.

    ``window`` holds the inputs before ``u``, shape ``(batch, taps - 1, channels)``.
    """
    window = torch.cat([window, u[:, None]], 1)
    out = (window * conv.weight[:, 0].T).sum(1)
    return out if conv.bias is None else out + conv.bias, window[:, 1:]


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32; float64 is unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_uniform(count: int, low: float, high: float) -> Tensor:
    """Numbers whose logarithms are uniform, shape ``(count,)``."""
    return (math.log(low) + torch.rand(count) * (math.log(high) - math.log(low))).exp()


def inverse_softplus(value: Tensor) -> Tensor:
    """``x`` with ``softplus(x) = value > 0``."""
    return value + torch.log(-torch.expm1(-value))
