"""The experiments: what each trains, and the accuracies that the CompreSSM paper (arXiv 2510.02823) reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compressm.errors import ConfigError


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
    """

    name: str
    changes: Mapping[str, Any]
    same_states_as: str | None = None
    teacher: str | None = None
    continues: str | None = None
    paper: float | None = None

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


_BIG = {"compression.enabled": False}
# The phases of the published code, and a cut every 1000 of the first 20,000 steps: see docs/paper.md.
_CIRCLE = {"model.max_phase": 2 * math.pi}
_FULL_CIRCLE = {**_CIRCLE, "compression.cuts": 20}
_LONG = {"data.pool": 1, "run.steps": 1500}


_NO_TOLERANCE = {"compression.tolerance": None, "compression.max_reduction": None}


def _protocol(tolerances: Sequence[float], states: Sequence[int], paper: Mapping[str, float]) -> tuple[Arm, ...]:
    """The paper's rows: 256 states, cut at these tolerances, and models that have so few states from the start."""
    return (
        Arm("full", _BIG, paper=paper.get("full")),
        *(Arm(f"tau{tau}", _tolerance(tau, "complex"), paper=paper.get(str(tau))) for tau in tolerances),
        *(Arm(f"small{n}", {**_BIG, "model.d_state": n}, paper=paper.get(str(n))) for n in states),
    )


def _tolerance(tau: float, method: str) -> dict[str, Any]:
    return {"compression.tolerance": tau, "compression.method": method}


def _cut_to_32(**changes: Any) -> dict[str, Any]:
    keys = {f"compression.{key}": value for key, value in changes.items()}
    return {**_NO_TOLERANCE, "compression.states": 32, **keys}


