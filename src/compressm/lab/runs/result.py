"""The result of a run, and the file that holds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressm.errors import CheckpointError
from compressm.observing.scores import Metric
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
        test_accuracy: of the final model; the test data are looked at here and nowhere else. None where the task is
            not classification.
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
        metric: what is measured beside the loss.
        test_score, validation_score: its values for the final model; None in results from before there were several.
        test_loss, validation_loss: of the final model; None in such results.
        processor: its name; times of runs on different ones are not compared. None in results from before it was kept.
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
    test_accuracy: float | None
    validation_accuracy: float | None
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
    metric: Metric = "accuracy"
    test_score: float | None = None
    validation_score: float | None = None
    test_loss: float | None = None
    validation_loss: float | None = None
    processor: str | None = None

    @property
    def score(self) -> float:
        """The metric of the final model on the test data."""
        return float(self.test_score if self.test_score is not None else self.test_accuracy or 0.0)

    def __str__(self) -> str:
        loss = "" if self.test_loss is None else f" (loss {self.test_loss:.4f})"
        return (
            f"test {self.metric} {self.score:.4f}{loss}, states {self.state_dims}, training took "
            f"{self.train_seconds:.1f} s and reductions {self.reduction_seconds:.1f} s"
        )

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
            raise CheckpointError(
                f"{path}: damaged ({error}): no result of a run; move the file away, and go on with --resume"
            ) from error


__all__ = ["RunResult"]
