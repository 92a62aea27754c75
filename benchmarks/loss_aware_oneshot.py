"""What a cut by the data and the loss costs right after it, beside cuts by white noise, and whether it was predicted.

    python benchmarks/loss_aware_oneshot.py --data DIRECTORY [--steps 2000] [--out FILE]

An LRU of 256 states learns MNIST as sequences of 196 pixels (2 x 2 pixels averaged). Copies of it are then cut once, by
white noise, by the states under the data (P), by the loss's adjoints (Q), and by both. Nothing is trained after the
cut. Loss, accuracy and the Kullback-Leibler divergence from the uncut model are those on validation data that neither
training nor the cuts have seen. Beside the divergence stand the one predicted from the observed sequences (see
`compressm.observing.damage`), and the estimate by covariances (see `compressm.theory.covariance`). The directory holds
the original MNIST files; by default COMPRESSM_DATA names it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from stored import store
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import Adapter, find_layers
from compressm.adapters.changes import layer_values, write
from compressm.lab.config import DataConfig
from compressm.lab.data.datasets import BatchOrder, SequenceData, load_data
from compressm.layers import SequenceClassifier, parameter_groups
from compressm.observing.damage import LinearSample, divergence, linear_changes
from compressm.observing.loss_evidence import gather_evidence
from compressm.theory.balancing import Reduction, balance, truncate
from compressm.theory.covariance import balance_covariances, predicted_damage, truncate_covariances
from compressm.theory.evidence import Covariances
from compressm.theory.gramians import real_gramians
from compressm.theory.systems import DiagonalSystem

STATES = (40, 28, 16, 12, 8, 6)
LAYER = "blocks.0.ssm"
METHODS = ("white", "P from data", "Q from loss", "both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="directory with the MNIST files")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--observed", type=int, default=16, help="training batches of 50 sequences to observe")
    parser.add_argument("--out", type=Path, default=Path("results/loss_aware_oneshot.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = None if arguments.data is None else str(arguments.data)
    data = load_data(DataConfig(name="smnist", pool=2, validation=0.1, root=root))
    model, seconds = trained(data, arguments.steps, arguments.seed)
    held_out = data.batch(data.validation, torch.arange(2000))
    evidence = {
        f"{count} batches, {labels} labels": observed(model, data, count, labels)
        for count, labels in ((arguments.observed, "sampled"), (1, "the data's"))
    }
    alphas = {source: shares(model, seen.moments) for source, seen in evidence.items()}
    before = predictions(model, held_out[0])
    rows = list(compare(model, evidence, held_out, before))
    uncut = evaluate(before, before, held_out[1])
    store(
        arguments.out, data=data.label, steps=arguments.steps, seed=arguments.seed, training_seconds=round(seconds),
        observing_seconds_per_batch={source: seen.seconds for source, seen in evidence.items()}, alphas=alphas,
        uncut=uncut, states_for_98_percent=needed(model, evidence), rows=rows,
    )  # fmt: skip
    for row in ({"method": "uncut", **uncut}, *rows):
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})


def trained(data: SequenceData, steps: int, seed: int) -> tuple[nn.Module, float]:
    """An LRU of 256 states after so many steps, and the seconds they took."""
    torch.manual_seed(seed)
    model = SequenceClassifier(1, 10, d_model=8, d_state=256, n_layers=1, dropout=0.1, r_min=0.9, r_max=0.999)
    optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3, 0.01))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 200))
    order, started = BatchOrder(len(data.train), 50, seed), time.perf_counter()
    for step in range(steps):
        x, y = data.batch(data.train, order.indices(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval(), time.perf_counter() - started


def observed(model: nn.Module, data: SequenceData, count: int, labels: str) -> Observed:
    """What the model's layer does over some training batches."""
    batches = [data.batch(data.train, torch.arange(i * 50, (i + 1) * 50)) for i in range(count)]
    started = time.perf_counter()
    torch.manual_seed(1)
    if labels == "sampled":
        observer = gather_evidence(model, batches, keep=50 * count)
    else:
        losses = functools.partial(F.cross_entropy, reduction="none")
        observer = gather_evidence(model, batches, lambda out, batch: losses(out, batch[1]), keep=50 * count)
    seconds = (time.perf_counter() - started) / count
    moments, passes = observer.evidence()[LAYER], observer.samples()[LAYER]
    assert isinstance(moments, Covariances)
    return Observed(moments, [calls for calls in passes if isinstance(calls, tuple)], seconds)


