"""The sections of a configuration, and the whole: what may stand in a YAML file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from compressm.cutting.carry import Carry
from compressm.cutting.choosing import EXPECTED, Which, is_which
from compressm.lab.config.data import DataConfig
from compressm.lab.config.model import ModelConfig
from compressm.lab.config.section import Section
from compressm.observing.loss_evidence import Gramians
from compressm.observing.observer import Terms
from compressm.observing.scores import Metric
from compressm.theory.balancing import Method
from compressm.theory.pruning import SCORES
from compressm.theory.selection import Selection
from compressm.theory.targets import Target
from compressm.training.cushion import OnSetback
from compressm.training.options import OPTIONS, SIZE_RULES
from compressm.training.schedule import When, cut_steps
from compressm.training.twin import Control


class OptimizerConfig(Section):
    """The optimizer. ``ssm_lr_factor`` scales the learning rate of the recurrences' parameters, which are not decayed.

    ``muon`` is Muon (Jordan et al. 2024) for the matrices outside of the recurrences, with steps as long as AdamW's,
    which trains all other parameters. ``momentum`` is that of ``sgd``; ``max_grad_norm`` clips the gradient's norm
    where given.
    """

    name: Literal["adam", "adamw", "sgd", "muon"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    ssm_lr_factor: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    max_grad_norm: float | None = Field(None, gt=0)


class ScheduleConfig(Section):
    """The learning rate over the steps: ``constant``, or ``cosine``: linear warm-up, then a cosine down to ``lr_min``.

    ``warmup`` is a share of all steps. Every parameter group follows the same curve, scaled to its own rate.
    """

    name: Literal["constant", "cosine"] = "constant"
    warmup: float = Field(0.1, ge=0, lt=1)
    lr_min: float = Field(1e-7, ge=0)


class LossConfig(Section):
    """What is minimised besides the task's own loss. Only rivals of compression need this; see `compressm.lab.rivals`.

    Attributes:
        hankel_norm: weight of the sum of all Hankel singular values of the LRU layers; null for none.
        hankel_every: add it at every such step, with so many times the weight.
        teacher: folder of a trained model from which this one learns; null for none.
        temperature, teacher_weight: of that.
    """

    hankel_norm: float | None = Field(None, gt=0)
    hankel_every: int = Field(1, ge=1)
    teacher: str | None = None
    temperature: float = Field(2.0, gt=0)
    teacher_weight: float = Field(0.5, ge=0, le=1)


def _option(name: str) -> Any:
    """A key with the default, the range and the meaning of the `Compressor`'s argument of that name."""
    option = OPTIONS[name]
    bounds: dict[str, Any] = dict(option.bounds)
    return Field(option.default, description=option.help, **bounds)


