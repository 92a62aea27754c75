"""Recurrences inside an exported graph (`torch.export`, ONNX): one loop node, whatever the length of the sequence.

The engines for training are compiled code, which cannot be exported, or loops, which a trace would unroll. While
`torch.export` traces, the scans therefore use the engine ``"graph"``: PyTorch's scan operator around a single step. It
becomes the ONNX operator Scan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether `torch.export` is tracing."""
    flag = getattr(torch.compiler, "is_exporting", None)  # absent before torch 2.7, which cannot export a scan anyway
    return flag is not None and flag()


def graph_scan(step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, *sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Run ``step(state, *now) -> (y, state)`` over dim 1 of the sequences.

    Args:
        step: a pure function of the state and one time step of every sequence. Captured variables are constants.
        state: shape ``(batch, ...)``.
        sequences: shape ``(batch, length, ...)``.

    Returns:
        all ``y``, shape ``(batch, length, ...)``, and the last state.
    """
    from torch._higher_order_ops.scan import scan  # a prototype in torch: imported only where an export needs it

    batch = state.shape[0]

    def combine(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        y, state = step(state, *now)
        # The operator forbids outputs that share memory. Inductor knows the sizes of the outputs by the numbers that
        # the step captures only, so the step names the batch.
        return state, y.clone().expand(batch, *y.shape[1:])

    last, y = _untyped(scan)(combine, state, tuple(sequence.transpose(0, 1) for sequence in sequences))
    return y.transpose(0, 1), last


def _untyped(function: Any) -> Any:
    return function


def triton_usable(tensor: Tensor) -> bool:
    """Whether a tensor is on a CUDA device and Triton is installed."""
    if tensor.device.type != "cuda":
        return False
    try:
        import triton  # noqa: F401  # pyright: ignore
    except ImportError:
        return False
    return True
