"""What observing costs: training steps with and without it, in turn, for models of every family.

    python benchmarks/observing_cost.py [--families lru,mamba2] [--rounds 8] [--out FILE]

A classifier of two layers of width 64 is trained on batches of 32 sequences of 128 tokens, on one thread. Steps in
which nothing is observed, steps in which the gradients of the loss are (``gramians="loss"``), and steps in which the
states of selective layers are (both choices of ``gramians``) follow each other in turn. The time of a kind of step is
the least CPU time of all rounds, so that other work on the machine counts as little as possible.

``share`` is the share of the time of 20,000 steps that observing the loss takes at the default schedule, four cuts with
50 observed steps before each. ``kept`` is the size of what the observer holds just before a cut, after 50 observed
steps: its sums, and the samples from which it predicts. ``peak`` is how much more memory the observed step needs at its
peak, besides.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from stored import store
from torch import Tensor
from torch.nn import functional as F

from compressm.layers import SequenceClassifier, parameter_groups
from compressm.theory.rank_rule import RankRule
from compressm.training.observations import Observations

FAMILIES: dict[str, dict[str, Any]] = {
    "lru": {"d_state": 128},
    "s5": {"d_state": 128},
    "s4d": {"d_state": 32},
    "mamba": {"d_state": 64},
    "mamba2": {"d_state": 64, "head_dim": 32},
    "linear_attention": {"d_state": 64, "n_heads": 2},
    "gated_linear_attention": {"d_state": 64, "n_heads": 2},
    "delta_net": {"d_state": 64, "n_heads": 2, "gated": True},
    "rg_lru": {"d_state": 128},
}
KINDS = ("plain", "loss", "states")
STEPS, OBSERVED = 20_000, 4 * 50 + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/observing_cost.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.families.split(",")
    old = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    rows = [row for row in old if row["family"] not in names]
    for name in names:
        rows.append(cost(name, arguments.rounds))
        rows.sort(key=lambda row: list(FAMILIES).index(row["family"]))
        store(arguments.out, rows=rows)
    print(table(rows))


def cost(family: str, rounds: int) -> dict[str, Any]:
    """The row of one family."""
    torch.manual_seed(0)
    model = SequenceClassifier(1, 10, d_model=64, n_layers=2, layer=family, dropout=0.0, **FAMILIES[family]).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.01))
    batches = [(torch.randn(32, 128, 1), torch.randint(10, (32,))) for _ in range(4)]
    observations = Observations(model, RankRule(states=8), "loss")

    def step(kind: str, number: int) -> None:
        observations.observe(kind == "states", kind == "loss", number)
        x, y = batches[number % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):  # the first round warms up
        for kind in KINDS:
            started = time.process_time()
            step(kind, number)
            times[kind].append(time.process_time() - started)
    plain, loss, states = (1e3 * min(times[kind][1:]) for kind in KINDS)
    peaks = {kind: peak(lambda kind=kind: step(kind, 0)) for kind in KINDS}
    sizes: list[int] = []
    observations.reset()
    for number in range(2):
        step("loss", number)
        sizes.append(size(observations.state_dict()["gradients"]))
    return {
        "family": family, **FAMILIES[family], "rounds": rounds, "step_ms": plain, "observed_ms": loss,
        "states_observed_ms": states, "share": OBSERVED * (loss - plain) / (STEPS * plain),
        "kept_bytes": sizes[0] + 49 * (sizes[1] - sizes[0]),
        "peak_bytes": peaks["loss"] - peaks["plain"], "step_peak_bytes": peaks["plain"],
    }  # fmt: skip


def peak(action: Any) -> int:
    """The most memory that torch held at once during an action, in bytes, beyond what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        action()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def size(state: Any) -> int:
    """Bytes of all tensors in a state dict."""
    return sum(one.numel() * one.element_size() for one in tensors(state))


def tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping | list | tuple):
        inner: Any = state.values() if isinstance(state, Mapping) else state
        for value in inner:
            yield from tensors(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| | states | step | with the loss observed | share of 20,000 steps | kept | peak |", "|---" * 7 + "|"]
    for row in rows:
        more = row["observed_ms"] / row["step_ms"] - 1
        kept, most = row["kept_bytes"] / 2**20, row["peak_bytes"] / 2**20
        lines.append(
            f"| {row['family']} | {row['d_state']} | {row['step_ms']:.0f} ms | {more:+.0%} | {row['share']:.2%} "
            f"| {kept:.1f} MB | {most:.1f} MB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
