"""What ``tolerance=0.02`` and ``max_loss=0.005`` mean in every family of layers, on one task.

    python benchmarks/one_currency.py            # stores results/one_currency.json, and tables in docs/which-rule.md
    python benchmarks/one_currency.py --table    # only the tables, of what is stored

A classifier with each kind of layer learns the handwritten digits that come with scikit-learn, and copies of it are cut
once: by ``tolerance=0.02`` with at most half of a layer's states, by the same without that limit, and by
``max_loss=0.005`` nats per sequence without it, once with the model's own predictions and once with the labels. Stored
are the states, the share of the Hankel energy that the cut kept as it was made (the least of the layers), the error of
the layers' outputs on data, what was predicted and measured of the loss, the loss on validation data right before and
after, and the divergence of the predictions, mean KL(before, after): a rise of the loss can be zero by chance, and this
cannot. One thread. Families that the result file has already are not trained again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from stored import between, rewrite, store
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.lab.config import DataConfig, Layer
from compressm.lab.data.datasets import load_data
from compressm.layers import SequenceClassifier, parameter_groups

PAGE = Path(__file__).parent.parent / "docs" / "which-rule.md"
BEGIN = "<!-- {}: table of results/one_currency.json, by benchmarks/one_currency.py -->"
END = "<!-- end of table: {} -->"
RULES: dict[str, dict[str, Any]] = {
    "tolerance": {"tolerance": 0.02},
    "tolerance, all at once": {"tolerance": 0.02, "max_reduction": 1.0},
    "max_loss": {"max_loss": 0.005, "loss": "classification", "max_reduction": 1.0},
    "max_loss, labels": {"max_loss": 0.005, "loss": "labels", "max_reduction": 1.0},
}
STATES, WIDTH, BATCH, SEEN = 64, 16, 32, 512
Batches = list[tuple[Tensor, Tensor]]


def trained(layer: str, x: Tensor, y: Tensor, steps: int, seed: int) -> nn.Module:
    """A classifier after a training."""
    torch.manual_seed(seed)
    states, options = STATES if layer != "mamba" else 16, {"head_dim": 16} if layer == "mamba2" else {}
    model = SequenceClassifier(
        x.shape[-1], 10, WIDTH, states, n_layers=2, layer=layer, dropout=0.0, norm="layer", **options
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, 5e-3, 0.01, 0.5))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], steps)
    for _ in range(steps):
        batch = torch.randint(0, len(x), (BATCH,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.eval()


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """Logarithms of the classes' probabilities, shape ``(N, classes)``."""
    return torch.cat([model(part) for part in x.split(100)]).log_softmax(-1)


def loss_and_accuracy(said: Tensor, y: Tensor) -> tuple[float, float]:
    """In nats per sequence, and as a share."""
    return float(F.nll_loss(said, y)), float((said.argmax(-1) == y).float().mean())


def of_labels(logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of every sequence, shape ``(B,)``."""
    return F.cross_entropy(logits, batch[1], reduction="none")


def cut(model: nn.Module, seen: Batches, x: Tensor, y: Tensor, rule: dict[str, Any]) -> dict[str, Any]:
    """One cut of a copy by a rule, and what it did."""
    model = copy.deepcopy(model)
    if rule.get("loss") == "labels":
        rule = {**rule, "loss": of_labels}
    said = predictions(model, x)
    before, right = loss_and_accuracy(said, y)
    report = compressm.compress(model, data=seen, **rule)
    said_after = predictions(model, x)
    after, right_after = loss_and_accuracy(said_after, y)
    kept = [layer.energy_kept for layer in report.layers if layer.energy_kept is not None]
    return {
        "states": [[layer.states_before, layer.states_after] for layer in report.layers],
        "energy_kept": min(kept, default=1.0),
        "error_on_data": [layer.error_on_data for layer in report.layers],
        "predicted_loss": report.predicted_loss, "measured_loss": report.measured_loss,
        "divergence": float(F.kl_div(said_after, said, reduction="batchmean", log_target=True)),
        "loss_before": before, "loss_after": after, "rise": after - before,
        "accuracy_before": right, "accuracy_after": right_after,
    }  # fmt: skip


def table(rows: list[dict[str, Any]], rule: str) -> str:
    """The cuts by one of the rules, layer by layer: means over the seeds, of the energy kept the least."""
    evidence = "least energy kept | error of the outputs" if rule == "tolerance" else "predicted | measured by the cut"
    lines = [
        f"| layers | seeds | states of both | {evidence} | loss before | rise right after | divergence |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for layer in get_args(Layer):
        if ours := [row for row in rows if (row["layer"], row["rule"]) == (layer, rule)]:
            lines.append(_line(layer, ours))
    return "\n".join(lines)


def _line(layer: str, ours: list[dict[str, Any]]) -> str:
    def mean(name: str) -> Any:
        return np.mean([row[name] for row in ours], axis=0)

    before, after = (", ".join(f"{size:.0f}" for size in mean("states")[:, i]) for i in (0, 1))
    if ours[0]["predicted_loss"] is not None:
        evidence = f"{mean('predicted_loss'):.4f} | {mean('measured_loss'):.4f}"
    else:
        errors = ", ".join(f"{100 * error:.2g} %" for error in mean("error_on_data"))
        evidence = f"{min(row['energy_kept'] for row in ours):.3f} | {errors}"
    return (
        f"| {layer} | {len(ours)} | {before} → {after} | {evidence} | {mean('loss_before'):.3f} | "
        f"{mean('rise'):.4f} | {mean('divergence'):.1e} |"
    )


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page docs/which-rule.md with the tables of these rows."""
    for rule in ("tolerance", "max_loss", "max_loss, labels"):
        page = between(page, BEGIN.format(rule), END.format(rule), table(rows, rule))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut every family of layers by one tolerance and one loss.")
    parser.add_argument("--json", type=Path, default=Path("results/one_currency.json"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", nargs="+", choices=get_args(Layer), default=list(get_args(Layer)))
    parser.add_argument("--table", action="store_true", help="train nothing; write the stored rows into the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text())["cuts"] if arguments.json.exists() else []
    if not arguments.table:
        run(arguments, rows)
    rewrite(PAGE, with_table, rows)


def run(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Add the cuts that are not stored yet."""
    data = load_data(DataConfig(name="digits", validation=0.25))
    x, y = data.batch(data.train, torch.arange(len(data.train)))
    held = [data.batch(split, torch.arange(len(split))) for split in (data.validation, data.test)]
    valid_x, valid_y = (torch.cat(parts) for parts in zip(*held, strict=True))
    made = {(row["layer"], row["seed"]) for row in rows}
    seen = list(zip(x[:SEEN].split(BATCH), y[:SEEN].split(BATCH), strict=True))
    for seed in range(arguments.seeds):
        for layer in arguments.layers:
            if (layer, seed) in made:
                continue
            started = time.process_time()
            model = trained(layer, x, y, arguments.steps, seed)
            for name, rule in RULES.items():
                found = cut(model, seen, valid_x, valid_y, rule)
                rows.append({"layer": layer, "seed": seed, "rule": name, **found})
                print(rows[-1], f"{time.process_time() - started:.1f} s", flush=True)
            store(arguments.json, rules=RULES, steps=arguments.steps, cuts=rows)


if __name__ == "__main__":
    main()
