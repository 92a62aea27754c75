"""Ten probes of each task, with other seeds each time: are they right, and what do they cost?

    python benchmarks/probe.py DATA --json results/probe.json
    python benchmarks/probe.py DATA --tasks fsdd --whole 1200 --json results/probe_whole.json

DATA is a folder with ``mnist/``, ``cifar10/`` and ``fsdd/fsdd.tar.gz``. State matters on sequential MNIST and CIFAR-10
(both averaged over 2 x 2 pixels), where small models from scratch stay behind (`results/smnist-quarter/`,
`results/scifar-small/`), and not on spoken digits (`results/probe_whole.json`). Every short training that is done is
stored in the folder ``--parts``, so that a run that was killed goes on; probes that the result file has already are not
made again. One thread. Shares of the training's time are
by CPU time, with evaluations, since the machine may run other programs; they are not known of a probe that a kill
interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cushion_curves import spoken_digits
from stored import store
from torch import Tensor, nn
from torch.nn import functional as F

from compressm import Probe, probe
from compressm.lab.config import DataConfig
from compressm.lab.data.datasets import load_data
from compressm.layers import SequenceClassifier, parameter_groups
from compressm.training.probe import Task

SEEDS, VALIDATION = 3, 1000  # seeds of each probe, validation examples


@dataclass(frozen=True)
class Setting:
    """A training that somebody means to make, and its probe."""

    states: int
    width: int
    layers: int
    rate: float
    recurrence: float  # factor on the rate for the recurrences
    decay: float
    schedule: str
    batch: int
    r_min: float
    total_steps: int
    steps: int
    expected: str


SETTINGS = {
    "smnist": Setting(256, 8, 1, 4e-4, 1.0, 0.0, "constant", 50, 0.9, 50_000, 160, "state matters"),
    "fsdd": Setting(128, 32, 2, 4e-3, 0.5, 0.05, "cosine", 32, 0.5, 15_000, 64, "train small"),
    "scifar": Setting(192, 32, 2, 1e-3, 0.25, 0.05, "cosine", 50, 0.9, 15_000, 80, "state matters"),
}


class Experiment:
    """A task with its data: builds, trains and evaluates models."""

    def __init__(self, name: str, data: Path) -> None:
        self.name, self.folder, self.setting = name, data, SETTINGS[name]

    @cached_property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sequences and labels to learn from, and to validate on."""
        if self.name == "fsdd":
            task = spoken_digits(self.folder / "fsdd" / "fsdd.tar.gz")
            return task.x, task.y, task.valid_x[:VALIDATION], task.valid_y[:VALIDATION]
        found = load_data(DataConfig(name=self.name, validation=0.1, pool=2, root=str(self.folder)))
        chosen = torch.randperm(len(found.validation), generator=torch.Generator().manual_seed(0))[:VALIDATION]
        return *found.batch(found.train, torch.arange(len(found.train))), *found.batch(found.validation, chosen)

    def build(self, states: int) -> nn.Module:
        s = self.setting
        return SequenceClassifier(
            self.data[0].shape[-1], 10, s.width, states, n_layers=s.layers, dropout=0.1, r_min=s.r_min, r_max=0.999
        )

    def train(self, model: nn.Module, task: Task) -> None:
        s, (x, y, *_) = self.setting, self.data
        kind = torch.optim.AdamW if s.decay else torch.optim.Adam
        optimizer = kind(parameter_groups(model, task.rate * s.rate, s.decay, s.recurrence))
        warm = max(1, task.steps // 10)

        def factor(step: int) -> float:
            if s.schedule == "constant":
                return 1.0
            rest = (step - warm) / (task.steps - warm)
            return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * rest))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for _ in range(task.steps):
            batch = torch.randint(0, len(x), (s.batch,))
            loss = F.cross_entropy(model.train()(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Tensor:
        *_, x, y = self.data
        return torch.cat([model.eval()(part).argmax(-1) for part in x.split(500)]) == y

    def step_seconds(self, steps: int = 8) -> float:
        """CPU time of a training step of the long training."""
        model = self.build(self.setting.states)
        self.train(model, Task(2, 0, 1.0, self.setting.states))
        started = time.process_time()
        self.train(model, Task(steps, 0, 1.0, self.setting.states))
        return (time.process_time() - started) / steps


def one_probe(experiment: Experiment, number: int, folder: Path) -> tuple[Probe, float]:
    """A probe with seeds of its own, and its CPU time with evaluations."""
    started = time.process_time()
    s = experiment.setting
    found = probe(
        experiment.build, experiment.train, experiment.evaluate, states=s.states, steps=s.steps,
        total_steps=s.total_steps, seeds=range(SEEDS * number, SEEDS * (number + 1)), folder=folder, quiet=True,
    )  # fmt: skip
    return found, time.process_time() - started


def row(name: str, experiment: Experiment, number: int, parts: Path) -> dict[str, Any]:
    """The result of a probe. Short trainings that are stored are not made again."""
    path = parts / f"{name}-{number}.json"
    resumed = any((parts / name).glob(f"*-seed{SEEDS * number}-*"))
    found, seconds = one_probe(experiment, number, parts / name)
    if not path.exists():
        share = None if resumed else seconds / (experiment.setting.total_steps * experiment.step_seconds())
        path.write_text(json.dumps({"cpu_share": share}))
    share = json.loads(path.read_text())["cpu_share"]
    print(f"{name} {number}, share of the CPU time {share}\n{found}", flush=True)
    return {"task": name, "probe": number, "cpu_share": share, **found.to_dict(), "tried": tried(parts / name, number)}


def tried(folder: Path, number: int) -> list[dict[str, Any]]:
    """The metrics at all rates that were tried, with the first seed of a probe."""
    made = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*-seed{SEEDS * number}-*.json"))]
    return [{key: one[key] for key in ("states", "rate", "metric")} for one in made]


def whole(experiment: Experiment, steps: int) -> list[dict[str, Any]]:
    """The metric after whole trainings of the largest and of the smallest size, at the setting's own rates."""
    ends: list[dict[str, Any]] = []
    for states in (experiment.setting.states, experiment.setting.states // 16):
        torch.manual_seed(0)
        model = experiment.build(states)
        experiment.train(model, Task(steps, 0, 1.0, states))
        ends.append({"states": states, "steps": steps, "metric": float(experiment.evaluate(model).float().mean())})
        print(ends[-1], flush=True)
    return ends


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often each answer was given on each task, and what it cost."""
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(row["task"] for row in rows):
        ours = [row for row in rows if row["task"] == name]
        tasks[name] = {
            "expected": SETTINGS[name].expected,
            "probes": len(ours),
            "right": sum(row["answer"] == SETTINGS[name].expected for row in ours),
            "not_known": sum(row["answer"] == "not known" for row in ours),
            "cpu_share": [row["cpu_share"] for row in ours],
            "start_from": [row["start_from"] for row in ours],
            "behind": [row["sizes"][-1]["behind"]["value"] / row["learnt"] for row in ours],
        }
    return tasks


def table(tasks: dict[str, Any]) -> str:
    """The summary for docs/probe.md."""
    lines = [
        "| task | sizes | steps of | right answer | right | not known | wrong | smallest size behind by | time |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in tasks.items():
        s, shares = SETTINGS[name], [share for share in found["cpu_share"] if share is not None]
        wrong = found["probes"] - found["right"] - found["not_known"]
        lines.append(
            f"| {name} | {s.states}, {s.states // 4}, {s.states // 16} | {s.steps} of {s.total_steps:,} | "
            f"{found['expected']} | {found['right']} of {found['probes']} | {found['not_known']} | {wrong} | "
            f"{min(found['behind']):.0%} to {max(found['behind']):.0%} | "
            f"{min(shares, default=math.nan):.1%} to {max(shares, default=math.nan):.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Probe tasks again and again, and count right answers.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path, default=Path("results/probe.json"))
    parser.add_argument("--tasks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--probes", type=int, default=10)
    parser.add_argument("--parts", type=Path, default=Path("runs/probe"), help="where finished trainings are kept")
    parser.add_argument("--finished", action="store_true", help="begin no probe; evaluate those that are finished")
    parser.add_argument("--whole", type=int, default=0, help="instead, so many steps of the largest and smallest size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.whole:
        ends = {name: whole(Experiment(name, arguments.data), arguments.whole) for name in arguments.tasks}
        store(arguments.json, whole_trainings=ends)
        return
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text())["probes"] if arguments.json.exists() else []
    made = {(row["task"], row["probe"]) for row in rows}
    wanted = [(name, number) for name in arguments.tasks for number in range(arguments.probes)]
    experiments = {name: Experiment(name, arguments.data) for name in arguments.tasks}
    for name, number in wanted:
        finished = (arguments.parts / f"{name}-{number}.json").exists()
        if (name, number) in made or (arguments.finished and not finished):
            continue
        rows.append(row(name, experiments[name], number, arguments.parts))
        rows.sort(key=lambda one: (list(SETTINGS).index(one["task"]), one["probe"]))
        store(arguments.json, seeds_per_probe=SEEDS, validation=VALIDATION, tasks=summary(rows), probes=rows)
    print(table(summary(rows)))


if __name__ == "__main__":
    main()
