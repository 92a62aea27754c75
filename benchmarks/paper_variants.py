"""Why state dimensions may differ from the paper's: what its code does otherwise than ours, one thing at a time.

    COMPRESSM_DATA=DIRECTORY python benchmarks/paper_variants.py [--steps 5000] [--threads 1]
    COMPRESSM_DATA=DIRECTORY python benchmarks/paper_variants.py --steps 25000 --every 5000 --variants all \
        --states 28 --results results/paper_variants_small.json

Sequential MNIST with the paper's settings and no cut. ``norm``: batch norm by running statistics while training,
without scale and shift, as in Equinox; ``dropout``: one mask for all sequences of a batch; ``inputs``: pixels from 0 to
1, not standardised; ``all``: the three together. ``rate`` and ``phase`` ask what else it would take: ten times the
learning rate, and eigenvalues' phases below pi / 10 at the start instead of all around the circle.

For every variant, with 256 and with 28 states: validation accuracy (at the end, and every so many steps if asked), and
how many states hold 99, 98 and 96 % of the Hankel energy of the complex system. The second command asks whether the
three are why small models differ, which takes longer to show; `smnist` has our own curve. Writes
``results/paper_variants.json``, or the file named.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from stored import store
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.layers import LRU, GLUBlock, SequenceClassifier, parameter_groups
from compressm.training.config import load_config
from compressm.training.data import BatchOrder, SequenceData, load_data

VARIANTS = ("ours", "norm", "dropout", "inputs", "all", "rate", "phase")
TOLERANCES = (0.01, 0.02, 0.04)


class RunningNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps)`` over batch and time, by exponential averages even while training."""

    mean: Tensor
    var: Tensor

    def __init__(self, width: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum, self.started = momentum, False
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            now = torch.var_mean(x, (0, 1), correction=0)
            if not self.started:
                self.started, self.var, self.mean = True, now[0].detach(), now[1].detach()
            var = self.momentum * self.var + (1 - self.momentum) * now[0]
            mean = self.momentum * self.mean + (1 - self.momentum) * now[1]
            self.var, self.mean = var.detach(), mean.detach()
        return (x - mean) * torch.rsqrt(var + 1e-5)


class SharedDropout(nn.Module):
    """A `GLUBlock` whose dropout drops the same elements of all sequences."""

    def __init__(self, block: GLUBlock) -> None:
        super().__init__()
        self.norm, self.ssm, self.glu, self.p = block.norm, block.ssm, block.glu, block.dropout.p

    def drop(self, x: Tensor) -> Tensor:
        return x * F.dropout(torch.ones_like(x[:1]), self.p, self.training)

    def forward(self, u: Tensor) -> Tensor:
        z = self.drop(F.gelu(self.ssm(self.norm(u)), approximate="tanh"))
        return u + self.drop(F.glu(self.glu(z), -1))


def run(variant: str, states: int, a: argparse.Namespace, data: SequenceData) -> dict[str, Any]:
    """Train one variant; what it has come to."""
    if variant in ("inputs", "all"):
        data = replace(data, mean=torch.zeros_like(data.mean), std=torch.full_like(data.std, 255.0))
    torch.manual_seed(a.seed)
    phase = math.pi / 10 if variant == "phase" else 2 * math.pi
    model = SequenceClassifier(1, 10, 8, states, 1, 0.1, r_min=0.9, r_max=0.999, max_phase=phase)
    if variant in ("norm", "all"):
        model.blocks[0].norm = RunningNorm(8)
    layer: LRU = model.blocks[0].ssm  # type: ignore[assignment]
    if variant in ("dropout", "all"):
        model.blocks[0] = SharedDropout(model.blocks[0])  # type: ignore[arg-type]
    rate = 4e-3 if variant == "rate" else 4e-4
    optimizer = torch.optim.Adam(parameter_groups(model, rate), lr=rate, fused=True)
    order = BatchOrder(len(data.train), 50, a.seed)

    def accuracy() -> float:
        return float(data.correct(model, data.validation, 500)) / len(data.validation)

    curve = []
    for step in range(a.steps):
        model.train()  # `accuracy` leaves it evaluating
        u, y = data.batch(data.train, order.indices(step))
        loss = F.cross_entropy(model(u), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if a.every and (step + 1) % a.every == 0:
            curve.append({"step": step + 1, "validation_accuracy": accuracy()})
            print(variant, states, curve[-1], flush=True)
    spectrum = compressm.analyze(layer, method="complex").layers[0]
    return {
        "variant": variant,
        "states": states,
        "validation_accuracy": accuracy(),
        "curve": curve,
        "ranks": {str(tau): spectrum.states_for(tau) for tau in TOLERANCES},
        "largest_hsv": float(spectrum.hsv[0]),
        "largest_radius": float((-layer.nu_log.detach().exp()).exp().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--states", nargs="+", type=int, default=(256, 28))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("results/paper_variants.json"))
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    data = load_data(load_config("smnist").data)
    found = []
    for variant in a.variants:
        for states in a.states:
            found.append(run(variant, states, a, data))
            print(found[-1], flush=True)
    store(a.results, seed=a.seed, steps=a.steps, threads=a.threads, variants=found)


if __name__ == "__main__":
    main()
