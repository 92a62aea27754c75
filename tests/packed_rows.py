"""Rows of several sequences, the layers that keep them apart, and the sequences one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compressm.layers import DeltaNet, GatedLinearAttention, LinearAttention, Mamba, Mamba2

LENGTHS = ((5, 1, 2, 12), (20,))
SEQ_IDX = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS])
LAYERS: dict[str, Callable[[], Any]] = {
    "mamba": lambda: Mamba(8, 4),
    "mamba2": lambda: Mamba2(8, 4, head_dim=4),
    "linear-attention": lambda: LinearAttention(8, 4, n_heads=2),
    "gla": lambda: GatedLinearAttention(8, 4, n_heads=2),
    "linear-attention with a convolution": lambda: LinearAttention(8, 4, n_heads=2, d_conv=4),
    "gated-delta-net": lambda: DeltaNet(8, 4, n_heads=2, gated=True),
}


def alone(rows: Tensor) -> list[list[Tensor]]:
    return [list(row[None].split(lengths, 1)) for row, lengths in zip(rows, LENGTHS, strict=True)]
