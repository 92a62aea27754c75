"""S4, diagonal plus low rank, shrunk while it trains: distilled by the Hankel matrix of its filters, then cut.

    COMPRESSM_DATA=DIRECTORY python benchmarks/s4.py [--steps 3000] [--threads 1]

Sequential MNIST in 196 steps, two blocks of width 32. ``big`` is an S4 of 32 states throughout; ``shrunk`` one that
after a tenth of the steps becomes an S4D of 8 states by its filters; ``small`` an S4 of 8 states; ``random`` is
distilled to 32 states and cut to 8 of them at random. Test data are looked at once, at the end. Every run writes
``results/s4/ARM.json``, and one whose file is there is not repeated.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from stored import store
from torch import nn
from torch.nn import functional as F

import compressm
from compressm.lab.config import load_config
from compressm.lab.data.datasets import BatchOrder, SequenceData, load_data
from compressm.lab.runs.tasks import learning_of, scores_on
from compressm.layers import SequenceClassifier, parameter_groups

CLASSES = learning_of("classification", None)
ARMS = ("big", "shrunk", "small", "random")


def optimizer_for(model: nn.Module, a: argparse.Namespace, first: int) -> tuple[torch.optim.Optimizer, object]:
    """AdamW and its schedule from a step on: warm-up over a twentieth of the steps, then a cosine."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 3e-3, 0.01), lr=3e-3)
    warmup = a.steps // 20

    def factor(step: int) -> float:
        step += first
        return min((step + 1) / warmup, (1 + math.cos(math.pi * step / a.steps)) / 2)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def run(arm: str, a: argparse.Namespace, data: SequenceData) -> None:
    """One arm, to its file."""
    torch.manual_seed(a.seed)
    length, states = data.train.x.shape[1], a.small if arm == "small" else a.big
    model = SequenceClassifier(1, 10, 32, states, 2, 0.0, "batch", "s4", max_length=length)
    order = BatchOrder(len(data.train), 32, a.seed)
    (optimizer, scheduler), seconds, errors = optimizer_for(model, a, 0), list[float](), list[float]()
    model.train()
    started = time.perf_counter()
    for step in range(a.steps):
        if step == a.steps // 10 and arm in ("shrunk", "random"):
            reports = compressm.distil(model, order=2 * (a.small if arm == "shrunk" else a.big))
            errors = [report.relative_h2_error for report in reports]
            if arm == "random":
                compressm.compress(model, states=a.small, selection="random")
            optimizer, scheduler = optimizer_for(model, a, step)
        before = time.perf_counter()
        u, y = data.batch(data.train, order.indices(step))
        loss = F.cross_entropy(model(u), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()  # type: ignore[attr-defined]
        seconds.append(time.perf_counter() - before)
        if step % max(1, a.steps // 10) == 0:
            print(f"{arm}, step {step}: loss {loss.item():.3f}", flush=True)
    total = time.perf_counter() - started
    store(
        a.results / f"{arm}.json",
        arm=arm,
        seed=a.seed,
        steps=a.steps,
        threads=a.threads,
        state_dims=[int(block.ssm.d_state) for block in model.blocks],  # type: ignore[union-attr]
        distilled_relative_h2_error=errors or None,
        validation_accuracy=float(scores_on(CLASSES, model, data, data.validation, 500).mean()),
        test_accuracy=float(scores_on(CLASSES, model, data, data.test, 500).mean()),
        train_seconds=total,
        step_milliseconds=1000 * float(np.median(seconds[len(seconds) * 3 // 4 :])),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--big", type=int, default=32)
    parser.add_argument("--small", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("results/s4"))
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    data = load_data(load_config("smnist-mamba").data)
    for arm in a.arms:
        if not (a.results / f"{arm}.json").exists():
            run(arm, a, data)


if __name__ == "__main__":
    main()
