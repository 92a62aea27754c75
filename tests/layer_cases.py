"""Every layer, small."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from compressm.layers import LRU, Bidirectional, Hyena, Mamba
from compressm.layers.families import FAMILIES

WIDTH = 6
_HEADS = ("linear-attention", "retnet", "gated", "gla", "delta-net", "gated-delta-net")
_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"n_heads": 2} for name in _HEADS},
    "s4": {"max_length": 64},
    "mamba2": {"head_dim": 3, "n_groups": 2},
    "mamba3": {"head_dim": 3, "n_groups": 2, "d_state": 8},
    "gla": {"n_heads": 2, "gate_rank": 2},
    "gated-delta-net": {"n_heads": 2, "d_conv": 3},
    "rg-lru": {"n_blocks": 2},
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(make, WIDTH, **{"d_state": 4, **_OPTIONS.get(name, {})}) for name, make in FAMILIES.items()},
    "hyena of a filter": lambda: Hyena(WIDTH, max_length=64),
    "bidirectional": lambda: Bidirectional(LRU(WIDTH, 4), Mamba(WIDTH, 4)),
}
