"""The loss that training minimises: cross entropy. Rivals of compression add a teacher's opinion or a penalty."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.errors import CompressmError, ConfigError
from compressm.lab.config import LossConfig
from compressm.lab.rivals.distillation import distillation_loss
from compressm.lab.rivals.hankel_norm import hankel_penalty
from compressm.saving.checkpoint import load


class Objective:
    """The loss of a batch.

    Args:
        config: see there.
        device: where the model is.

    Raises:
        ConfigError: no model where the teacher should be.
    """

    def __init__(self, config: LossConfig, device: torch.device) -> None:
        self.config = config
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
        inputs = (u,) if lengths is None else (u, lengths)
        config, logits = self.config, model(*inputs)
        if self.teacher is None:
            loss = F.cross_entropy(logits, y)
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
