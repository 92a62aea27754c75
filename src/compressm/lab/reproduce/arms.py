"""What an experiment is made of: arms, and the changes of a configuration that several experiments share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compressm.errors import ConfigError
from compressm.layers.blocks import TIME_INVARIANT


@dataclass(frozen=True)
class Arm:
    """One way of training, run with several seeds.

    Attributes:
        name: names its files.
        changes: what differs from the experiment's configuration, by dotted names.
        same_states_as: another arm. This one starts with that arm's final state dimensions, seed by seed.
        teacher: another arm. This one learns from that arm's final model, seed by seed.
        continues: the same arm without compression. Its steps before the first cut are not made again.
        paper: the paper's accuracy in percent; None where it has none.
        small: the arm that has about as many states from the start. Between it and the first arm lies the gap of which
            this arm recovers a share; None where there is none.
        big: the big arm of that gap; None for the experiment's first.
        length: training steps over the experiment's.
        way: arms of the same way of training differ in their learning rate only. The one with the best validation
            accuracy stands for the way; see `equal_compute`. None where rates are not compared.
    """

    name: str
    changes: Mapping[str, Any]
    same_states_as: str | None = None
    teacher: str | None = None
    continues: str | None = None
    paper: float | None = None
    small: str | None = None
    big: str | None = None
    length: float = 1.0
    way: str | None = None

    @property
    def needs(self) -> set[str]:
        """The arms that must be finished before."""
        return {name for name in (self.same_states_as, self.teacher, self.continues) if name is not None}


@dataclass(frozen=True)
class Experiment:
    """A grid of arms and seeds over one configuration.

    Attributes:
        name: names its command and its folder.
        title: what the table is headed.
        config: a built-in configuration, by name.
        arms: in the order of the table; the first is the one that the others are compared with.
        seeds: how many are run by default.
        steps: training steps instead of the configuration's.
        changes: what differs from that configuration in all arms.
    """

    name: str
    title: str
    config: str
    arms: tuple[Arm, ...]
    seeds: int = 3
    steps: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            ConfigError: there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ConfigError(f"arms: {name!r} is none of {', '.join(arm.name for arm in self.arms)}")

    @property
    def in_settings(self) -> bool:
        """Whether it compares in one setting after the other, each with a big arm of its own."""
        return any(arm.big for arm in self.arms)

    def big_of(self, arm: Arm) -> Arm:
        """The big arm that one is compared with: that of its setting, where settings are compared; else the first."""
        settings = (one.big for one in self.arms if one.big and arm.name in (one.name, one.small, one.big))
        return self.arm(next(settings, self.arms[0].name))


BIG = {"compression.enabled": False}
# The phases of the published code, and a cut every 1000 of the first 20,000 steps: see docs/paper.md.
CIRCLE = {"model.max_phase": 2 * math.pi}
FULL_CIRCLE = {**CIRCLE, "compression.cuts": 20}
LONG = {"data.pool": 1, "run.steps": 1500}


_NO_TOLERANCE = {"compression.tolerance": None, "compression.max_reduction": None}


def protocol(tolerances: Sequence[float], states: Sequence[int], paper: Mapping[str, float]) -> tuple[Arm, ...]:
    """The paper's rows: 256 states, cut at these tolerances, and models that have so few states from the start."""
    size = {0.02: 28, 0.04: 13}  # what the paper's cuts leave
    return (
        Arm("full", BIG, paper=paper.get("full")),
        *(
            Arm(
                f"tau{tau}",
                _tolerance(tau, "complex"),
                paper=paper.get(str(tau)),
                small=f"small{size[tau]}" if size.get(tau) in states else None,
            )
            for tau in tolerances
        ),
        *(Arm(f"small{n}", {**BIG, "model.d_state": n}, paper=paper.get(str(n))) for n in states),
    )


def _tolerance(tau: float, method: str) -> dict[str, Any]:
    return {"compression.tolerance": tau, "compression.method": method}


def cut_to_32(**changes: Any) -> dict[str, Any]:
    keys = {f"compression.{key}": value for key, value in changes.items()}
    return {**_NO_TOLERANCE, "compression.states": 32, **keys}


