"""What a cut costs right after it, by every criterion, for models of every family.

    python benchmarks/after_the_cut.py [--families lru,mamba2] [--seeds 3] [--steps 600] [--out FILE] [--figure FILE]

Small classifiers of two layers learn handwritten digits (embedded, 8 x 8 pixels one by one). Each is then cut to a
half, a quarter, an eighth and a sixteenth of its states. Nothing is trained after the cut. The rise is the
Kullback-Leibler divergence of the cut model's predictions from the uncut one's on validation data, in nats per
sequence. Cuts are made from 400 sequences of the training data. Families and seeds that the result file already holds
are not computed again.

The criteria are those of `criteria.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from criteria import criteria
from stored import store
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import find_layers
from compressm.cutting.rise import cut_layers, measured_rise
from compressm.lab.config import DataConfig
from compressm.lab.data.datasets import BatchOrder, SequenceData, load_data
from compressm.layers import SequenceClassifier, parameter_groups
from compressm.observing.loss_evidence import LossEvidence, gather_evidence
from compressm.observing.over_data import gather

FAMILIES: dict[str, dict[str, Any]] = {
    "lru": {"d_state": 64, "r_min": 0.5, "r_max": 0.99},
    "s5": {"d_state": 64},
    "s4d": {"d_state": 32},
    "mamba": {"d_state": 32},
    "mamba2": {"d_state": 32, "head_dim": 8},
    "mamba3": {"d_state": 64, "head_dim": 8},
    "linear_attention": {"d_state": 32, "n_heads": 2},
    "gated_linear_attention": {"d_state": 32, "n_heads": 2},
    "delta_net": {"d_state": 32, "n_heads": 2, "gated": True},
    "rg_lru": {"d_state": 64},
}
SHARES = (2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("results/after_the_cut.json"))
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(DataConfig(name="digits", validation=0.2))
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    done = {(row["family"], row["seed"]) for row in rows if row["steps"] == arguments.steps}
    for family in arguments.families.split(","):
        for seed in range(arguments.seeds):
            if (family, seed) not in done:
                rows += compare(family, data, arguments.steps, seed)
                store(arguments.out, data=data.label, rows=rows)
    print(table(rows))
    if arguments.figure is not None:
        draw(rows, arguments.figure)


def compare(family: str, data: SequenceData, steps: int, seed: int) -> list[dict[str, Any]]:
    """A row for every criterion and size."""
    model = trained(family, data, steps, seed)
    validation = [data.batch(data.validation, torch.arange(len(data.validation)))]
    batches = [data.batch(data.train, torch.arange(50 * i, 50 * (i + 1)))[0] for i in range(8)]
    torch.manual_seed(seed)
    evidence = LossEvidence.of(gather_evidence(model, batches, keep=400))
    moments = gather(model, batches)
    states = next(adapter.state_dim(layer) for layer, adapter in find_layers(model).values())
    x, y = validation[0]
    known = {"family": family, "seed": seed, "steps": steps, "uncut_accuracy": accuracy(model, x, y)}
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        for name, changes, predicted in criteria(model, moments, evidence, states // share, batches, "classification"):
            rise = measured_rise(model, changes, [x], "classification")
            with cut_layers(model, changes) as smaller:
                right = accuracy(smaller, x, y)
            rows.append(
                {**known, "criterion": name, "share": share, "states": states // share, "rise": rise.nats,
                 "standard_error": rise.standard_error, "predicted": predicted, "accuracy": right}
            )  # fmt: skip
    return rows


def trained(family: str, data: SequenceData, steps: int, seed: int) -> nn.Module:
    """A model after so many steps."""
    torch.manual_seed(seed)
    model = SequenceClassifier(1, 10, d_model=16, n_layers=2, layer=family, dropout=0.0, **FAMILIES[family])
    optimizer = torch.optim.AdamW(parameter_groups(model, 5e-3, 0.01))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    order = BatchOrder(len(data.train), 32, seed)
    for step in range(steps):
        x, y = data.batch(data.train, order.indices(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * float((model(x).argmax(-1) == y).float().mean())


def table(rows: list[dict[str, Any]]) -> str:
    """Mean rises over the seeds, one line per family and criterion."""
    lines = ["| family | criterion | " + " | ".join(f"1/{share}" for share in SHARES) + " |", "|---" * 6 + "|"]
    for family in dict.fromkeys(row["family"] for row in rows):
        of_family = [row for row in rows if row["family"] == family]
        for criterion in dict.fromkeys(row["criterion"] for row in of_family):
            cells = [
                statistics.mean(r["rise"] for r in of_family if r["criterion"] == criterion and r["share"] == share)
                for share in SHARES
            ]
            lines.append(f"| {family} | {criterion} | " + " | ".join(f"{value:.3g}" for value in cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted against measured rises of cuts by the loss, with the latter's standard errors, over families, sizes and
    seeds."""
    from matplotlib.figure import Figure

    from compressm.cutting.plots import COLOURS

    figure = Figure(figsize=(6, 5), layout="constrained")
    axis = figure.subplots()
    for index, family in enumerate(FAMILIES):
        points = [row for row in rows if row["family"] == family and row["predicted"]]
        above = [row["standard_error"] for row in points]
        below = [min(row["standard_error"], 0.9 * row["rise"]) for row in points]  # the axis has no zero
        axis.errorbar(
            [row["predicted"] for row in points], [row["rise"] for row in points], [below, above], linestyle="",
            marker="os^Dv"[index % 5], color=COLOURS[index % len(COLOURS)], label=family, markersize=4, linewidth=0.8,
        )  # fmt: skip
    axis.set(xscale="log", yscale="log")
    ends = [1e-6, 10]
    axis.loglog(ends, ends, color="#999999", linewidth=0.8)
    axis.fill_between(ends, [e / 2 for e in ends], [2 * e for e in ends], color="#999999", alpha=0.2, linewidth=0)
    axis.set(xlim=ends, ylim=ends)
    axis.set(xlabel="predicted rise of the loss (nats per sequence)", ylabel="measured on validation data")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
