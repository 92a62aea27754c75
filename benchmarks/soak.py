"""Cuts and roll-backs without end: whether memory and speed hold still.

    python benchmarks/soak.py [--cuts 200] [--cycles 1000] [--json results/soak.json] [--picture docs/images/soak.svg]

One process trains an LRU and a Mamba together, with AdamW, a schedule and averaged weights. Rounds of four cuts follow
one another; every second cut is reported as a setback, so that it is undone. After a round everything is set back to
its start at full size, and the next begins. Then a thousand times: compress once, set back. After every round memory
and the number of live tensors, hooks and parameters are counted, and the steps at full size are timed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import torch
from rich.progress import track
from stored import store
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compressm import Compressor, compress
from compressm.layers import SequenceClassifier, parameter_groups
from compressm.training.snapshot import Training

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BETWEEN = 12  # steps between two cuts


class Both(nn.Module):
    """An LRU and a Mamba, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.lru = SequenceClassifier(1, 3, d_model=16, d_state=64, n_layers=2, norm="layer")
        self.mamba = SequenceClassifier(1, 3, d_model=16, d_state=64, layer="mamba")

    def forward(self, u: Tensor) -> Tensor:
        return self.lru(u) + self.mamba(u)


class Soak:
    """A training whose parts can be set back to how they were."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Both()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 1e-3))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10_000)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        self.training = Training(self.model, self.optimizer, [self.average], self.scheduler)
        self.step()
        self.start = self.training.snapshot()
        self.process = psutil.Process()
        self.examinations = count()

    def step(self) -> float:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(torch.randn(8, 64, 1)), torch.randint(0, 3, (8,))).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.average.update_parameters(self.model)
        return time.perf_counter() - began

    def metric(self, model: nn.Module) -> float:
        """Called before and after each cut: falls at every second cut, so that this one is undone."""
        return -1.0 if next(self.examinations) % 4 == 3 else 1.0

    def round(self) -> dict[str, Any]:
        """Four cuts, two of which are undone, and back to the start."""
        compressor = Compressor(
            self.model, self.optimizer, 5 * BETWEEN, fraction=0.2, cuts=4, window=0.8, max_drop=0.0,
            evaluate=self.metric, scheduler=self.scheduler, followers=[self.average], check_after=3,
        )  # fmt: skip
        full = [self.step() for _ in range(BETWEEN)]
        small: list[float] = []
        while not compressor.done:
            small.append(self.step())
            compressor.step()
        kinds = [event.kind for event in compressor.history]
        self.training.restore(self.start)
        return {
            "cuts": kinds.count("cut"), "rolled_back": kinds.count("rolled_back"), **self.count(),
            "full_step_seconds": statistics.median(full), "small_step_seconds": statistics.median(small[-5:]),
        }  # fmt: skip

    def cycle(self) -> None:
        """Compress once, and back."""
        compress(self.model.lru, fraction=0.5, optimizer=self.optimizer)
        self.training.restore(self.start)

    def count(self) -> dict[str, int]:
        gc.collect()
        warnings.filterwarnings("ignore", category=FutureWarning)  # of what is merely looked at below
        alive = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
        hooks = sum(
            len(getattr(module, name))
            for module in self.model.modules()
            for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        )
        return {
            "rss_bytes": self.process.memory_info().rss, "tensors": len(alive), "hooks": hooks,
            "tensor_bytes": sum(tensor.numel() * tensor.element_size() for tensor in alive),
            "optimizer_entries": len(self.optimizer.state),
        }  # fmt: skip


def picture(path: Path, rounds: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    done, total = [], 0
    for one in rounds:
        total += one["cuts"]
        done.append(total)
    axes[0].plot(done, [one["rss_bytes"] / 1e6 for one in rounds], color="#0b6e4f")
    axes[0].set(title="memory of the process, MB")
    axes[1].plot(done, [one["tensors"] for one in rounds], color="#3d5a80")
    axes[1].set(title="live tensors")
    for name, label, colour in (("full", "before cuts", "#888888"), ("small", "after", "#c8553d")):
        axes[2].plot(done, [1e3 * one[f"{name}_step_seconds"] for one in rounds], color=colour, label=label)
    axes[2].set(title="a training step, ms")
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.set_ylim(0, 1.15 * axis.dataLim.y1)
        axis.set_xlabel("cuts made, half of them undone")
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def growth(values: list[float]) -> float:
    """How much more at the end than after the first tenth: medians of a tenth each."""
    tenth = max(1, len(values) // 10)
    return statistics.median(values[-tenth:]) / statistics.median(values[tenth : 2 * tenth]) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    soak, rounds = Soak(), list[dict[str, Any]]()
    for _ in track(range(max(20, arguments.cuts // 4)), "rounds of cuts"):
        rounds.append(soak.round())
    cycles = [soak.count()]
    for index in track(range(arguments.cycles), "compress, restore"):
        soak.cycle()
        if (index + 1) % 10 == 0:
            cycles.append(soak.count())
    grown = {
        name: round(growth([float(one[name]) for one in rounds]), 4)
        for name in ("rss_bytes", "tensors", "tensor_bytes", "hooks", "full_step_seconds", "small_step_seconds")
        if rounds[0][name]
    }
    grown_in_cycles = {name: round(growth([float(c[name]) for c in cycles]), 4) for name in ("rss_bytes", "tensors")}
    cuts, undone = (sum(one[name] for one in rounds) for name in ("cuts", "rolled_back"))
    if arguments.json:
        store(
            arguments.json, cuts=cuts, rolled_back=undone, cycles=arguments.cycles, growth=grown,
            growth_in_cycles=grown_in_cycles, rounds=rounds,
        )  # fmt: skip
    if arguments.picture:
        picture(arguments.picture, rounds)
    print(f"{cuts} cuts, {undone} undone, {arguments.cycles} cycles; growth {grown}, in cycles {grown_in_cycles}")
    # Speed is for the eye: it depends on what else runs. Memory must hold still anywhere.
    leaks = [
        f"{name} grew by {share:.1%}"
        for name, share in [*grown.items(), *grown_in_cycles.items()]
        if "seconds" not in name and share > (0.05 if name == "rss_bytes" else 0.0)
    ]
    if leaks:
        raise SystemExit("; ".join(leaks))


if __name__ == "__main__":
    main()
