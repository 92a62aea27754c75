"""Model, optimizer, learning rate schedule and compressor, built from a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from compressm.errors import ConfigError, InvalidRankRuleError
from compressm.lab.config import Config, OptimizerConfig
from compressm.layers import SequenceClassifier, parameter_groups
from compressm.training.compressor import Compressor
from compressm.training.twin import TrainStep


def build_model(
    config: Config, channels: int, n_classes: int, vocabulary: int | None = None, padding: int | None = 0
) -> SequenceClassifier:
    """A model with weights drawn from torch's present random state."""
    options: dict[str, Any] = {} if vocabulary is None else {"vocabulary": vocabulary, "padding": padding}
    return SequenceClassifier(channels, n_classes, **options, **config.model.model_dump(exclude_none=True))


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """The optimizer, with the recurrences in a group of their own; torch's fused kernels where they exist."""
    groups = parameter_groups(model, config.lr, config.weight_decay, config.ssm_lr_factor)
    fused = all(p.device.type in ("cpu", "cuda") and p.dtype == torch.float32 for p in model.parameters())
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, fused=fused)


def build_scheduler(config: Config, optimizer: Optimizer) -> LambdaLR:
    """The schedule; call its ``step`` after every optimizer step."""
    return LambdaLR(optimizer, learning_rate_factor(config))


def learning_rate_factor(config: Config) -> Callable[[int], float]:
    """By which factor every group's learning rate is scaled at a step, counted from 0."""
    steps, schedule = config.run.steps, config.schedule
    if schedule.name == "constant":
        return lambda step: 1.0
    warmup, lowest = round(schedule.warmup * steps), schedule.lr_min / config.optimizer.lr

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def build_compressor(
    config: Config,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    evaluate: Callable[[nn.Module], float],
    train_step: TrainStep,
) -> Compressor | None:
    """The compressor, or None where compression is disabled. Arguments are those of `Compressor`.

    Raises:
        ConfigError: arguments that it refuses.
    """
    arguments = config.compression.model_dump()
    if not arguments.pop("enabled"):
        return None
    try:
        return Compressor(
            model, optimizer, config.run.steps,
            evaluate=evaluate, scheduler=scheduler, train_step=train_step, **arguments,
        )  # fmt: skip
    except InvalidRankRuleError as error:
        raise ConfigError(f"compression: {error}") from error


__all__ = ["build_compressor", "build_model", "build_optimizer", "build_scheduler", "learning_rate_factor"]
