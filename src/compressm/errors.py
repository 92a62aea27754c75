"""The exceptions of compressm, named by what went wrong.

Every message says what was met, what was expected and what to do about it.
"""

from __future__ import annotations


class CompressmError(Exception):
    """Base class: catching it catches every error that compressm raises on purpose."""


class InvalidSystemError(CompressmError, ValueError):
    """A state space system with wrong shapes, non-finite entries or eigenvalues outside the unit disc."""


class InvalidRankRuleError(CompressmError, ValueError):
    """A rank rule that contradicts itself or asks for something impossible."""


class UnsupportedModelError(CompressmError, TypeError):
    """A model (or a layer of it) that no adapter knows how to read."""


class UnsupportedOptimizerError(CompressmError, TypeError):
    """An optimizer whose state cannot be carried through a change of basis."""


class EvaluationError(CompressmError, RuntimeError):
    """A user's ``evaluate`` that raised, or returned something that no cut can be held against."""


class ConfigError(CompressmError, ValueError):
    """A configuration, data directory or command line that cannot be used as it is."""


class RunError(CompressmError, RuntimeError):
    """A run of a grid that ended without a result, for a reason outside of it."""


class CheckpointError(CompressmError, ValueError):
    """A checkpoint that is missing, damaged, of an unknown format, or of another model."""


class MissingExtraError(CompressmError, ImportError):
    """An optional dependency is needed; the message names the extra that installs it."""


class ExportError(CompressmError, RuntimeError):
    """A model that cannot be exported, or whose exported form computes something else."""


class DifferentiationError(CompressmError, RuntimeError):
    """A derivative that a compiled pass cannot compute; the message names the plain PyTorch path that can."""
