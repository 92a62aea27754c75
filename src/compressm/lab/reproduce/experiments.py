"""The experiments: what each trains, and the accuracies that the CompreSSM paper (arXiv 2510.02823) reports."""

from __future__ import annotations

from compressm.errors import ConfigError
from compressm.lab.reproduce.arms import (
    BIG,
    CIRCLE,
    FULL_CIRCLE,
    LONG,
    OTHER_SETTINGS,
    OURS,
    PAPER,
    SHORT,
    TWO_HEADS,
    Arm,
    Experiment,
    after,
    afterwards,
    at_each_size,
    by_loss,
    bytes_of_text,
    cut_to_32,
    each_rate,
    family,
    in_each_setting,
    once,
    protocol,
    recall,
    recall_by_load,
    scaled_down,
    three_ways,
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "smnist",
            "Sequential MNIST, LRU of 256 states (paper: table 1)",
            "smnist",
            (
                *protocol([0.04, 0.02, 0.01], [28, 13], PAPER),
                *(Arm(f"loss{n}", by_loss(0.1, states=n), small=f"small{n}") for n in (28, 13)),
            ),
            seeds=1,
            changes=FULL_CIRCLE,
        ),
        Experiment(
            "smnist-forty",
            "Sequential MNIST, LRU of 256 states, cut at every evaluation to the end, as the published code does",
            "smnist",
            protocol([0.04, 0.02, 0.01, 0.001], [28, 13], {**PAPER, "0.001": 97.2}),
            changes={**CIRCLE, "compression.cuts": 40, "compression.window": 1.0},
        ),
        Experiment(
            "smnist-quarter",
            "Sequential MNIST, LRU of 256 states, a quarter of the paper's steps",
            "smnist",
            (
                *protocol([0.02], [28], PAPER),
                *OURS,
                Arm("white28", once(0.25, states=28), small="small28"),
                Arm("loss28", by_loss(0.25, states=28), small="small28"),
                *at_each_size(12),
            ),
            seeds=1,
            steps=50_000,
            changes=FULL_CIRCLE,
        ),
        Experiment(
            "smnist-phases",
            "Sequential MNIST, LRU of 256 states, eigenvalues' phases below π/10 at the start, four cuts",
            "smnist",
            protocol([0.02], [28, 13], PAPER),
            seeds=1,
        ),
        Experiment(
            "psmnist",
            "Permuted sequential MNIST, LRU of 256 states, a quarter of the paper's steps",
            "psmnist",
            protocol([0.04, 0.02], [28, 13], {}),
            seeds=1,
            steps=50_000,
            changes=FULL_CIRCLE,
        ),
        Experiment(
            "scifar",
            "Sequential CIFAR-10, 6 blocks of LRU, width 512, 384 states (paper: table 1)",
            "scifar",
            three_ways(
                0.15, 0.1, 0.05, full=86.5, paper={"0.15": (84.4, 78.2), "0.1": (85.7, 81.8), "0.05": (85.8, 84.2)}
            ),
            seeds=1,
        ),
        Experiment(
            "listops",
            "ListOps, 6 blocks of LRU, width 128, 256 states (paper: table 1)",
            "listops",
            three_ways(0.1, full=49.7, paper={"0.1": (51.8, 46.3)}),
            seeds=1,
        ),
        Experiment(
            "imdb",
            "IMDB, 1 block of LRU, width 256, 192 states (paper: table 1)",
            "imdb",
            three_ways(0.1, full=None, paper={"0.1": (82.8, 83.5)}),
            seeds=1,
        ),
        Experiment(
            "scifar-small",
            "Sequential CIFAR-10 in 256 steps, 2 blocks of LRU, width 32, 192 states",
            "scifar",
            three_ways(0.2, 0.1, full=None, paper={}),
            seeds=1,
            steps=15_000,
            changes=scaled_down("scifar"),
        ),
        Experiment(
            "scifar-loss",
            "Sequential CIFAR-10 in 256 steps, 2 blocks of LRU of 192 states: one cut to 44 or 114 states in all",
            "scifar",
            (Arm("full", BIG), *at_each_size(22, 57, layers=2)),
            steps=15_000,
            changes=scaled_down("scifar"),
        ),
        Experiment(
            "psmnist-loss",
            "Permuted sequential MNIST in 196 steps, LRU of 256 states: one cut by white noise, or by data and loss",
            "psmnist",
            (Arm("full", BIG), *at_each_size(28, 12, matched={"match_steps": 400})),
            steps=6000,
            changes=SHORT,
        ),
        Experiment(
            "ablation-loss",
            "Sequential MNIST in 196 steps, LRU of 256 states: one cut by white noise, or by data and loss",
            "smnist",
            (
                Arm("full", BIG),
                *at_each_size(28, 12, 6),
                *(
                    Arm(f"{name}{states}-early", cut(0.1, states=states), small=f"small{states}")
                    for states in (12, 6)
                    for name, cut in (("white", once), ("loss", by_loss))
                ),
                Arm("loss12-late", by_loss(0.5, states=12), small="small12"),
                Arm("loss12-four-cuts", by_loss(0.25, states=12, cuts=4), small="small12"),
                Arm("loss12-reset", by_loss(0.25, states=12, carry="reset"), small="small12"),
            ),
            steps=6000,
            changes=SHORT,
        ),
        Experiment(
            "equal-compute",
            "Sequential MNIST in 196 steps, LRU of 256 states, or 12: who is best for the same computing?",
            "smnist",
            # The longer small run takes as many seconds as the shrunk one, and more operations; the shorter big run as
            # many operations, and fewer seconds.
            (
                *each_rate("full", BIG),
                *each_rate("shrunk12", by_loss(0.1, states=12)),
                *each_rate("small12", {**BIG, "model.d_state": 12}),
                *each_rate("small12-longer", {**BIG, "model.d_state": 12}, length=1.7),
                *each_rate("full-shorter", BIG, length=0.55),
            ),
            steps=6000,
            changes=SHORT,
        ),
        Experiment(
            "robustness",
            "Sequential MNIST in 196 steps, LRU of 256 states cut to 12: other learning rates, batches, optimizers, "
            "half precision",
            "smnist",
            in_each_setting(12, OTHER_SETTINGS),
            steps=3000,
            changes=SHORT,
        ),
        Experiment(
            "listops-small",
            "ListOps of 50 to 200 tokens, 2 blocks of LRU, width 64, 256 states",
            "listops",
            (*three_ways(0.1, full=None, paper={}), *at_each_size(16, layers=2)),
            seeds=1,
            steps=10_000,
            changes=scaled_down("listops"),
        ),
        Experiment(
            "imdb-small",
            "IMDB, the first 1024 characters, 1 block of LRU, width 32, 192 states",
            "imdb",
            (*three_ways(0.1, full=None, paper={}), *at_each_size(12)),
            seeds=1,
            steps=8000,
            changes=scaled_down("imdb"),
        ),
        Experiment(
            "fsdd",
            "Free Spoken Digits, 1000 samples at 2 kHz, 2 blocks of LRU of 256 states: one cut to 32 states in all",
            "fsdd",
            (Arm("full", BIG), *at_each_size(16, layers=2)),
        ),
        Experiment(
            "pragmatic",
            "Sequential MNIST, LRU of 256 states: a tenth at a time until the first setback",
            "smnist",
            (
                Arm("full", BIG),
                Arm(
                    "pragmatic",
                    cut_to_32(
                        states=None,
                        fraction=0.9**20,
                        cuts=20,
                        window=0.5,
                        max_drop=0.002,
                        on_setback="stop",
                        min_reduction=0.0,
                    ),
                ),
                Arm("max-drop", cut_to_32(states=None, max_drop=0.002, cuts=8, window=0.5)),
            ),
            steps=20_000,
        ),
        Experiment(
            "stability",
            "Sequential MNIST, LRU of 256 states: Hankel singular values over training",
            "smnist",
            (Arm("full", {**BIG, "run.spectrum_every": 500}),),
            seeds=1,
            steps=20_000,
        ),
        Experiment(
            "speed",
            "Sequential MNIST, LRU: what a step takes at the paper's state dimensions",
            "smnist",
            tuple(Arm(f"n{n}", {**BIG, "model.d_state": n}) for n in (256, 191, 93, 47, 28, 13)),
            seeds=1,
            steps=400,
        ),
        Experiment(
            "mamba",
            "Sequential MNIST in 196 steps, Mamba from 128 states to 12",
            "smnist-mamba",
            (
                Arm("full", BIG),
                Arm("shrunk", {}, small="small"),
                Arm("small", {**BIG, "model.d_state": 12}),
                Arm("random", {"compression.selection": "random"}, small="small"),
                Arm("means", {"compression.selection": "means"}, small="small"),
                Arm("present", {"compression.selection": "least_squares"}, small="small"),
            ),
        ),
        family("s5", "S5", 12, d_state=128, norm="batch", d_model=16),
        family("mamba2", "Mamba-2", 12, d_state=128, head_dim=16),
        family("s4d", "S4D", 8, d_state=32, norm="batch"),
        family("gated_linear_attention", "gated linear attention", 8, d_state=64, n_heads=2),
        family("delta_net", "Gated DeltaNet", 8, d_state=32, n_heads=2, gated=True),
        family("rg_lru", "Griffin's recurrent block", 24, d_state=128),
        family("linear_attention", "linear attention with gated decay", 8, d_state=64, n_heads=2, decay="gated"),
        recall("mamba2", "one layer of Mamba-2", 4, 2, seeds=6, d_state=32, head_dim=16),
        recall("gated_linear_attention", "one layer of gated linear attention", 4, 2, **TWO_HEADS, seeds=1),
        recall("delta_net", "one layer of Gated DeltaNet", 4, 2, pairs=16, **TWO_HEADS, gated=True, seeds=1),
        recall_by_load("mamba2", "Mamba-2", 4, d_state=32, head_dim=16),
        recall_by_load("gated_linear_attention", "gated linear attention", 4, **TWO_HEADS),
        recall_by_load("delta_net", "Gated DeltaNet", 4, **TWO_HEADS, gated=True),
        bytes_of_text("mamba2", "Mamba-2", 32, 16, d_state=128, head_dim=16),
        bytes_of_text("delta_net", "Gated DeltaNet", 16, 8, d_state=64, n_heads=2, gated=True),
        Experiment(
            "mamba-784",
            "Sequential MNIST in 784 steps, Mamba from 128 states to 12, a short training",
            "smnist-mamba",
            (
                Arm("full", {**LONG, **BIG}),
                Arm("shrunk", LONG, small="small"),
                Arm("small", {**LONG, **BIG, "model.d_state": 12}),
            ),
            seeds=1,
        ),
        Experiment(
            "rivals",
            "Sequential MNIST, LRU from 256 states to 28: cut while training, or afterwards",
            "smnist",
            (
                Arm("full", {**BIG, "run.keep_checkpoints": 4}),  # of which the cuts at the end need the first
                Arm("shrunk", cut_to_32(states=28), small="small"),
                Arm("small", {**BIG, "model.d_state": 28}),
                Arm("distilled", {**BIG, "model.d_state": 28}, teacher="full", small="small"),
                *afterwards(20_000),
                *(
                    Arm(f"hankel-norm{weight}", {**after(20_000, 1), "loss.hankel_norm": weight}, small="small")
                    for weight in (1e-3, 1e-4, 1e-5)
                ),
            ),
            steps=20_000,
            seeds=1,
        ),
        Experiment(
            "rivals-short",
            "Sequential MNIST in 196 steps, LRU from 256 states to 12: cut while training, or afterwards",
            "smnist",
            (
                Arm("full", {**BIG, "run.keep_checkpoints": 4}),
                Arm("loss", by_loss(0.25, states=12), small="small"),
                Arm("white", once(0.25, states=12), small="small"),
                Arm("small", {**BIG, "model.d_state": 12}),
                Arm("distilled", {**BIG, "model.d_state": 12}, teacher="full", small="small"),
                *afterwards(6000, 12, "random_modes", "loss"),
                Arm("hankel-norm", {**after(6000, 1, states=12), "loss.hankel_norm": 1e-4}, small="small"),
            ),
            steps=6000,
            changes=SHORT,
        ),
        Experiment(
            "ablation-selection",
            "Sequential MNIST, LRU from 256 states to 32: which are kept",
            "smnist",
            (
                Arm("largest", cut_to_32()),
                Arm("random", cut_to_32(selection="random")),
                Arm("random-modes", cut_to_32(selection="random_modes")),
                Arm("smallest", cut_to_32(selection="smallest")),
                *(
                    Arm(f"{name}-circle", {**cut_to_32(selection=selection), **CIRCLE})
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
            tuple(Arm(f"cuts{count}", cut_to_32(cuts=count)) for count in (1, 2, 4, 8, 16)),
            steps=20_000,
        ),
        Experiment(
            "ablation-window",
            "Sequential MNIST, LRU from 256 states to 32: when the cuts are made",
            "smnist",
            tuple(Arm(f"window{window}", cut_to_32(window=window)) for window in (0.05, 0.1, 0.2, 0.4, 0.8)),
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
