"""compressm: train big, finish small. State space models that shrink while they train."""

import compressm._moved  # noqa: F401  # former module names go on working  # pyright: ignore[reportUnusedImport]
from compressm.cutting import Report, compress
from compressm.cutting.distil import distil
from compressm.cutting.optimizer_state import register_optimizer_state
from compressm.cutting.ordering import StateOrder, sort_states
from compressm.cutting.prefixes import random_prefixes
from compressm.cutting.rounded_state import equalise_states, round_states
from compressm.cutting.spectrum import Spectrum, analyze
from compressm.cutting.system import ReducedSystem, reduce
from compressm.errors import CompressmError
from compressm.saving.checkpoint import load, save
from compressm.theory.balancing import balance, truncate
from compressm.theory.rank_rule import RankRule
from compressm.theory.systems import DiagonalSystem
from compressm.training.compressor import Compressor
from compressm.training.history import Event
from compressm.training.probe import Probe, probe
from compressm.training.recovery import Recovery, recover

__version__ = "0.1.0.dev1"

__all__ = [
    "CompressmError",
    "Compressor",
    "DiagonalSystem",
    "Event",
    "Probe",
    "RankRule",
    "Recovery",
    "ReducedSystem",
    "Report",
    "Spectrum",
    "StateOrder",
    "analyze",
    "balance",
    "compress",
    "distil",
    "equalise_states",
    "load",
    "probe",
    "random_prefixes",
    "recover",
    "reduce",
    "register_optimizer_state",
    "round_states",
    "save",
    "sort_states",
    "truncate",
]
