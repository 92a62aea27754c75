"""How to read a system out of a layer and write a smaller one back: one file per family, one registry.

Only this room knows both layers and systems.
"""

from compressm.adapters.base import (
    Adapter,
    LayerAdapter,
    LayerChange,
    ParameterChange,
    SelectiveAdapter,
    find_layers,
    register,
)
from compressm.adapters.lru import LRUAdapter
from compressm.adapters.mamba import MambaAdapter
from compressm.adapters.mamba2 import Mamba2Adapter

register(LRUAdapter())
register(MambaAdapter())
register(Mamba2Adapter())

__all__ = [
    "Adapter",
    "LRUAdapter",
    "LayerAdapter",
    "LayerChange",
    "Mamba2Adapter",
    "MambaAdapter",
    "ParameterChange",
    "SelectiveAdapter",
    "find_layers",
    "register",
]
