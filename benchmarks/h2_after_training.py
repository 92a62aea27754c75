"""A trained LRU cut to 12 states by balanced truncation, and the same made H2-optimal, before and after fine-tuning.

    compressm reproduce rivals-short --arms full --runs runs --data DIRECTORY
    COMPRESSM_DATA=DIRECTORY python benchmarks/h2_after_training.py runs/rivals-short

The other methods stand in the harness of `compressm reproduce rivals-short`. This one is no part of the library: the
reduced system is moved to a local optimum of its H2 error, by L-BFGS in closed form from the truncation, as by Sakamoto
and Sato (arXiv 2507.10078). Each model is then trained for 600 steps more, at a rate that falls from a fortieth of the
training's to zero. Test data are looked at once for each model of the table.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from refining import h2_error, of, refined
from stored import store
from torch import nn
from torch.nn import functional as F

import compressm
from compressm.adapters import Adapter, find_layers
from compressm.adapters.changes import layer_values
from compressm.cutting import Plan, Report
from compressm.lab.config import DataConfig
from compressm.lab.data.datasets import BatchOrder, SequenceData, load_data
from compressm.layers import parameter_groups
from compressm.theory.balancing import balance, truncate

STATES, STEPS, BATCH, RATE = 12, 600, 50, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of the runs of rivals-short, with the models of full")
    parser.add_argument("--out", type=Path, default=Path("results/h2_after_training.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(DataConfig(name="smnist", pool=2, validation=0.1))
    rows = [measure(folder, data) for folder in sorted(arguments.runs.glob("full-seed*"))]
    store(arguments.out, states=STATES, steps=STEPS, rate=RATE, rows=rows)


def measure(folder: Path, data: SequenceData) -> dict[str, Any]:
    """Both cuts of one model, before and after fine-tuning: accuracies in percent, and relative H2 errors."""
    seed, model = int(folder.name.removeprefix("full-seed")), compressm.load(folder / "model")
    ((name, (layer, adapter)),) = find_layers(model).items()
    assert isinstance(adapter, Adapter)
    values = layer_values(layer)
    system = adapter.read(values)
    plain = truncate(balance(system), STATES)
    error = h2_error(of(system))
    row: dict[str, Any] = {"seed": seed, "full": accuracy(model, data)}
    for way, reduction in (("truncated", plain), ("h2", refined(plain, error))):
        small = copy.deepcopy(model)
        Plan(Report((), 0.0), {name: adapter.plan(values, reduction.padded(STATES))}).apply(small)
        row[way] = {"h2_error": float(error(of(reduction.system))) ** 0.5, "after": accuracy(small, data)}
        tune(small, data, seed)
        row[way]["tuned"] = accuracy(small, data)
    print(row, flush=True)
    return row


def tune(model: nn.Module, data: SequenceData, seed: int) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, RATE, 0.01))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    order = BatchOrder(len(data.train), BATCH, seed)
    model.train()
    for step in range(STEPS):
        x, y = data.batch(data.train, order.indices(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: SequenceData) -> float:
    model.eval()
    right = sum(int((model(x).argmax(-1) == y).sum()) for x, y in data.batches(data.test, 500))
    return 100 * right / len(data.test)


if __name__ == "__main__":
    main()
