"""The options of compression, each defined once: name, type, default, range and meaning.

This table defines the checks of `Compressor`'s arguments, the section ``compression`` of configuration files
(`compressm.lab.config`) and the page docs/options.md. Tests compare it with the signatures of `Compressor` and
`compress`, and with `Compressor`'s docstring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_origin

from torch import nn

from compressm.cutting.carry import Carry
from compressm.cutting.choosing import EXPECTED, Which, is_which
from compressm.cutting.metrics import Better
from compressm.errors import InvalidRankRuleError
from compressm.observing.loss_evidence import Gramians
from compressm.observing.observer import Terms
from compressm.theory.balancing import Method
from compressm.theory.rank_rule import check_choice
from compressm.theory.selection import Selection
from compressm.theory.targets import Target
from compressm.training.cushion import OnSetback
from compressm.training.schedule import When
from compressm.training.snapshot import Schedulers, Stateful
from compressm.training.twin import Control, TrainStep

Part = Literal["goal", "schedule", "cushion", "cut", "training"]
REQUIRED: Any = ...  # the default of an option that must be given
ABSENT: Any = type("Absent", (), {"__repr__": lambda _: "ABSENT"})()  # marks an option that `compress` does not take

SIZE_RULES = ("tolerance", "states", "fraction", "max_error", "total_states", "max_loss")


@dataclass(frozen=True)
class Option:
    """An argument of `Compressor`.

    Attributes:
        name: name of the argument.
        type: type of the value. None is also allowed if it is the default.
        default: default value, or `REQUIRED`.
        part: the part that it configures: how far cuts go (goal), when they come (schedule), the examination
            (cushion), how a cut is made (cut), or the other parts of the training (training).
        help: its meaning, as in the docstring of `Compressor`.
        bounds: least and largest value, under pydantic's names: ``ge``, ``gt``, ``le``, ``lt``.
        example: a value to name in messages.
        once: the default in `compress`; `ABSENT` if `compress` has no such argument.
        file: whether it is a key of the section ``compression`` of configuration files.
    """

    name: str
    type: Any
    default: Any
    part: Part
    help: str
    bounds: Mapping[str, float] = field(default_factory=dict[str, float])
    example: str = ""
    once: Any = ABSENT
    file: bool = True

    @property
    def annotation(self) -> Any:
        """The type in a signature."""
        return self.type | None if self.default is None else self.type

    @property
    def expected(self) -> str:
        """The allowed values, in words."""
        low, high = (self.bounds.get(a, self.bounds.get(b)) for a, b in (("ge", "gt"), ("le", "lt")))
        if self.type is bool:
            return "True or False"
        if self.type is Which:
            return EXPECTED
        if get_origin(self.type) is Callable:
            return "a function"
        if self.type in (Stateful, Schedulers):
            several = ", or a list of these" * (self.type is Schedulers)
            return f"an object with state_dict() and load_state_dict(){several}"
        if self.type == Sequence[nn.Module]:
            return "a list of modules"
        if high is None:
            kind = "whole number" if self.type is int else "number"
            return f"a {kind} greater than {low}" if "gt" in self.bounds else f"a {kind} of at least {low}"
        interval = f"{'[' if 'ge' in self.bounds else '('}{low}, {high}{']' if 'le' in self.bounds else ')'}"
        return f"a share in {interval}" + (f", for example {self.example}" if self.example else "")

    def check(self, value: Any) -> None:
        """Refuse a value that is not allowed.

        Raises:
            InvalidRankRuleError: the option, the value, and what is expected.
        """
        if value is None and self.default is None:
            return
        if get_origin(self.type) is Literal:
            check_choice(self.name, value, self.type)
        elif not self._fits(value):
            raise InvalidRankRuleError(f"{self.name} must be {self.expected}; got {value!r}")

    def _fits(self, value: Any) -> bool:
        if self.type is Which:
            return is_which(value)
        if get_origin(self.type) is Callable:
            return callable(value)
        if self.type in (Stateful, Schedulers):
            several = self.type is Schedulers and isinstance(value, list | tuple)
            return all(hasattr(one, "load_state_dict") for one in (value if several else [value]))
        if self.type == Sequence[nn.Module]:
            listed = isinstance(value, list | tuple | nn.ModuleList)
            return listed and all(isinstance(one, nn.Module) for one in value)
        if self.type is bool:
            return bool(value in (True, False))  # 0, 1 and NumPy's booleans are allowed too, strings are not
        if self.type not in (int, float):
            return True
        if isinstance(value, bool | str | bytes):
            return False
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return False
        within = all(_COMPARE[name](number, bound) for name, bound in self.bounds.items())
        return math.isfinite(number) and within and (self.type is not int or number == int(number))


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "ge": lambda value, bound: value >= bound,
    "gt": lambda value, bound: value > bound,
    "le": lambda value, bound: value <= bound,
    "lt": lambda value, bound: value < bound,
}
_POSITIVE, _NOT_NEGATIVE = {"ge": 1}, {"ge": 0}
_SHARE, _PART = {"ge": 0, "lt": 1}, {"gt": 0, "le": 1}

_TABLE = (
    Option(
        "total_steps", int, REQUIRED, "schedule", "planned number of optimizer steps.",
        bounds=_POSITIVE, file=False,
    ),
    Option(
        "tolerance", float, None, "goal",
        "share of a layer's Hankel energy that each cut may discard (tau in the paper).",
        bounds=_SHARE, example="0.02", once=None,
    ),
    Option(
        "states", int, None, "goal",
        "state dimension to arrive at with the last cut; the cuts before approach it geometrically.",
        bounds=_POSITIVE, once=None,
    ),
    Option(
        "fraction", float, None, "goal", "share of the states at the start to arrive at with the last cut.",
        bounds=_PART, example="0.25", once=None,
    ),
    Option(
        "max_error", float, None, "goal",
        "H-infinity error that each cut may make in a layer, in units of output per input.",
        bounds=_NOT_NEGATIVE, once=None,
    ),
    Option(
        "total_states", int, None, "goal",
        "states of all layers together to arrive at with the last cut.",
        bounds=_POSITIVE, once=None,
    ),
    Option(
        "max_loss", float, None, "goal",
        "rise of the loss that each cut may cost, in nats per prediction, predicted before it is made. Needs "
        "``gramians=\"loss\"``. One of these six or ``max_drop`` is needed.",
        bounds=_NOT_NEGATIVE, once=None,
    ),
    Option(
        "max_drop", float, None, "cushion",
        "how much of the metric a cut may cost, in the metric's own units (0.002 is 0.2 points of an accuracy in "
        "[0, 1]). A cut that cost more, and more than noise explains, is undone; see docs/cushion.md. Without one of "
        "the six rules above, a cut discards what ``tolerance=0.02`` allows.",
        bounds=_NOT_NEGATIVE, once=None,
    ),
    Option(
        "evaluate", Callable[[nn.Module], Any], None, "cushion",
        "``evaluate(model)`` returns the validation metric: a number; or one score per validation example, always "
        "the same ones in the same order, which are then compared in pairs. Needed for ``max_drop``, which calls it "
        "about six times per cut. Without ``max_drop`` it is called before and after each cut, for the history.",
        once=None, file=False,
    ),
    Option(
        "mode", Better, "max", "cushion",
        "``\"max\"`` if a higher metric is better, ``\"min\"`` if a lower one is, such as a loss or perplexity.",
        once="max", file=False,
    ),
    Option(
        "multiple_of", int, 1, "goal",
        "prefer state dimensions that are a multiple of this; see `RankRule` for what comes first.",
        bounds=_POSITIVE, once=1,
    ),
    Option(
        "min_reduction", float, 0.05, "goal", "cut a layer only where this share of its states goes.",
        bounds=_SHARE, once=0.0,
    ),
    Option(
        "max_reduction", float, None, "goal",
        "remove at most this share of a layer's states in one cut. By default half under ``tolerance``, ``max_error``, "
        "``max_loss`` and ``max_drop``, in every family of layers, and no limit under ``states``, ``fraction`` and "
        "``total_states``.",
        bounds=_PART, example="0.5", once=None,
    ),
    Option(
        "per_layer", bool, False, "goal",
        "let the layers of a Hugging Face model differ in their state dimension; see `RankRule`.",
        once=False,
    ),
    Option(
        "target", Target, None, "goal",
        "cut to sizes only that these kernels or this server take; see docs/serving.md.",
        once=None,
    ),
    Option(
        "layers", Which, None, "goal",
        "cut these layers only: a name, a glob, a list of these, or a function of a layer's name and the layer.",
        once=None,
    ),
    Option(
        "exclude", Which, None, "goal", "leave these layers as they are, and ask nothing of them; as ``layers``.",
        once=None,
    ),
    Option("cuts", int, 4, "schedule", "how many cuts.", bounds=_POSITIVE),
    Option("window", float, 0.1, "schedule", "share of ``total_steps`` in which they are made.", bounds=_PART),
    Option("start", int, 0, "schedule", "steps to wait before the window.", bounds=_NOT_NEGATIVE),
    Option(
        "when", When, "schedule", "schedule",
        "``\"schedule\"`` cuts at fixed steps; ``\"settled\"`` probes the spectrum at those steps, and at nine more "
        "between each two, and cuts as soon as it holds still (less than 2 % of the Hankel energy moved since the "
        "probe before), or at the scheduled step at the latest.",
    ),
    Option(
        "method", Method, "real", "cut",
        "``\"real\"`` or ``\"complex\"`` truncation of linear time-invariant layers; see `compressm.theory.balancing`.",
        once="real",
    ),
    Option(
        "selection", Selection, "hankel", "cut",
        "how states of selective layers are picked; see `compressm.theory.selection`. What those layers do with the "
        "data is observed at every eighth step while cuts are pending, on one sequence of the batch.",
        once="hankel",
    ),
    Option(
        "gramians", Gramians, "white", "cut",
        "``\"white\"`` balances time-invariant layers under white noise; ``\"loss\"`` by their states on the data and "
        "the gradients of the loss, which the training's own backward passes give, on four sequences of each of the "
        "last 50 batches before a cut. It also picks the states of selective layers by the loss where that does less "
        "damage, and predicts what cuts cost.",
        once=None,
    ),
    Option(
        "loss_terms", Terms, "sequences", "cut",
        "how the loss of a batch is computed, for ``gramians=\"loss\"``: ``\"sequences\"``, the mean over its "
        "sequences; ``\"tokens\"``, the mean over its tokens, as in language models; or ``\"sum\"`` over its "
        "sequences.",
    ),
    Option(
        "loss_scale", float, 1.0, "cut",
        "factor by which the loss is multiplied before ``backward``, such as 1 over the number of accumulated batches, "
        "for ``gramians=\"loss\"``. The factor of ``scaler`` is known and comes on top.",
        bounds={"gt": 0},
    ),
    Option(
        "match_steps", int, 0, "cut",
        "steps of Adam in which cut time-invariant layers learn the old layers' outputs on recorded inputs, before a "
        "cut is written, for ``gramians=\"loss\"``; see docs/loss.md.",
        bounds=_NOT_NEGATIVE, once=0,
    ),
    Option(
        "carry", Carry, "transform", "cut", "what becomes of the optimizer's state; see `compressm.cutting.carry`.",
        once="transform",
    ),
    Option(
        "check_after", int, None, "cushion",
        "steps between a cut and its first examination; by default half the distance between cuts. Up to two more "
        "examinations follow, each half as many steps later.",
        bounds=_POSITIVE,
    ),
    Option(
        "on_setback", OnSetback, "halve", "cushion",
        "after a roll-back ``\"halve\"`` the next cut, which comes ``check_after`` steps later at the earliest, or "
        "``\"stop\"`` cutting. A cut that is kept doubles the next one again, up to the full size.",
    ),
    Option(
        "scheduler", Schedulers, None, "training",
        "learning rate scheduler, or a list of several, rolled back with the rest.",
        file=False,
    ),
    Option("scaler", Stateful, None, "training", "gradient scaler, rolled back with the rest.", file=False),
    Option(
        "followers", Sequence[nn.Module], (), "training",
        "averaged copies of the model (`torch.optim.swa_utils.AveragedModel`). What a cut changes in the model, it "
        "sets in them to the model's new values. Averaging starts again there; an average over all steps counts them "
        "from there.",
        file=False,
    ),
    Option(
        "rewind", bool, True, "cushion",
        "a roll-back turns back time as well. False where a host counts the steps: then only what was learnt goes back "
        "(weights, the optimizer's state, averages), and steps, learning rates, scaler and random state go on.",
        file=False,
    ),
    Option(
        "control", Control, "trend", "cushion",
        "with what a cut is compared. ``\"trend\"``: the course of the metric before it, which goes on. ``\"twin\"``: "
        "the uncut model, which trains on beside it on the same batches until the cut is judged. Needs ``train_step`` "
        "and the batch in ``compressor.step(batch)``, in a loop of your own in one process.",
    ),
    Option(
        "train_step", TrainStep, None, "cushion",
        "``train_step(model, optimizer, batch)`` makes one training step, as your loop does, with the model and the "
        "optimizer that it is given. Only ``control=\"twin\"`` calls it, for the twin.",
        file=False,
    ),
)  # fmt: skip

OPTIONS: dict[str, Option] = {option.name: option for option in _TABLE}


def check_options(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `Compressor` whose values are not allowed, or that do not determine how far to cut.

    Args:
        given: values by name. Names that are no options are ignored.

    Raises:
        InvalidRankRuleError: the option, the value, what is expected, and what to do.
    """
    if given["max_drop"] is None and all(given[name] is None for name in SIZE_RULES):
        raise InvalidRankRuleError("say how far to cut: tolerance=0.02 for example, or max_drop=0.002 with evaluate=")
    if given["max_drop"] is not None and given["evaluate"] is None:
        raise InvalidRankRuleError(
            "max_drop needs evaluate: a function of the model that returns the validation metric"
        )
    for option in OPTIONS.values():
        option.check(given[option.name])


__all__ = ["ABSENT", "OPTIONS", "REQUIRED", "SIZE_RULES", "Option", "check_options"]
