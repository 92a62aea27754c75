"""Peers in plain PyTorch: the scans as Python loops over time, which is how they are first written down."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from compressm.lab.bench.ours import (
    delta_rule,
    delta_tensors,
    forward_backward,
    gla_tensors,
    lti_tensors,
    selective_tensors,
    ssd_tensors,
)
from compressm.lab.bench.worker import Step
from compressm.scans import gla_scan, lti_scan, selective_scan, ssd_scan


def lti_loop(n: int, width: int, batch: int, length: int, device: str = "cpu") -> Step:
    """The recurrence of `lti_scan` step by step."""
    return forward_backward(partial(lti_scan, engine="loop"), lti_tensors(n, width, batch, length, device))


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
