"""The configuration of a training run: what may stand in a YAML file, and how it is read."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from compressm.cutting.carry import Carry
from compressm.cutting.choosing import EXPECTED, Which, is_which
from compressm.errors import ConfigError
from compressm.observing.loss_evidence import Gramians
from compressm.observing.observer import Terms
from compressm.theory.balancing import Method
from compressm.theory.pruning import SCORES
from compressm.theory.selection import Selection
from compressm.theory.targets import Target
from compressm.training.cushion import OnSetback
from compressm.training.options import OPTIONS, SIZE_RULES
from compressm.training.schedule import When, cut_steps
from compressm.training.twin import Control

_LARGEST_FILE = 1 << 20  # bytes
# The configuration around a model and data of the user's, which must be given with it.
OWN = Path(__file__).with_name("own.yaml")


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, and values are not coerced from other types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which data, and where they are.

    Attributes:
        name: ``digits`` (comes with scikit-learn), ``smnist``, ``psmnist``, ``scifar``, ``imdb`` or ``listops``
            (generated).
        source: data of your own instead: ``package.module:function``, a file or a folder; see docs/own.md.
        root: the directory with the files, where any are needed; by default that in the environment variable
            ``COMPRESSM_DATA``.
        validation: share of the training data that is held out for validation.
        pool: average square blocks of so many pixels a side, for shorter sequences: 2 makes MNIST's 784 steps 196.
        max_length: of ``imdb`` and ``listops``: longer reviews are cut off (default: 4096); expressions have a quarter
            to all of so many tokens (2000).
        examples: of ``listops``: how many for training (96,000); 2000 each are for validation and test.
    """

    name: Literal["digits", "smnist", "psmnist", "scifar", "imdb", "listops"] | None = None
    root: str | None = None
    validation: float = Field(0.1, gt=0, lt=1)
    pool: Literal[1, 2, 4] = 1
    max_length: int | None = Field(None, ge=8)
    examples: int | None = Field(None, ge=1)
    source: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if (self.name is None) == (self.source is None):
            both = "is given beside data.source" if self.name else "is missing, and so is data.source"
            raise ValueError(f"data.name|{both}; give one: a data set that compressm knows, or your own data")
        if self.pool > 1 and self.name not in ("smnist", "psmnist", "scifar"):
            raise ValueError(f"data.pool|is for images of 28 and 32 pixels a side, not for {self.name}; leave it at 1")
        if self.max_length is not None and self.name not in ("imdb", "listops"):
            raise ValueError(f"data.max_length|is for imdb and listops, not for {self.name}")
        if self.examples is not None and self.name != "listops":
            raise ValueError(f"data.examples|is for listops, not for {self.name}")
        return self


Layer = Literal[
    "lru",
    "s5",
    "s4d",
    "mamba",
    "mamba2",
    "linear_attention",
    "gated_linear_attention",
    "delta_net",
    "rg_lru",
]

# Which options each layer has; the defaults are the layer's own.
_LAYER_OPTIONS = {
    "lru": ("r_min", "r_max", "max_phase"),
    "s5": ("dt_min", "dt_max", "bidirectional"),
    "s4d": ("dt_min", "dt_max", "init"),
    "mamba": ("expand", "d_conv", "dt_rank"),
    "mamba2": ("expand", "d_conv", "head_dim", "n_groups"),
    "linear_attention": ("expand", "n_heads", "decay"),
    "gated_linear_attention": ("expand", "n_heads", "gate_rank"),
    "delta_net": ("expand", "n_heads", "gated"),
    "rg_lru": ("n_blocks", "d_conv"),
}