@dataclass(frozen=True)
class Observed:
    """Moments, the calls that they came from, and the seconds that a batch took."""

    moments: Covariances
    passes: list[tuple[LinearSample, ...]]
    seconds: float


def compare(
    model: nn.Module, evidence: dict[str, Observed], held_out: tuple[Tensor, Tensor], before: Tensor
) -> Iterator[dict[str, Any]]:
    """A row for every method, evidence and size."""
    system, layer = read(model), layer_of(model)[0]
    for states, (source, seen) in itertools.product(STATES, evidence.items()):
        full = source == next(iter(evidence))
        for method in METHODS if full else ("both",):
            for alpha in (None, 0.0) if full and method == "both" else (None,):
                reduction = cut(system, seen.moments, method, states, alpha)
                changes = [linear_changes(layer, system, reduction.system, calls) for calls in seen.passes]
                smaller = copy.deepcopy(model)
                write_into(smaller, reduction)
                yield {
                    "states": states, "method": method, "observed": source, "alpha": alpha,
                    "kept": reduction.system.n, "fallback": getattr(reduction.certificate, "fallback", None),
                    "estimate": float(predicted_damage(seen.moments, reduction.left, reduction.right)),
                    "predicted": divergence([torch.cat(changes)]),
                    **evaluate(predictions(smaller, held_out[0]), before, held_out[1]),
                }  # fmt: skip


def cut(system: DiagonalSystem, seen: Covariances, method: str, states: int, alpha: float | None) -> Reduction:
    """A reduction by one of the methods."""
    if method == "white":
        return truncate(balance(system), states)
    P, Q = real_gramians(system)
    if method == "P from data":
        seen = replace(seen, adjoints=Q * seen.tokens)
    if method == "Q from loss":
        seen = replace(seen, states=P * seen.tokens)
    return truncate_covariances(balance_covariances(system, seen, alpha), states)


def needed(model: nn.Module, evidence: dict[str, Observed]) -> dict[str, int]:
    """How many states hold 98 % of the energy."""
    system = read(model)
    energies = {"white": balance(system).energy}
    energies |= {source: balance_covariances(system, seen.moments).energy for source, seen in evidence.items()}
    return {name: int((e.cumsum(0) < 0.98 * e.sum()).sum()) + 1 for name, e in energies.items()}


def shares(model: nn.Module, seen: Covariances) -> dict[str, float]:
    """Shares of white noise in P and Q."""
    balancing = balance_covariances(read(model), seen)
    return {"P": float(balancing.alpha_P), "Q": float(balancing.alpha_Q)}


def layer_of(model: nn.Module) -> tuple[nn.Module, Adapter]:
    layer, adapter = next(iter(find_layers(model).values()))
    assert isinstance(adapter, Adapter)
    return layer, adapter


def read(model: nn.Module) -> DiagonalSystem:
    layer, adapter = layer_of(model)
    return adapter.read(layer_values(layer))


def write_into(model: nn.Module, reduction: Reduction) -> None:
    layer, adapter = layer_of(model)
    write(layer, adapter.plan(layer_values(layer), reduction))


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """Logarithms of the classes' probabilities."""
    return torch.cat([model(part).log_softmax(-1) for part in x.split(500)])


def evaluate(now: Tensor, before: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, loss, and divergence of predictions from others, in nats per sequence."""
    divergence = (before.exp() * (before - now)).sum(-1).mean()
    return {
        "accuracy": 100 * float((now.argmax(-1) == y).float().mean()),
        "loss": float(F.nll_loss(now, y)),
        "divergence": float(divergence),
    }


if __name__ == "__main__":
    main()