class CompressionConfig(Section):
    """Arguments of `compressm.Compressor`; see there. Unless disabled, needs one size rule or ``max_drop`` or both."""

    enabled: bool = True
    tolerance: float | None = _option("tolerance")
    states: int | None = _option("states")
    fraction: float | None = _option("fraction")
    max_error: float | None = _option("max_error")
    total_states: int | None = _option("total_states")
    max_loss: float | None = _option("max_loss")
    max_drop: float | None = _option("max_drop")
    cuts: int = _option("cuts")
    window: float = _option("window")
    start: int = _option("start")
    when: When = _option("when")
    min_reduction: float = _option("min_reduction")
    max_reduction: float | None = _option("max_reduction")
    multiple_of: int = _option("multiple_of")
    method: Method = _option("method")
    selection: Selection = _option("selection")
    per_layer: bool = _option("per_layer")
    target: Target | None = _option("target")
    gramians: Gramians = _option("gramians")
    loss_terms: Terms = _option("loss_terms")
    loss_scale: float = _option("loss_scale")
    match_steps: int = _option("match_steps")
    layers: Which | None = _option("layers")
    exclude: Which | None = _option("exclude")
    carry: Carry = _option("carry")
    check_after: int | None = _option("check_after")
    on_setback: OnSetback = _option("on_setback")
    control: Control = _option("control")

    @field_validator("layers", "exclude", mode="before")
    @classmethod
    def _which(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and not is_which(value):
            raise ValueError(f"compression.{info.field_name}|must be {EXPECTED}")
        return value

    @model_validator(mode="after")
    def _one_rule(self) -> CompressionConfig:
        given = [name for name in SIZE_RULES if getattr(self, name) is not None]
        if self.enabled and (len(given) > 1 or (not given and self.max_drop is None)):
            raise ValueError(
                f"compression|needs exactly one of {', '.join(SIZE_RULES)}, or max_drop; got "
                f"{', '.join(given) or 'none'}; compression.enabled=false trains without"
            )
        return self


class RunConfig(Section):
    """How long, how often, and where to.

    Attributes:
        steps: number of optimizer steps.
        batch_size: sequences per step, over all processes together.
        seed: of the initial weights, the order of the data, and dropout.
        output: the run's folder; by default ``runs/<name>-seed<seed>``.
        eval_every, checkpoint_every, log_every: in steps; 0 for never (evaluation always happens at the end).
        keep_checkpoints: how many of the last ones are kept; where the newest is damaged, an older one serves.
        eval_batch_size: sequences per batch in evaluation.
        spectrum_every: in steps, how often Hankel singular values are recorded (of linear time-invariant layers); 0 for
            never.
        select: which weights are the result: the ``last``, or the ``best`` on validation since the last cut.
        metric: what is measured on validation and test data beside the loss; null for the usual one: ``accuracy`` of
            classes, ``r2`` of numbers (or ``fit``, ``mse``), ``perplexity`` of language models (or ``accuracy``).
        autocast: ``bfloat16`` trains under torch's autocast to it; weights, and evaluation, stay in float32. Null
            trains in float32.
        threads: CPU threads; null leaves torch's choice.
        device: ``auto``, ``cpu`` or ``cuda``.
        tensorboard: write TensorBoard logs.
        wandb: a project of Weights & Biases to log to; null for none.
        energy: three-letter code of a country: let codecarbon estimate what the run takes, offline, and what carbon
            dioxide that means there; null for no estimate.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(50, ge=1)
    seed: int = Field(0, ge=0)
    output: str | None = None
    eval_every: int = Field(1000, ge=0)
    checkpoint_every: int = Field(1000, ge=0)
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(50, ge=0)
    spectrum_every: int = Field(0, ge=0)
    eval_batch_size: int = Field(500, ge=1)
    select: Literal["last", "best"] = "last"
    metric: Metric | None = None
    autocast: Literal["bfloat16"] | None = None
    threads: int | None = Field(None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensorboard: bool = True
    wandb: str | None = Field(None, min_length=1)
    energy: str | None = Field(None, pattern="^[A-Z]{3}$")


class Config(Section):
    """A whole training run."""

    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig.model_validate({}))
    schedule: ScheduleConfig = Field(default_factory=lambda: ScheduleConfig.model_validate({}))
    loss: LossConfig = Field(default_factory=lambda: LossConfig.model_validate({}))
    compression: CompressionConfig
    run: RunConfig

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        compression, steps = self.compression, self.run.steps
        last = cut_steps(steps, compression.cuts, compression.window, compression.start)[-1]
        if compression.enabled and last > steps:
            raise ValueError(
                f"compression.cuts|puts the last cut at step {last}, after run.steps={steps}: lower compression.cuts, "
                "compression.start or compression.window"
            )
        own = self.model.build is not None
        if not own and compression.selection in ("smallest", *SCORES) and self.model.layer not in ("lru", "s5", "s4d"):
            raise ValueError(f"compression.selection|is for layers lru, s5 and s4d, not {self.model.layer}")
        if not own and self.loss.hankel_norm is not None and self.model.layer != "lru":
            raise ValueError(f"loss.hankel_norm|is for layer lru, not {self.model.layer}")
        if self.schedule.lr_min > self.optimizer.lr:
            raise ValueError(f"schedule.lr_min|must not exceed optimizer.lr={self.optimizer.lr}")
        return self


__all__ = [
    "CompressionConfig", "Config", "LossConfig", "OptimizerConfig", "RunConfig", "ScheduleConfig",
]  # fmt: skip
