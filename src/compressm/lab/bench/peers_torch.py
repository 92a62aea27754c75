"""Peers in plain PyTorch: the scans as Python loops over time, which is how they are first written down, and the
convolutions as S4D's authors and PyTorch's own operator compute them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.lab.bench.ours import (
    convolution_tensors,
    delta_rule,
    delta_tensors,
    forward_backward,
    gla_tensors,
    lti_tensors,
    selective_tensors,
    siso_tensors,
    ssd_tensors,
)
from compressm.lab.bench.worker import Step
from compressm.scans import gla_scan, lti_scan, selective_scan, siso_scan, ssd_scan


def lti_loop(n: int, width: int, batch: int, length: int, device: str = "cpu") -> Step:
    """The recurrence of `lti_scan` step by step."""
    return forward_backward(partial(lti_scan, engine="loop"), lti_tensors(n, width, batch, length, device))


def siso_loop(n: int, d: int, batch: int, length: int, device: str = "cpu") -> Step:
    """The recurrence of `siso_scan` step by step."""
    return forward_backward(partial(siso_scan, engine="loop"), siso_tensors(n, d, batch, length, device))


def siso_fft(n: int, d: int, batch: int, length: int, device: str = "cpu") -> Step:
    """S4D as published: the whole kernel ``Re(sum_i c_i lam_i^k)``, and a convolution by FFT."""

    def scan(u: Tensor, log_radius: Tensor, phase: Tensor, c_re: Tensor, c_im: Tensor) -> Tensor:
        powers = torch.exp(torch.complex(log_radius, phase)[..., None] * torch.arange(length, device=u.device))
        kernel = (torch.complex(c_re, c_im)[..., None] * powers).real.sum(1).T  # (length, d)
        spectrum = torch.fft.rfft(u, 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, dim=0)
        return torch.fft.irfft(spectrum, 2 * length, dim=1)[:, :length]

    return forward_backward(scan, siso_tensors(n, d, batch, length, device))


def convolution_direct(d: int, batch: int, length: int, device: str = "cpu") -> Step:
    """A long convolution by PyTorch's own operator, one filter per channel."""

    def direct(u: Tensor, taps: Tensor) -> Tensor:
        padded = F.pad(u.mT, (length - 1, 0))
        return F.conv1d(padded, taps.T[:, None].flip(-1), groups=d).mT

    return forward_backward(direct, convolution_tensors(d, batch, length, device))


def selective_loop(n: int, d: int, batch: int, length: int, device: str = "cpu") -> Step:
    """The recurrence of `selective_scan` step by step."""
    return forward_backward(partial(selective_scan, engine="loop"), selective_tensors(n, d, batch, length, device))


def ssd_loop(n: int, heads: int, p: int, batch: int, length: int, device: str = "cpu") -> Step:
    """The recurrence of `ssd_scan` step by step."""

    def loop(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return ssd_scan(delta[..., None] * x, delta * A, B, C, engine="loop")

    return forward_backward(loop, ssd_tensors(n, heads, p, batch, length, device))


def gla_loop(n: int, heads: int, p: int, batch: int, length: int, device: str = "cpu") -> Step:
    """The recurrence of `gla_scan` step by step."""
    return forward_backward(partial(gla_scan, engine="loop"), gla_tensors(n, heads, p, batch, length, device))


def delta_loop(n: int, heads: int, p: int, batch: int, length: int, gated: bool, device: str = "cpu") -> Step:
    """The recurrence of `delta_scan` step by step."""
    tensors = delta_tensors(n, heads, p, batch, length, gated, device)
    return forward_backward(partial(delta_rule, engine="loop"), tensors)
