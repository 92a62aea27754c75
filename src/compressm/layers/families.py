"""Every family of layers by its short name, for tables, tests and benchmarks that go through all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from compressm.layers.hyena import Hyena
from compressm.layers.linear_attention import DeltaNet, GatedLinearAttention, LinearAttention
from compressm.layers.lru import LRU
from compressm.layers.mamba import Mamba
from compressm.layers.mamba2 import Mamba2
from compressm.layers.mamba3 import Mamba3
from compressm.layers.rg_lru import RecurrentBlock
from compressm.layers.s4 import S4
from compressm.layers.s4d import S4D
from compressm.layers.s5 import S5

# From width and number of states; further options are the layer's own.
FAMILIES: dict[str, Callable[..., Any]] = {
    "lru": LRU,
    "s5": S5,
    "s5-both": partial(S5, bidirectional=True),
    "s4d": S4D,
    "s4": S4,
    "hyena": Hyena,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "linear-attention": partial(LinearAttention, decay="none"),
    "retnet": partial(LinearAttention, decay="fixed"),
    "gated": partial(LinearAttention, decay="gated"),
    "gla": GatedLinearAttention,
    "delta-net": DeltaNet,
    "gated-delta-net": partial(DeltaNet, gated=True),
    "rg-lru": RecurrentBlock,
}