def afterwards(steps: int, states: int = 28, *more: str) -> tuple[Arm, ...]:
    """A big model, cut once, in four ways and more: after all training, and with a tenth of it left to adapt.

    Args:
        steps: of the training.
        states: that are left.
        more: further selections, or ``"loss"``.
    """
    arms: list[Arm] = []
    for when, rest in (("after", 1), ("tuned", steps // 10)):
        for way in ("hankel", "modal", "hinf", "energy", *more):
            if way == "loss":  # its evidence is of the steps before the cut, so these are made again
                cut = {**after(steps, rest, states=states), "compression.gramians": "loss"}
                arms.append(Arm(f"{when}-{way}", cut, small="small"))
            else:
                arms.append(Arm(f"{when}-{way}", after(steps, rest, way, states), continues="full", small="small"))
    return tuple(arms)


def after(steps: int, rest: int, selection: str = "hankel", states: int = 28) -> dict[str, Any]:
    """One cut to so many states, with so many steps left."""
    return {
        **cut_to_32(states=states, cuts=1, selection=selection),
        "compression.start": steps - rest,
        "compression.window": 1 / steps,
    }


def three_ways(*tolerances: float, paper: Mapping[str, tuple[float, float]], full: float | None) -> tuple[Arm, ...]:
    """Big all the way; shrunk, and small from the start at the same states, for every tolerance."""
    arms = [Arm("full", BIG, paper=full)]
    for tau in tolerances:
        shrunk, small = paper.get(str(tau), (None, None))
        arms += [
            Arm(
                f"tau{tau}",
                {"compression.tolerance": tau, "compression.method": "complex"},
                paper=shrunk,
                small=f"small{tau}",
            ),
            Arm(f"small{tau}", BIG, same_states_as=f"tau{tau}", paper=small),
        ]
    return tuple(arms)


def scaled_down(config: str) -> dict[str, Any]:
    """What lets a data set of the paper train on two cores in an afternoon."""
    small = {"model.n_layers": 2, "model.d_model": 32}
    return {
        "scifar": {**small, "data.pool": 2, "model.d_state": 192},
        "listops": {**small, "model.d_model": 64, "data.max_length": 200, "data.examples": 20_000},
        "imdb": {
            "model.d_model": 32,
            "model.dropout": 0.1,
            "data.max_length": 1024,
            "optimizer.ssm_lr_factor": 0.25,
            "compression.start": 200,
            "compression.window": 0.1,
            "run.batch_size": 50,
            "run.eval_every": 2500,
            "run.checkpoint_every": 2500,
        },
    }[config]


def _model(layer: str, **options: Any) -> dict[str, Any]:
    """A configuration's section for a kind of layer with these options."""
    return {"model.layer": layer, **{f"model.{key}": value for key, value in options.items()}}


def family(layer: str, title: str, states: int, **options: Any) -> Experiment:
    """Big, shrunk, small from the start, and cut to random states: one kind of layer.

    In a time-invariant layer the loss decides what is cut, so there are two arms more: one cut after a quarter of the
    steps, by white noise and by the loss.
    """
    model = _model(layer, **options)
    later = (("white", once), ("loss", by_loss)) if layer in TIME_INVARIANT else ()
    return Experiment(
        f"family-{layer.replace('_', '-')}",
        f"Sequential MNIST in 196 steps, {title} from {options['d_state']} states to {states}",
        "smnist-mamba",
        (
            Arm("full", BIG),
            Arm("shrunk", {"compression.states": states}, small="small"),
            Arm("small", {**BIG, "model.d_state": states}),
            Arm("random", {"compression.states": states, "compression.selection": "random"}, small="small"),
            *(Arm(name, cut(0.25, states=states), small="small") for name, cut in later),
        ),
        seeds=3 if later else 1,
        changes=model,
    )


def recall(layer: str, title: str, *sizes: int, pairs: int = 8, seeds: int = 3, **options: Any) -> Experiment:
    """Associative recall by one kind of layer: big; and for every size shrunk to it, small from the start, cut to
    random states, and shrunk by one cut in the middle of the training, when recall has been learnt."""
    model = _model(layer, **{"head_dim": None, **options})
    arms = [Arm("full", BIG)]
    for n in sizes:
        shrunk, drawn = ({"compression.states": n, **more} for more in ({}, {"compression.selection": "random"}))
        arms += [Arm(f"shrunk{n}", shrunk, small=f"small{n}"), Arm(f"small{n}", {**BIG, "model.d_state": n})]
        arms += [Arm(f"random{n}", drawn, small=f"small{n}")]
        arms += [Arm(f"late{n}", once(0.5, states=n), small=f"small{n}")]
    name = "mqar" if layer == "mamba2" else f"mqar-{layer.replace('_', '-')}"
    title = f"Associative recall of {pairs} pairs (MQAR), {title} from {options['d_state']} states"
    return Experiment(name, title, "mqar", tuple(arms), seeds=seeds, changes={**model, "data.pairs": pairs})


def recall_by_load(layer: str, title: str, states: int, **options: Any) -> Experiment:
    """Associative recall of 4 to 64 pairs by one layer: big, small from the start, and shrunk to as many states."""
    arms: list[Arm] = []
    for pairs in (4, 8, 16, 32, 64):
        load, big, small = {"data.pairs": pairs}, f"full-{pairs}-pairs", f"small{states}-{pairs}-pairs"
        arms += [Arm(big, {**BIG, **load}), Arm(small, {**BIG, "model.d_state": states, **load})]
        arms.append(Arm(f"shrunk{states}-{pairs}-pairs", {"compression.states": states, **load}, small=small, big=big))
    title = f"Associative recall of 4 to 64 pairs (MQAR), one layer of {title}, {options['d_state']} states or {states}"
    model = _model(layer, **{"head_dim": None, **options})
    return Experiment(f"mqar-pairs-{layer.replace('_', '-')}", title, "mqar", tuple(arms), seeds=1, changes=model)


def bytes_of_text(layer: str, title: str, *sizes: int, **options: Any) -> Experiment:
    """A language model of two layers of one kind: big; and for every size small from the start, cut to it after a
    quarter of the training, by second moments and by the loss, which distributes the states, and cut half-way and after
    four fifths."""
    model = _model(layer, **options)
    free = {"fraction": None, "max_reduction": None}
    windows = (("late", 0.5), ("last", 0.8))
    late = (Arm(f"{name}{n}", once(at, states=n, **free), small=f"small{n}") for name, at in windows for n in sizes)
    arms = (Arm("full", BIG), *at_each_size(*sizes, layers=2, plain="moments", every=free), *late)
    title = f"Bytes of WikiText-2, two layers of {title} of {options['d_state']} states"
    return Experiment(f"wikitext-{layer.replace('_', '-')}", title, "wikitext", arms, changes=model)


def once(window: float, **changes: Any) -> dict[str, Any]:
    """One cut after this share of the training, or as the changes say."""
    keys = {f"compression.{key}": value for key, value in {"cuts": 1, "window": window, **changes}.items()}
    return {"compression.tolerance": None, **keys}


def by_loss(window: float, **changes: Any) -> dict[str, Any]:
    """The same, by states on data and the loss's gradients."""
    return once(window, gramians="loss", **changes)


def at_each_size(
    *sizes: int,
    layers: int = 1,
    plain: str = "white",
    every: Mapping[str, Any] | None = None,
    **more: Mapping[str, Any],
) -> tuple[Arm, ...]:
    """For every size a model that has it from the start, and one cut to it after a quarter of the training, without the
    loss and by it, which distributes the states of several layers as one budget.

    Args:
        sizes: states of a layer.
        layers: of the model.
        plain: names the cuts without the loss: by white noise, or by second moments where states are selective.
        every: what these cuts and those by the loss change beside.
        more: further cuts by the loss, by name: what they change.
    """
    arms: list[Arm] = []
    for n in sizes:
        size = {"states": n} if layers == 1 else {"total_states": layers * n}
        cuts = {plain: once(0.25, states=n, **(every or {})), "loss": by_loss(0.25, **size, **(every or {}))}
        cuts |= {name: by_loss(0.25, **size, **changes) for name, changes in more.items()}
        arms.append(Arm(f"small{n}", {**BIG, "model.d_state": n}))
        arms += [Arm(f"{name}{n}", cut, small=f"small{n}") for name, cut in cuts.items()]
    return tuple(arms)


def in_each_setting(states: int, settings: Mapping[str, Mapping[str, Any]]) -> tuple[Arm, ...]:
    """Big, small from the start, and one cut by the loss, trained in one setting after the other.

    Args:
        states: of the small.
        settings: what each changes, by a name.
    """
    arms: list[Arm] = []
    for name, setting in settings.items():
        big, small = f"full-{name}", f"small{states}-{name}"
        arms += [Arm(big, {**BIG, **setting}), Arm(small, {**BIG, "model.d_state": states, **setting})]
        arms.append(Arm(f"loss{states}-{name}", {**by_loss(0.25, states=states), **setting}, small=small, big=big))
    return tuple(arms)


def each_rate(way: str, changes: Mapping[str, Any], length: float = 1.0) -> tuple[Arm, ...]:
    """One way of training at half to sixteen times the learning rate of `SHORT`."""
    rates = {factor: {**changes, "optimizer.lr": factor * SHORT_RATE} for factor in (0.5, 1, 2, 4, 8, 16)}
    return tuple(Arm(f"{way}-rate{factor:g}", rate, length=length, way=way) for factor, rate in rates.items())


# Associative recall needs a key beside the value after it. Mamba-2 has a short convolution for that, the layers with a
# matrix-valued state only with d_conv; two layers without it recall a quarter of the values after 1,500 steps. With two
# states from the start the delta rule recalls nearly all of 8 pairs, so it is asked for 16.
TWO_HEADS = {"d_state": 32, "n_heads": 2, "d_conv": 4}
# An LRU of 256 states in one block of width 8 that learns in a few minutes.
SHORT_RATE = 4e-3
SHORT = {
    "data.pool": 2, "optimizer.name": "adamw", "optimizer.lr": SHORT_RATE, "optimizer.weight_decay": 0.01,
    "schedule.name": "cosine", "schedule.warmup": 0.03,
}  # fmt: skip
# How this training may be changed: other rates, batches, optimizers, and half precision.
OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "as-usual": {},
    "half-rate": {"optimizer.lr": SHORT_RATE / 2},
    "double-rate": {"optimizer.lr": 2 * SHORT_RATE},
    "batch-20": {"run.batch_size": 20},
    "batch-100": {"run.batch_size": 100},
    "sgd": {"optimizer.name": "sgd", "optimizer.lr": 0.05, "optimizer.max_grad_norm": 1.0},
    "muon": {"optimizer.name": "muon"},
    "bfloat16": {"run.autocast": "bfloat16"},
}
PAPER = {"full": 97.3, "0.01": 96.9, "0.02": 96.9, "0.04": 95.9, "13": 92.6, "28": 96.0}
OURS = (
    Arm("real0.02", _tolerance(0.02, "real"), small="small-real0.02"),
    Arm("small-real0.02", BIG, same_states_as="real0.02"),
    # Four cuts, the default: the more there are, the sooner each is judged.
    Arm("max-drop", {"compression.max_drop": 0.002, "compression.cuts": 4, **_NO_TOLERANCE}),
)


__all__ = [
    "BIG",
    "CIRCLE",
    "FULL_CIRCLE",
    "LONG",
    "OTHER_SETTINGS",
    "OURS",
    "PAPER",
    "SHORT",
    "TWO_HEADS",
    "Arm",
    "Experiment",
    "after",
    "afterwards",
    "at_each_size",
    "by_loss",
    "bytes_of_text",
    "cut_to_32",
    "each_rate",
    "family",
    "in_each_setting",
    "once",
    "protocol",
    "recall",
    "recall_by_load",
    "scaled_down",
    "three_ways",
]
