"""Model, optimizer, learning rate schedule and compressor, built from a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from compressm.cutting.metrics import Better
from compressm.cutting.optimizers import Several, Together, members_of
from compressm.errors import ConfigError, InvalidRankRuleError
from compressm.lab.config import Config, OptimizerConfig
from compressm.lab.data.sequences import SequenceData, Task
from compressm.lab.named import build_named, tried
from compressm.layers import LanguageModel, SequenceClassifier, SequenceRegressor, parameter_groups
from compressm.layers.blocks import GATED
from compressm.observing.expected import described
from compressm.observing.observer import Terms
from compressm.saving.arguments import remember_arguments
from compressm.training.compressor import Compressor
from compressm.training.twin import TrainStep

# Over what the losses of `Learning` are means, and what else they may be taken for: numbers may come at every step.
_LOSS_TERMS: dict[Task, tuple[Terms, ...]] = {
    "classification": ("sequences",),
    "language": ("tokens",),
    "regression": ("sequences", "tokens"),
}


def build_model(
    config: Config,
    channels: int,
    n_classes: int,
    vocabulary: int | None = None,
    padding: int | None = 0,
    task: Task = "classification",
    per_step: bool = False,
    states: int | None = None,
    class_names: Sequence[str] | None = None,
) -> nn.Module:
    """A model with weights drawn from torch's present random state; for the arguments see `SequenceData`.

    Args:
        states: offered to the function that ``model.build`` names; layers of ours take ``model.d_state``.
        class_names: offered to that function too, and saved with the model, whatever builds it.

    Raises:
        ConfigError: ``model.build`` names no function that returns a model, or the layer is none of language models.
    """
    named = {} if class_names is None else {"class_names": list(class_names)}
    if config.model.build is not None:
        offered = {"d_input": channels, "n_classes": n_classes, "d_output": n_classes, "vocabulary": vocabulary}
        offered |= {} if states is None else {"states": states}
        return build_named(config.model.build, "model.build =", offered | named)
    options: dict[str, Any] = {} if vocabulary is None else {"vocabulary": vocabulary, "padding": padding}
    arguments = config.model.model_dump(exclude={"build"}, exclude_none=True)
    if task == "regression":
        return SequenceRegressor(channels, n_classes, per_step=per_step, **options, **arguments)
    if task == "classification":
        classifier = SequenceClassifier(channels, n_classes, **options, **arguments)
        if named:
            remember_arguments(classifier, named)
        return classifier
    if config.model.layer not in GATED:
        raise ConfigError(
            f"model.layer = {config.model.layer!r}: language models here have one of {', '.join(sorted(GATED))}"
        )
    if arguments.pop("norm", "rms") != "rms":
        raise ConfigError(f"model.norm = {config.model.norm!r}: language models have rms; leave it out")
    return LanguageModel(n_classes, padding=padding, **arguments)


def model_for(config: Config, data: SequenceData, states: int | None = None) -> nn.Module:
    """A model for these data; one of the user's is tried on two sequences, and built with this many states if it lets
    one choose.

    Raises:
        ConfigError: ``model.build`` names no function that returns a model for these sequences.
    """
    about = (data.channels, data.n_classes, data.vocabulary, data.padding, data.task, data.per_step)
    model = build_model(config, *about, states, data.class_names)
    if config.model.build is not None:
        _check_fits(model, data, config.model.build)
    return model


def _check_fits(model: nn.Module, data: SequenceData, build: str) -> None:
    """Call a model of the user's on two sequences."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    indices = torch.arange(min(2, len(data.train)), device=data.train.y.device)
    u, lengths = data.batch(data.train, indices)[0].to(device), data.lengths(data.train, indices)
    takes = f"model.build = {build!r}: {type(model).__name__}"
    logits = tried(
        model,
        lambda one: one(u) if lengths is None else one(u, lengths.to(device)),
        f"{takes} cannot be called with {described(u)}{'' if lengths is None else ' and lengths'}",
    )
    steps = (u.shape[1],) if data.per_step or data.task == "language" else ()
    expected = (len(u), *steps, data.n_classes)
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
        what = {
            "classification": "logits of shape {}, one for each class of the data",
            "regression": "numbers of shape {}, as the data's",
            "language": "logits of shape {}, one for each byte at each step",
        }[data.task].format(expected)
        raise ConfigError(f"{takes} returned {described(logits)} for {len(u)} sequences: expected {what}")


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer | Together:
    """The optimizer, with the recurrences in a group of their own; torch's fused kernels where they exist."""
    groups = parameter_groups(model, config.lr, config.weight_decay, config.ssm_lr_factor)
    fused = all(p.device.type in ("cpu", "cuda") and p.dtype == torch.float32 for p in model.parameters())
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    if config.name == "muon":
        matrices, others = _matrices_apart(groups)
        muon = torch.optim.Muon(matrices, lr=config.lr, adjust_lr_fn="match_rms_adamw")
        return Together([torch.optim.AdamW(others, lr=config.lr, fused=fused), muon]) if others else muon
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, fused=fused)


def _matrices_apart(groups: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The decayed real matrices, for which Muon is, and all other parameters.

    Those of more axes that are decayed too, such as the taps of convolutions, get a group of their own, ``"kernels"``.

    Raises:
        ConfigError: there are no such matrices.
    """
    matrices, others = list[dict[str, Any]](), list[dict[str, Any]]()
    for group in groups:
        fit = [one for one in group["params"] if group["name"] == "decay" and one.ndim == 2 and not one.is_complex()]
        known = {id(one) for one in fit}
        rest = [one for one in group["params"] if id(one) not in known]
        matrices += [{**group, "params": fit}] if fit else []
        name = "kernels" if group["name"] == "decay" else group["name"]
        others += [{**group, "name": name, "params": rest}] if rest else []
    if not matrices:
        raise ConfigError("optimizer.name = 'muon': the model has no weight matrix, and Muon is for these; use adamw")
    return matrices, others


def build_scheduler(config: Config, optimizer: Optimizer | Together) -> LambdaLR | Several:
    """The schedule; call its ``step`` after every optimizer step."""
    made = [LambdaLR(member, learning_rate_factor(config)) for member in members_of(optimizer)]
    return made[0] if len(made) == 1 else Several(made)


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
    optimizer: Optimizer | Together,
    scheduler: Any,
    evaluate: Callable[[nn.Module], float],
    train_step: TrainStep,
    mode: Better = "max",
    task: Task = "classification",
) -> Compressor | None:
    """The compressor, or None where compression is disabled. Arguments are those of `Compressor`.

    Raises:
        ConfigError: arguments that it refuses, or ``loss_terms`` that are not those of the task's loss.
    """
    arguments = config.compression.model_dump()
    if not arguments.pop("enabled"):
        return None
    if "loss_terms" not in config.compression.model_fields_set:
        arguments["loss_terms"] = _LOSS_TERMS[task][0]
    elif arguments["loss_terms"] not in _LOSS_TERMS[task] and arguments["gramians"] == "loss":
        raise ConfigError(
            f"compression.loss_terms = {arguments['loss_terms']!r}: the task is {task}, whose loss is the mean over "
            f"its {_LOSS_TERMS[task][0]}; leave it out"
        )
    try:
        return Compressor(
            model, optimizer, config.run.steps,
            evaluate=evaluate, mode=mode, scheduler=scheduler, train_step=train_step, **arguments,
        )  # fmt: skip
    except InvalidRankRuleError as error:
        raise ConfigError(f"compression: {error}") from error


__all__ = ["build_compressor", "build_model", "build_optimizer", "build_scheduler", "learning_rate_factor", "model_for"]
