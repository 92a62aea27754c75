"""State space layers as plain modules: they know nothing of compression."""

from compressm.layers.lru import LRU
from compressm.layers.mamba import Mamba
from compressm.layers.mamba2 import Mamba2
from compressm.layers.models import LanguageModel, LRUBlock, MambaBlock, SequenceClassifier, parameter_groups

__all__ = [
    "LRU",
    "LRUBlock",
    "LanguageModel",
    "Mamba",
    "Mamba2",
    "MambaBlock",
    "SequenceClassifier",
    "parameter_groups",
]
