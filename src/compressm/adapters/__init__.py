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

register(LRUAdapter())
register(MambaAdapter())

__all__ = [
    "Adapter",
    "LRUAdapter",
    "LayerAdapter",
    "LayerChange",
    "MambaAdapter",
    "ParameterChange",
    "SelectiveAdapter",
    "find_layers",
    "register",
]
