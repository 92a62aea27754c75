"""State space layers as plain modules: they know nothing of compression."""

from compressm.layers.linear_attention import LinearAttention
from compressm.layers.lru import LRU
from compressm.layers.mamba import Mamba
from compressm.layers.mamba2 import Mamba2
from compressm.layers.models import (
    LanguageModel,
    LRUBlock,
    ResidualBlock,
    S5Block,
    SequenceClassifier,
    parameter_groups,
)
from compressm.layers.s5 import S5

__all__ = [
    "LRU",
    "S5",
    "LRUBlock",
    "LanguageModel",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "ResidualBlock",
    "S5Block",
    "SequenceClassifier",
    "parameter_groups",
]
