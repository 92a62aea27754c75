"""Every layer, small."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from compressm.layers import (
    LRU,
    S4,
    S4D,
    S5,
    Bidirectional,
    DeltaNet,
    GatedLinearAttention,
    Hyena,
    LinearAttention,
    Mamba,
    Mamba2,
    RecurrentBlock,
)

WIDTH = 6
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lru": lambda: LRU(WIDTH, 4),
    "s5": lambda: S5(WIDTH, 4),
    "s5 bidirectional": lambda: S5(WIDTH, 4, bidirectional=True),
    "s4d": lambda: S4D(WIDTH, 4),
    "s4": lambda: S4(WIDTH, 4, max_length=64),
    "hyena": lambda: Hyena(WIDTH, max_length=64),
    "hyena of states": lambda: Hyena(WIDTH, 4),
    "mamba": lambda: Mamba(WIDTH, 4),
    "mamba2": lambda: Mamba2(WIDTH, 4, head_dim=3, n_groups=2),
    "linear attention": lambda: LinearAttention(WIDTH, 4, n_heads=2),
    "retention": lambda: LinearAttention(WIDTH, 4, n_heads=2, decay="fixed"),
    "gated linear attention": lambda: GatedLinearAttention(WIDTH, 4, n_heads=2, gate_rank=2),
    "delta net": lambda: DeltaNet(WIDTH, 4, n_heads=2),
    "gated delta net": lambda: DeltaNet(WIDTH, 4, n_heads=2, gated=True),
    "rg_lru": lambda: RecurrentBlock(WIDTH, 4, n_blocks=2),
    "bidirectional": lambda: Bidirectional(LRU(WIDTH, 4), Mamba(WIDTH, 4)),
}