class ModelConfig(Section):
    """Arguments of `compressm.layers.SequenceClassifier`; input width and classes come from the data.

    ``build`` names a function of your own instead, ``package.module:function``, that returns a classifier of sequences.
    It gets ``d_input``, ``n_classes`` and ``vocabulary`` of the data if its signature names them. See docs/own.md.

    ``r_min``, ``r_max`` and ``max_phase`` are options of ``layer: lru``; ``dt_min`` and ``dt_max`` of ``s5`` and
    ``s4d``, ``bidirectional`` of ``s5``, ``init`` of ``s4d``; ``expand`` and ``d_conv`` of ``mamba`` and ``mamba2``,
    ``dt_rank`` of ``mamba``, ``head_dim`` and ``n_groups`` of ``mamba2``; ``n_heads`` and ``expand`` of the layers
    with a matrix-valued state, ``decay`` of ``linear_attention``, ``gate_rank`` of ``gated_linear_attention``,
    ``gated`` of ``delta_net``, ``n_blocks`` and ``d_conv`` of ``rg_lru``.
    """

    d_model: int | None = Field(None, ge=1)
    d_state: int | list[int] | None = None
    n_layers: int = Field(1, ge=1)
    layer: Layer = "lru"
    dropout: float = Field(0.1, ge=0, lt=1)
    norm: Literal["batch", "layer", "rms"] | None = None
    r_min: float | None = Field(None, ge=0, lt=1)
    r_max: float | None = Field(None, gt=0, lt=1)
    max_phase: float | None = Field(None, gt=0, le=6.283185307179586)
    dt_min: float | None = Field(None, gt=0)
    dt_max: float | None = Field(None, gt=0)
    bidirectional: bool | None = None
    init: Literal["legs", "lin"] | None = None
    expand: int | None = Field(None, ge=1)
    d_conv: int | None = Field(None, ge=1)
    dt_rank: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1)
    n_groups: int | None = Field(None, ge=1)
    n_heads: int | None = Field(None, ge=1)
    decay: Literal["none", "fixed", "gated"] | None = None
    gate_rank: int | None = Field(None, ge=1)
    gated: bool | None = None
    n_blocks: int | None = Field(None, ge=1)
    build: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.build is not None:
            if others := sorted(self.model_fields_set - {"build"}):
                raise ValueError(f"model.{others[0]}|is given beside model.build, whose function alone says it")
            return self
        if self.d_model is None or self.d_state is None:
            name = "d_model" if self.d_model is None else "d_state"
            raise ValueError(f"model.{name}|missing; add it to the file, or give model.{name}=<value>, or model.build")
        dims = [self.d_state] if isinstance(self.d_state, int) else self.d_state
        if not dims or min(dims) < 1:
            raise ValueError("model.d_state|must be at least 1, or a list of such numbers")
        if isinstance(self.d_state, list) and len(self.d_state) != self.n_layers:
            raise ValueError(f"model.d_state|must be one number, or n_layers={self.n_layers} of them")
        known = _LAYER_OPTIONS[self.layer]
        for name in sorted({option for options in _LAYER_OPTIONS.values() for option in options}.difference(known)):
            if getattr(self, name) is not None:
                raise ValueError(f"model.{name}|is no option of layer {self.layer}, which has {', '.join(known)}")
        r_min, r_max = self.r_min or 0.0, 0.999 if self.r_max is None else self.r_max
        if r_min >= r_max:
            raise ValueError(f"model.r_min|must be less than r_max={r_max}")
        dt_min, dt_max = self.dt_min or 1e-3, self.dt_max or 0.1
        if dt_min > dt_max:
            raise ValueError(f"model.dt_min|must not exceed dt_max={dt_max}; the layer's own are 0.001 and 0.1")
        matrix_states = ("linear_attention", "gated_linear_attention", "delta_net")
        if self.layer in matrix_states and (self.expand or 1) * self.d_model % (self.n_heads or 4):
            raise ValueError(  # before the data are read
                f"model.n_heads|must divide expand * d_model = {(self.expand or 1) * self.d_model}; it is "
                f"{self.n_heads or 4}"
            )
        if self.layer == "mamba2":
            d_inner, head_dim = (self.expand or 2) * self.d_model, self.head_dim or 64
            if d_inner % head_dim or (d_inner // head_dim) % (self.n_groups or 1):
                raise ValueError(
                    f"model.head_dim|must divide expand * d_model = {d_inner} into a multiple of n_groups heads; "
                    f"it is {head_dim}"
                )
        return self


class OptimizerConfig(Section):
    """The optimizer. ``ssm_lr_factor`` scales the learning rate of the recurrences' parameters, which are not decayed.

    ``momentum`` is that of ``sgd``; ``max_grad_norm`` clips the gradient's norm where given.
    """

    name: Literal["adam", "adamw", "sgd"] = "adamw"
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
    """What is minimised besides cross entropy. Only rivals of compression need this; see `compressm.lab.rivals`.

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


def builtin_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, build: str | None = None, source: str | None = None
) -> Config:
    """Read a configuration from a YAML file.

    Args:
        path: the file; or the name of one that comes with the package, ``"smnist"`` for example.
        overrides: ``"section.key=value"``, the value in YAML; they win over the file.
        build: takes the place of the section ``model``, as its key of that name.
        source: takes the place of what the section ``data`` says about where data come from.

    Raises:
        ConfigError: no such file, not YAML, or an unknown key or unfit value, named by its dotted name with a remedy.
    """
    source_name = OWN.stem if path == OWN else str(path)
    if source_name in (built_in := builtin_configs()):
        path = built_in[source_name]
    tree = read_yaml(Path(path))
    if build is not None:
        tree["model"] = {"build": build}
    if source is not None:
        section = tree.get("data")
        kept = cast("dict[str, Any]", section) if isinstance(section, dict) else {}
        tree["data"] = {"source": source, **{key: kept[key] for key in ("validation",) if key in kept}}
    for override in overrides:
        _override(tree, override)
    return parse_config(tree, source_name)


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, plain values only.

    Raises:
        ConfigError: no such file, not YAML, or no sections.
    """
    try:
        if (size := path.stat().st_size) > _LARGEST_FILE:
            raise ConfigError(f"{path}: {size} bytes are too many for a configuration; check the path")
        tree = _parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file, nor one of the built-in configurations; check the path, or choose one of "
            f"{', '.join(builtin_configs())}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); a YAML file was expected") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8; a YAML file was expected") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: sections such as 'data:' and 'run:' were expected, not {_shown(tree)}")
    return cast("dict[str, Any]", tree)


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Check a nested dict and turn it into a `Config`.

    Args:
        tree: the sections.
        source: where it comes from, for messages.

    Raises:
        ConfigError: an unknown key or unfit value, named by its dotted name with a remedy.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # Unknown keys first: a misspelt required key is also missing, and the misspelling says more.
        errors = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ConfigError(f"{source}: {_explain(cast('dict[str, Any]', errors[0]), tree)}{more}") from None


