"""The recovery of a checkpoint after its cut, with the uncut checkpoint as teacher; behind ``compress --recover``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressm.errors import ConfigError
from compressm.lab.one_shot_inputs import Checkpoint, read_checkpoint
from compressm.observing.inputs import calls
from compressm.training.recovery import Recovery, check_recovery, recover

Inputs = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Recover:
    """How to recover.

    Attributes:
        steps: of training, each on one batch.
        lora_rank, lr: as in `compressm.recover`.
    """

    steps: int
    lora_rank: int | None = None
    lr: float | None = None

    def check(self, model: nn.Module, batch: Any) -> None:
        """Refuse before the cut what could not be done after it; see `check_recovery`.

        Raises:
            ConfigError, MissingExtraError, UnsupportedModelError: as `check_recovery`.
        """
        check_recovery(model, next(iter(calls(model, [batch]))), self.steps, self.lora_rank)

    def run(
        self, read: Checkpoint, source: Path, build: str | None, text: Inputs, held_out: Inputs, output: Path | None
    ) -> Recovery:
        """Train the cut model of a checkpoint. A run that was killed goes on from the folder beside the output.

        Args:
            read: the cut model.
            source, build: where the uncut one is, which is opened as pages of its files where that is possible.
            text: batches to train on.
            held_out: batches to measure the perplexity on.
            output: where the model will be written; None if nowhere.
        """
        teacher = read_checkpoint(source, build)
        with read.at_work(), teacher.at_work():
            done = recover(
                read.model, teacher.model, text, steps=self.steps, lora_rank=self.lora_rank, lr=self.lr,
                held_out=held_out, folder=None if output is None else beside(output),
            )  # fmt: skip
        if teacher.mapped is not None:
            teacher.mapped.pager.close()
        return done


def wanted(data: object, steps: int | None, lora_rank: int | None, lr: float | None) -> Recover | None:
    """The recovery that options of a command ask for; None if they ask for none.

    Raises:
        ConfigError: options that belong to a recovery without one, or no text.
    """
    if steps is None:
        if (lora_rank, lr) != (None, None):
            raise ConfigError("--recover-lora and --recover-rate say how to recover: give the steps too, --recover 500")
        return None
    if data is None:
        raise ConfigError("--recover trains on text: give some by --data")
    return Recover(steps, lora_rank, lr)


def beside(output: Path) -> Path:
    """The folder of the recovery's own checkpoints, until the output is written."""
    return output.absolute().with_name(f"{output.absolute().name}.recovery")


def forget(output: Path | None) -> None:
    """Delete the recovery's checkpoints, when the output is written."""
    if output is not None:
        shutil.rmtree(beside(output), ignore_errors=True)


__all__ = ["Recover", "beside", "forget", "wanted"]
