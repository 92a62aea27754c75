"""The result of a run, and the file that holds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressm.errors import CheckpointError
from compressm.runtime.files import finite


@dataclass(frozen=True)
class RunResult:
    """The result of a run; the content of ``result.json``.

    Attributes:
        data: name of the data set.
        config, seed, command, versions: what it was made with; ``command`` is None for runs started from Python.
        processes, device, threads: what it ran on.
        steps: optimizer steps.
        state_dims: state dimension of every layer, in the model's order.
        parameters: number of the model's parameters.
        test_accuracy: of the final model; the test data are looked at here and nowhere else.
        validation_accuracy: of the same model.
        train_seconds: in training steps and their logs, steps that were undone included.
        reduction_seconds: in the compressor, without its evaluations.
        evaluation_seconds: in evaluations, the compressor's included.
        checkpoint_seconds: in writing checkpoints.
        history: what the compressor did, as `Event.to_dict`.
        phases: the steps at every size that the model had, with the median times of one; see `clock.Phase`.
        savings: what the cuts saved, an estimate; see `clock.Savings`. None without cuts.
        curve: at every evaluation step, training loss, validation accuracy, learning rate and state dimensions.
        spectra: Hankel singular values over the steps, see `SpectrumLog`; None if they were not asked for.
        energy: codecarbon's estimate of what the training took, see `Energy`; None where it was not asked for.
    """

    data: str
    config: dict[str, Any]
    seed: int
    command: str | None
    versions: dict[str, str]
    processes: int
    device: str
    threads: int
    steps: int
    state_dims: list[int]
    parameters: int
    test_accuracy: float
    validation_accuracy: float
    train_seconds: float
    reduction_seconds: float
    evaluation_seconds: float
    checkpoint_seconds: float
    history: list[dict[str, Any]]
    phases: list[dict[str, Any]]
    savings: dict[str, Any] | None
    curve: list[dict[str, Any]]
    energy: dict[str, Any] | None = None
    spectra: list[dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, which has no word for NaN and infinity: null."""
        return finite(asdict(self))

    @classmethod
    def read(cls, path: Path) -> RunResult:
        """A result that was written before.

        Raises:
            CheckpointError: damaged.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); delete it and resume the run") from error


__all__ = ["RunResult"]
