"""State space layers as plain modules. They do not depend on the code that compresses them."""

from compressm.layers.bidirectional import Bidirectional
from compressm.layers.hyena import Convolution, Hyena, LongConvolution
from compressm.layers.linear_attention import DeltaNet, GatedLinearAttention, LinearAttention
from compressm.layers.lru import LRU
from compressm.layers.mamba import Mamba
from compressm.layers.mamba2 import Mamba2
from compressm.layers.mamba3 import Mamba3
from compressm.layers.models import (
    GLUBlock,
    LanguageModel,
    ResidualBlock,
    SequenceClassifier,
    parameter_groups,
)
from compressm.layers.regressor import SequenceRegressor
from compressm.layers.rg_lru import RecurrentBlock
from compressm.layers.s4 import S4
from compressm.layers.s4d import S4D
from compressm.layers.s5 import S5

__all__ = [
    "LRU",
    "S4",
    "S4D",
    "S5",
    "Bidirectional",
    "Convolution",
    "DeltaNet",
    "GLUBlock",
    "GatedLinearAttention",
    "Hyena",
    "LanguageModel",
    "LinearAttention",
    "LongConvolution",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "RecurrentBlock",
    "ResidualBlock",
    "SequenceClassifier",
    "SequenceRegressor",
    "parameter_groups",
]