def present_form(saved: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A stored configuration with the keys that have come since, at the defaults by which it was made.

    A rule about sizes is not limited to half of the states: no ``max_reduction`` and one of 1 are the same to it.
    """
    tree = {section: dict(values) for section, values in saved.items()}
    made = tree.get("compression", {})
    sized = any(made.get(name) is not None for name in ("states", "fraction", "total_states"))
    if sized and made.get("max_reduction") is None:
        made["max_reduction"] = 1.0
    if any(made.get(name) is not None for name in ("tolerance", "max_error")):
        made.setdefault("max_reduction", 1.0)  # one cut was not limited to half of the states
    for section, field in Config.model_fields.items():
        keys: Any = field.annotation
        for key, value in keys.model_fields.items():
            if not value.is_required():
                tree.setdefault(section, {}).setdefault(key, value.get_default(call_default_factory=True))
    return tree


def _explain(error: Mapping[str, Any], tree: Mapping[str, Any]) -> str:
    """One line out of a pydantic error: the key's dotted name, its value, what is wrong, what to do."""
    kind, value = error["type"], error["input"]
    if kind == "value_error":
        key, message = error["msg"].removeprefix("Value error, ").split("|", 1)
        found = _lookup(tree, key)
        return f"{key}{'' if found is None or isinstance(found, dict) else f' = {_shown(found)}'}: {message}"
    # Pydantic appends the branch of a union to the location; those are no keys of the configuration.
    location = [str(part) for part in error["loc"] if part not in ("int", "list[int]")]
    key = ".".join(location)
    if kind == "extra_forbidden":
        shown = "" if isinstance(value, dict) else f" = {_shown(value)}"
        return f"{key}{shown}: unknown key; {_suggest(location)}"
    if kind == "missing":
        needed = [key]
        if len(location) == 1:
            section: Any = Config.model_fields[key].annotation
            needed = [f"{key}.{name}" for name, field in section.model_fields.items() if field.is_required()]
        values = " ".join(f"{name}=<value>" for name in needed or [f"{key}.<key>"])
        return f"{key}: missing; add it to the file, or give {values}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{key} = {_shown(value)}: must be a section with the keys {', '.join(_fields(location))}"
    message = re.sub(r"^Input should be ", "must be ", error["msg"])
    if kind == "literal_error" and isinstance(value, str):
        message += _did_you_mean(value, re.findall(r"'([^']+)'", error["msg"]))
    return f"{key} = {_shown(value)}: {message}"


def _shown(value: object) -> str:
    """Like ``repr``, but short: what a file holds may be long and deeply nested."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = shown.maxlong = 100
    return shown.repr(value)


def _fields(location: Sequence[str]) -> list[str]:
    annotation: Any = Config
    for part in location:
        annotation = annotation.model_fields[part].annotation
    return list(annotation.model_fields)


def _suggest(location: Sequence[str]) -> str:
    """A remedy for an unknown key: a similar one in the same section, the same one elsewhere, or the list of all."""
    *section, name = location
    siblings = _fields(section)
    if similar := _did_you_mean(name, siblings):
        return similar.removeprefix("; ")
    everywhere = {key: f"{part}.{key}" for part in _fields([]) for key in _fields([part])}
    if close := difflib.get_close_matches(name, everywhere, 1, 0.8):
        return f"did you mean {everywhere[close[0]]}?"
    return f"known here are {', '.join(siblings)}"


def _did_you_mean(word: str, possibilities: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, possibilities, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _lookup(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = cast("dict[str, Any]", value).get(part) if isinstance(value, dict) else None
    return value


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{override!r}: not an override; write section.key=value, for example optimizer.lr=0.001")
    section = tree
    for part in parts[:-1]:
        inner = section.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {part} holds {_shown(inner)} and has no keys; set {part} itself")
        section = cast("dict[str, Any]", inner)
    section[parts[-1]] = _parse(text, f"override {override!r}")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that reads ``1e-3`` as a number (YAML 1.2) and refuses a key that is given twice, and aliases:
    a few of them make a file of gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is not a name", key_node.start_mark)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a safe loader: nothing but plain values
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{line}: not valid YAML ({error.problem}); mend that line") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:  # a date 2026-99-99, say
        raise ConfigError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None


__all__ = ["OWN", "Config", "LossConfig", "load_config", "parse_config", "present_form", "read_yaml"]
