"""compressm: train big, finish small. State space models that shrink while they train."""

from compressm.balancing import balance, truncate
from compressm.checkpoint import load, save
from compressm.compressor import Compressor
from compressm.errors import CompressmError
from compressm.filters import distil
from compressm.history import Event
from compressm.ranks import RankRule
from compressm.reduce import Report, compress
from compressm.spectrum import Spectrum, analyze
from compressm.systems import DiagonalSystem

__version__ = "0.1.0.dev1"

__all__ = [
    "CompressmError",
    "Compressor",
    "DiagonalSystem",
    "Event",
    "RankRule",
    "Report",
    "Spectrum",
    "analyze",
    "balance",
    "compress",
    "distil",
    "load",
    "save",
    "truncate",
]