def _afterwards(steps: int) -> tuple[Arm, ...]:
    """A big model, cut to 28 states once, in four ways: after all training, and with a tenth of it left to adapt."""
    return tuple(
        Arm(f"{when}-{selection}", _after(steps, rest, selection), continues="full")
        for when, rest in (("after", 1), ("tuned", steps // 10))
        for selection in ("hankel", "modal", "hinf", "energy")
    )


def _after(steps: int, rest: int, selection: str = "hankel") -> dict[str, Any]:
    """One cut to 28 states, with so many steps left."""
    return {
        **_cut_to_32(states=28, cuts=1, selection=selection),
        "compression.start": steps - rest,
        "compression.window": 1 / steps,
    }


def _three_ways(*tolerances: float, paper: Mapping[str, tuple[float, float]], full: float | None) -> tuple[Arm, ...]:
    """Big all the way; shrunk, and small from the start at the same states, for every tolerance."""
    arms = [Arm("full", _BIG, paper=full)]
    for tau in tolerances:
        shrunk, small = paper.get(str(tau), (None, None))
        arms += [
            Arm(f"tau{tau}", {"compression.tolerance": tau, "compression.method": "complex"}, paper=shrunk),
            Arm(f"small{tau}", _BIG, same_states_as=f"tau{tau}", paper=small),
        ]
    return tuple(arms)


def _scaled_down(config: str) -> dict[str, Any]:
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


def _family(layer: str, title: str, states: int, **options: Any) -> Experiment:
    """Big, shrunk, small from the start, and cut to random states: one kind of layer."""
    model = {"model.layer": layer, **{f"model.{key}": value for key, value in options.items()}}
    return Experiment(
        f"family-{layer.replace('_', '-')}",
        f"Sequential MNIST in 196 steps, {title} from {options['d_state']} states to {states}",
        "smnist-mamba",
        (
            Arm("full", _BIG),
            Arm("shrunk", {"compression.states": states}),
            Arm("small", {**_BIG, "model.d_state": states}),
            Arm("random", {"compression.states": states, "compression.selection": "random"}),
        ),
        seeds=1,
        changes=model,
    )


def _once(window: float, **changes: Any) -> dict[str, Any]:
    """One cut after this share of the training, or as the changes say."""
    keys = {f"compression.{key}": value for key, value in {"cuts": 1, "window": window, **changes}.items()}
    return {"compression.tolerance": None, **keys}


def _by_loss(window: float, **changes: Any) -> dict[str, Any]:
    """The same, by states on data and the loss's gradients."""
    return _once(window, gramians="loss", **changes)


# An LRU of 256 states in one block of width 8 that learns in a few minutes.
_SHORT = {
    "data.pool": 2, "optimizer.name": "adamw", "optimizer.lr": 4e-3, "optimizer.weight_decay": 0.01,
    "schedule.name": "cosine", "schedule.warmup": 0.03,
}  # fmt: skip
_PAPER = {"full": 97.3, "0.01": 96.9, "0.02": 96.9, "0.04": 95.9, "13": 92.6, "28": 96.0}
_OURS = (
    Arm("real0.02", _tolerance(0.02, "real")),
    Arm("small-real0.02", _BIG, same_states_as="real0.02"),
    # Four cuts, the default: the more there are, the sooner each is judged.
    Arm("max-drop", {"compression.max_drop": 0.002, "compression.cuts": 4, **_NO_TOLERANCE}),
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "smnist",
            "Sequential MNIST, LRU of 256 states (paper: table 1)",
            "smnist",
            _protocol([0.04, 0.02, 0.01], [28, 13], _PAPER),
            seeds=1,
            changes=_FULL_CIRCLE,
        ),
        Experiment(
            "smnist-quarter",
            "Sequential MNIST, LRU of 256 states, a quarter of the paper's steps",
            "smnist",
            (*_protocol([0.02], [28], _PAPER), *_OURS),
            seeds=1,
            steps=50_000,
            changes=_FULL_CIRCLE,
        ),
        Experiment(
            "smnist-phases",
            "Sequential MNIST, LRU of 256 states, eigenvalues' phases below π/10 at the start, four cuts",
            "smnist",
            _protocol([0.02], [28, 13], _PAPER),
            seeds=1,
        ),
        Experiment(
            "psmnist",
            "Permuted sequential MNIST, LRU of 256 states, a quarter of the paper's steps",
            "psmnist",
            _protocol([0.04, 0.02], [28, 13], {}),
            seeds=1,
            steps=50_000,
            changes=_FULL_CIRCLE,
        ),
        Experiment(
            "scifar",
            "Sequential CIFAR-10, 6 blocks of LRU, width 512, 384 states (paper: table 1)",
            "scifar",
            _three_ways(
                0.15, 0.1, 0.05, full=86.5, paper={"0.15": (84.4, 78.2), "0.1": (85.7, 81.8), "0.05": (85.8, 84.2)}
            ),
            seeds=1,
        ),
        Experiment(
            "listops",
            "ListOps, 6 blocks of LRU, width 128, 256 states (paper: table 1)",
            "listops",
            _three_ways(0.1, full=49.7, paper={"0.1": (51.8, 46.3)}),
            seeds=1,
        ),
        Experiment(
            "imdb",
            "IMDB, 1 block of LRU, width 256, 192 states (paper: table 1)",
            "imdb",
            _three_ways(0.1, full=None, paper={"0.1": (82.8, 83.5)}),
            seeds=1,
        ),
        Experiment(
            "scifar-small",
            "Sequential CIFAR-10 in 256 steps, 2 blocks of LRU, width 32, 192 states",
            "scifar",
            _three_ways(0.2, 0.1, full=None, paper={}),
            seeds=1,
            steps=15_000,
            changes=_scaled_down("scifar"),
        ),
        Experiment(
            "scifar-loss",
            "Sequential CIFAR-10 in 256 steps, 2 blocks of LRU of 192 states: one cut to 44 or 114 states in all",
            "scifar",
            (
                Arm("full", _BIG),
                *(
                    arm
                    for states in (22, 57)
                    for arm in (
                        Arm(f"small{states}", {**_BIG, "model.d_state": states}),
                        Arm(f"white{states}", _once(0.25, states=states)),
                        Arm(f"loss{states}", _by_loss(0.25, total_states=2 * states)),
                    )
                ),
            ),
            steps=15_000,
            changes=_scaled_down("scifar"),
        ),
        Experiment(
            "ablation-loss",
            "Sequential MNIST in 196 steps, LRU of 256 states: one cut by white noise, or by data and loss",
            "smnist",
            (
                Arm("full", _BIG),
                *(
                    arm
                    for states in (12, 6)
                    for arm in (
                        Arm(f"small{states}", {**_BIG, "model.d_state": states}),
                        Arm(f"white{states}", _once(0.25, states=states)),
                        Arm(f"loss{states}", _by_loss(0.25, states=states)),
                    )
                ),
                Arm("loss12-early", _by_loss(0.1, states=12)),
                Arm("loss12-late", _by_loss(0.5, states=12)),
                Arm("loss12-four-cuts", _by_loss(0.25, states=12, cuts=4)),
                Arm("loss12-reset", _by_loss(0.25, states=12, carry="reset")),
            ),
            steps=6000,
            changes=_SHORT,
        ),
        Experiment(
            "listops-small",
            "ListOps of 50 to 200 tokens, 2 blocks of LRU, width 64, 256 states",
            "listops",
            _three_ways(0.1, full=None, paper={}),
            seeds=1,
            steps=10_000,
            changes=_scaled_down("listops"),
        ),
        Experiment(
            "imdb-small",
            "IMDB, the first 1024 characters, 1 block of LRU, width 32, 192 states",
            "imdb",
            _three_ways(0.1, full=None, paper={}),
            seeds=1,
            steps=8000,
            changes=_scaled_down("imdb"),
        ),
        Experiment(
            "pragmatic",
            "Sequential MNIST, LRU of 256 states: a tenth at a time until the first setback",
            "smnist",
            (
                Arm("full", _BIG),
                Arm(
                    "pragmatic",
                    _cut_to_32(
                        states=None,
                        fraction=0.9**20,
                        cuts=20,
                        window=0.5,
                        max_drop=0.002,
                        on_setback="stop",
                        min_reduction=0.0,
                    ),
                ),
                Arm("max-drop", _cut_to_32(states=None, max_drop=0.002, cuts=8, window=0.5)),
            ),
            steps=20_000,
        ),
        Experiment(
            "stability",
            "Sequential MNIST, LRU of 256 states: Hankel singular values over training",
            "smnist",
            (Arm("full", {**_BIG, "run.spectrum_every": 500}),),
            seeds=1,
            steps=20_000,
        ),
        Experiment(
            "speed",
            "Sequential MNIST, LRU: what a step takes at the paper's state dimensions",
            "smnist",
            tuple(Arm(f"n{n}", {**_BIG, "model.d_state": n}) for n in (256, 191, 93, 47, 28, 13)),
            seeds=1,
            steps=400,
        ),
        Experiment(
            "mamba",
            "Sequential MNIST in 196 steps, Mamba from 128 states to 12",
            "smnist-mamba",
            (
                Arm("full", _BIG),
                Arm("shrunk", {}),
                Arm("small", {**_BIG, "model.d_state": 12}),
                Arm("random", {"compression.selection": "random"}),
                Arm("means", {"compression.selection": "means"}),
                Arm("present", {"compression.selection": "least_squares"}),
            ),
        ),
        _family("s5", "S5", 12, d_state=128, norm="batch", d_model=16),
        _family("mamba2", "Mamba-2", 12, d_state=128, head_dim=16),
        _family("s4d", "S4D", 8, d_state=32, norm="batch"),
        _family("gated_linear_attention", "gated linear attention", 8, d_state=64, n_heads=2),
        _family("delta_net", "Gated DeltaNet", 8, d_state=32, n_heads=2, gated=True),
        _family("rg_lru", "Griffin's recurrent block", 24, d_state=128),
        _family("linear_attention", "linear attention with gated decay", 8, d_state=64, n_heads=2, decay="gated"),
        Experiment(
            "mamba-784",
            "Sequential MNIST in 784 steps, Mamba from 128 states to 12, a short training",
            "smnist-mamba",
            (
                Arm("full", {**_LONG, **_BIG}),
                Arm("shrunk", _LONG),
                Arm("small", {**_LONG, **_BIG, "model.d_state": 12}),
            ),
            seeds=1,
        ),
        Experiment(
            "rivals",
            "Sequential MNIST, LRU from 256 states to 28: cut while training, or afterwards",
            "smnist",
            (
                Arm("full", {**_BIG, "run.keep_checkpoints": 4}),  # of which the cuts at the end need the first
                Arm("shrunk", _cut_to_32(states=28)),
                Arm("small", {**_BIG, "model.d_state": 28}),
                Arm("distilled", {**_BIG, "model.d_state": 28}, teacher="full"),
                *_afterwards(20_000),
                *(
                    Arm(f"hankel-norm{weight}", {**_after(20_000, 1), "loss.hankel_norm": weight})
                    for weight in (1e-3, 1e-4, 1e-5)
                ),
            ),
            steps=20_000,
            seeds=1,
        ),
        Experiment(
            "ablation-selection",
            "Sequential MNIST, LRU from 256 states to 32: which are kept",
            "smnist",
            (
                Arm("largest", _cut_to_32()),
                Arm("random", _cut_to_32(selection="random")),
                Arm("random-modes", _cut_to_32(selection="random_modes")),
                Arm("smallest", _cut_to_32(selection="smallest")),
                *(
                    Arm(f"{name}-circle", {**_cut_to_32(selection=selection), **_CIRCLE})
                    for name, selection in (
                        ("largest", "hankel"),
                        ("random-modes", "random_modes"),
                        ("smallest", "smallest"),
                    )
                ),
            ),
            steps=20_000,
        ),
        Experiment(
            "ablation-count",
            "Sequential MNIST, LRU from 256 states to 32: how many cuts",
            "smnist",
            tuple(Arm(f"cuts{count}", _cut_to_32(cuts=count)) for count in (1, 2, 4, 8, 16)),
            steps=20_000,
        ),
        Experiment(
            "ablation-window",
            "Sequential MNIST, LRU from 256 states to 32: when the cuts are made",
            "smnist",
            tuple(Arm(f"window{window}", _cut_to_32(window=window)) for window in (0.05, 0.1, 0.2, 0.4, 0.8)),
            steps=20_000,
        ),
    )
}


def experiment(name: str) -> Experiment:
    """By name.

    Raises:
        ConfigError: there is no such experiment.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"{name!r} is no experiment; there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


__all__ = ["EXPERIMENTS", "Arm", "Experiment", "experiment"]
