"""The loss around a cut, with the optimizer's state carried over, sliced as in the paper's code, and reset.

    python benchmarks/carry_figure.py --json results/carry.json --picture docs/images/carry.svg

An LRU classifier is trained on the embedded digits with AdamW, and cut once. From the same cut on it goes on three
times, with the same batches; only what became of the optimizer's state differs. A fourth run goes on without a cut. The
loss is that on the whole training set, after every step; mean over seeds.

Also, without any step after the cut: the roots of the second moments, by which Adam divides, carried over and as the
gradients of the cut model over the next batches have them. Both are over the same batches, so that only the cut
differs.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from stored import store
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.cutting import plan_reduction
from compressm.layers import SequenceClassifier, parameter_groups
from compressm.theory.rank_rule import RankRule

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MODES = {
    "transform": "carried through the change of basis",
    "slice": "sliced, as in the paper's code",
    "reset": "reset",
}
LAYER = "blocks.0.ssm"
COLOURS = {"uncut": "#888888", "transform": "#0b6e4f", "slice": "#c8553d", "reset": "#3d5a80"}


def batches(inputs: Tensor, targets: Tensor, seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(0, len(targets), (50,), generator=generator)
        yield inputs[index], targets[index]


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


@torch.no_grad()
def full_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    return float(F.cross_entropy(model(inputs), targets))


def second_moments(model: nn.Module, following: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean squares of the gradients of a layer's parameters over some batches."""
    layer = model.get_submodule(LAYER)
    sums = {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    for inputs, targets in following:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            sums[name] += parameter.grad.square() / len(following)
    model.zero_grad()
    return sums


def carried_over_actual(model: nn.Module, following: list[tuple[Tensor, Tensor]], rule: RankRule) -> dict[str, Tensor]:
    """Roots of second moments, carried through a cut over those after it, entry by entry, by parameter."""
    model = copy.deepcopy(model)
    layer, before = model.get_submodule(LAYER), second_moments(model, following)
    optimizer = torch.optim.Adam(layer.parameters())
    for name, value in before.items():
        state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(value), "exp_avg_sq": value}
        optimizer.state[layer.get_parameter(name)] = state
    plan_reduction(model, rule).apply(model, optimizer)
    ratios: dict[str, Tensor] = {}
    for name, actual in second_moments(model, following).items():
        carried = optimizer.state[layer.get_parameter(name)]["exp_avg_sq"]
        seen = actual > 1e-12 * actual.max()
        ratios[name] = (carried[seen] / actual[seen]).sqrt()
    return ratios


def one_seed(
    seed: int, before: int, after: int, tolerance: float, lr: float
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels, dtype=torch.float32)[:1200, :, None] / 8 - 1
    targets = torch.tensor(labels)[:1200]
    torch.manual_seed(seed)
    model = SequenceClassifier(1, 10, d_model=8, d_state=128, dropout=0.0, norm="layer", r_min=0.9)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=lr, weight_decay=0.01), fused=True)
    stream = batches(inputs, targets, seed)
    for _ in range(before):
        training_step(model, optimizer, next(stream))
    following = [next(stream) for _ in range(after)]
    curves: dict[str, list[float]] = {}
    for mode in ("uncut", *MODES):
        # A deep copy of both together keeps the copied optimizer on the copied parameters.
        trial, state = copy.deepcopy((model, optimizer))
        if mode != "uncut":
            plan = plan_reduction(trial, RankRule(tolerance=tolerance))
            report = plan.apply(trial, state, carry=mode)  # type: ignore[arg-type]
            curves["states"] = [float(n) for n in report.state_dims.values()]
        losses = [full_loss(trial, inputs, targets)]
        for batch in following:
            training_step(trial, state, batch)
            losses.append(full_loss(trial, inputs, targets))
        curves[mode] = losses
    return curves, carried_over_actual(model, following[:40], RankRule(tolerance=tolerance))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--before", type=int, default=300, help="training steps before the cut")
    parser.add_argument("--after", type=int, default=150, help="training steps after it")
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()

    runs, ratios = [], []
    for seed in range(arguments.seeds):
        run, ratio = one_seed(seed, arguments.before, arguments.after, arguments.tolerance, arguments.lr)
        runs.append(run)
        ratios.append(ratio)
        print(f"seed {seed}: 128 -> {int(runs[-1]['states'][0])} states", file=sys.stderr)
    curves = {mode: torch.tensor([run[mode] for run in runs]) for mode in ("uncut", *MODES)}
    summary = {
        mode: {
            "just_after": float(curve[:, 0].mean()),
            "mean_of_first_20_steps": float(curve[:, 1:21].mean()),
            "worst_of_first_20_steps": float(curve[:, 1:21].max(1).values.mean()),
            "mean_of_last_20_steps": float(curve[:, -20:].mean()),
        }
        for mode, curve in curves.items()
    }
    print(
        "| optimizer state | just after | mean, steps 1-20 | worst, steps 1-20 | mean, last 20 |\n|---|---|---|---|---|"
    )
    for mode, values in summary.items():
        print(f"| {MODES.get(mode, 'no cut')} | " + " | ".join(f"{value:.4f}" for value in values.values()) + " |")
    shares = torch.tensor([0.1, 0.5, 0.9])
    moments = {
        name: [float(value) for value in torch.quantile(torch.cat([ratio[name] for ratio in ratios]), shares)]
        for name in ratios[0]
        if name != "D"  # which a cut leaves alone
    }
    print("\n| parameter | 10 % | median | 90 % |\n|---|---|---|---|")
    for name, values in moments.items():
        print(f"| `{name}` | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    if arguments.json:
        store(
            arguments.json,
            seeds=list(range(arguments.seeds)),
            states=[run["states"] for run in runs],
            summary=summary,
            mean_curves={mode: [round(float(v), 5) for v in curve.mean(0)] for mode, curve in curves.items()},
            standard_errors={
                mode: [round(float(v), 5) for v in curve.std(0) / len(runs) ** 0.5] for mode, curve in curves.items()
            },
            carried_over_actual_root_second_moments={"quantiles": shares.tolist(), **moments},
        )
    if arguments.picture:
        figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
        for mode, curve in curves.items():
            middle, spread = curve.mean(0), curve.std(0) / len(runs) ** 0.5
            steps = torch.arange(len(middle))
            axis.plot(steps, middle, color=COLOURS[mode], label=MODES.get(mode, "no cut"))
            axis.fill_between(steps, middle - spread, middle + spread, color=COLOURS[mode], alpha=0.15, linewidth=0)
        axis.set(xlabel="training steps after the cut", ylabel="loss on the training set", yscale="log")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(arguments.picture)


if __name__ == "__main__":
    main()
