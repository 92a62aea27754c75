"""The loss that training minimises, by the task. Rivals of compression add a teacher's opinion or a penalty."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from compressm.errors import CompressmError, ConfigError
from compressm.lab.config import LossConfig
from compressm.lab.rivals.distillation import distillation_loss
from compressm.lab.rivals.hankel_norm import hankel_penalty
from compressm.lab.runs.tasks import Learning, learning_of
from compressm.saving.checkpoint import load


class Objective:
    """The loss of a batch.

    Args:
        config: see there.
        device: where the model is.
        learning: the task; classification by default.
        autocast: compute it under torch's autocast to this dtype; None for the weights' own.

    Raises:
        ConfigError: no model where the teacher should be, or a teacher of another task.
    """

    def __init__(
        self,
        config: LossConfig,
        device: torch.device,
        learning: Learning | None = None,
        autocast: Literal["bfloat16"] | None = None,
    ) -> None:
        self.config, self.learning = config, learning or learning_of("classification", None)
        self.autocast = autocast is not None
        if config.teacher is not None and self.learning.metric != "accuracy":
            raise ConfigError(f"loss.teacher = {config.teacher!r}: is for classifiers; leave it out for this task")
        self.teacher: nn.Module | None = None
        if config.teacher is not None:
            try:
                self.teacher = load(Path(config.teacher)).to(device).eval().requires_grad_(False)
            except (CompressmError, OSError) as error:
                raise ConfigError(
                    f"loss.teacher = {config.teacher!r}: no model there ({error}); name the model/ of a finished run"
                ) from error

    def __call__(self, model: nn.Module, u: Tensor, y: Tensor, step: int, lengths: Tensor | None = None) -> Tensor:
        """The loss of sequences ``u``, of these lengths where they are padded, with labels ``y`` at a step, counted
        from 0."""
        with torch.autocast(u.device.type, torch.bfloat16, enabled=self.autocast):
            return self._loss(model, u, y, step, lengths)

    def _loss(self, model: nn.Module, u: Tensor, y: Tensor, step: int, lengths: Tensor | None) -> Tensor:
        inputs = (u,) if lengths is None else (u, lengths)
        config, logits = self.config, model(*inputs)
        if self.teacher is None:
            loss = self.learning.loss(logits, y, lengths)
        else:
            with torch.no_grad():
                opinion = self.teacher(*inputs)
            if opinion.shape != logits.shape:
                raise ConfigError(
                    f"loss.teacher = {config.teacher!r}: gives {opinion.shape[-1]} logits, the model "
                    f"{logits.shape[-1]}; choose a teacher that was trained on the same data"
                )
            loss = distillation_loss(logits, opinion, y, config.temperature, config.teacher_weight)
        if config.hankel_norm is not None and step % config.hankel_every == 0:
            loss = loss + config.hankel_every * config.hankel_norm * hankel_penalty(model)
        return loss


__all__ = ["Objective"]
