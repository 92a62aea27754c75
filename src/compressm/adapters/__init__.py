"""How to read a system out of a layer and write a smaller one back: one file per family, one registry.

Only this room knows both layers and systems.
"""

from compressm.adapters.base import Adapter, LayerChange, ParameterChange, find_layers, register
from compressm.adapters.lru import LRUAdapter

register(LRUAdapter())

__all__ = ["Adapter", "LRUAdapter", "LayerChange", "ParameterChange", "find_layers", "register"]
