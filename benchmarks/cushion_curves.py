"""Forty trainings without any cut, evaluated often: what the metric does when nothing is cut.

    python benchmarks/cushion_curves.py DATA --output results/cushion_curves.npz

DATA is a folder with ``mnist/`` (the four idx files) and ``fsdd/fsdd.tar.gz``. Four data sets, ten trainings each,
which differ in seed, layer, optimizer, learning rate and schedule. `benchmarks/cushion.py` plays cuts on the curves.

A run of ``UNITS`` units is evaluated after every unit of its first quarter, and after every fifth until four fifths.
Stored is whether each validation example was classified correctly at each evaluation, as bits.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import tarfile
import time
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.lab.config import DataConfig
from compressm.lab.data.datasets import load_data
from compressm.layers import SequenceClassifier, parameter_groups

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "spoken_digits"))

UNITS, SPARSE, SEEDS = 320, 5, 10
DENSE_UNTIL, SPARSE_UNTIL = UNITS // 4, UNITS * 4 // 5
TASKS = ("digits", "synthetic", "smnist", "fsdd")
LAYERS = ("lru", "s5", "s4d", "lru", "mamba")


@dataclass(frozen=True)
class Task:
    """Sequences to learn from, sequences to validate on, and the length of a run."""

    x: Tensor  # shape: (N, length, channels)
    y: Tensor  # shape: (N,)
    valid_x: Tensor  # shape: (M, length, channels)
    valid_y: Tensor  # shape: (M,)
    steps_per_unit: int
    batch: int


def tasks(name: str, data: Path) -> Task:
    """A data set in training and validation sequences; at most 2,000 of the latter."""
    if name == "synthetic":
        x, y = synthetic(4000, seed=1)
        return Task(x[:2000], y[:2000], x[2000:], y[2000:], 4, 32)
    if name == "fsdd":
        return spoken_digits(data / "fsdd" / "fsdd.tar.gz")
    if name == "digits":
        found = load_data(DataConfig(name="digits", validation=0.25))
        x = torch.cat([found.batch(s, torch.arange(len(s)))[0] for s in (found.train, found.validation, found.test)])
        y = torch.cat([found.batch(s, torch.arange(len(s)))[1] for s in (found.train, found.validation, found.test)])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        return Task(x[order[:797]], y[order[:797]], x[order[797:]], y[order[797:]], 5, 32)
    found = load_data(DataConfig(name="smnist", validation=0.1, pool=2, root=str(data / "mnist")))
    x, y = found.batch(found.train, torch.arange(len(found.train)))
    valid_x, valid_y = found.batch(found.validation, torch.arange(2000))
    return Task(x, y, valid_x, valid_y, 5, 32)


def synthetic(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three noisy channels of 40 samples: oscillations whose frequencies and phases depend on one of six classes."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 6, (count,), generator=draw)
    t = torch.arange(40.0)
    frequency = 0.20 + 0.03 * y[:, None, None] + 0.012 * torch.randn(count, 1, 1, generator=draw)
    phase = torch.rand(count, 1, 1, generator=draw) * 2 * math.pi + torch.arange(3.0)[None, None] * (
        0.5 + 0.2 * y[:, None, None]
    )
    x = torch.sin(2 * math.pi * frequency * t[None, :, None] + phase)
    return x + 1.0 * torch.randn(count, 40, 3, generator=draw), y


def recordings(archive: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Log mel bands of every second frame of all spoken digits, 40 frames; the digits; and which take of it each is."""
    from recognise import frames, log_mel

    clips: list[Tensor] = []
    digits: list[int] = []
    takes: list[int] = []
    with tarfile.open(archive) as tar:
        for member in sorted((m for m in tar.getmembers() if m.name.endswith(".wav")), key=lambda m: m.name):
            content = tar.extractfile(member)
            assert content is not None
            with wave.open(io.BytesIO(content.read())) as sound:
                samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(np.float32) / 32768
            bands = np.stack([log_mel(frame) for frame in frames(samples)[::2][:40]])
            heard = torch.as_tensor(bands, dtype=torch.float32)
            clips.append(F.pad(heard, (0, 0, 0, 40 - len(heard)), value=float(heard.min())))
            digit, _, take = Path(member.name).stem.split("_")
            digits.append(int(digit))
            takes.append(int(take))
    return torch.stack(clips), torch.tensor(digits), torch.tensor(takes)


def spoken_digits(archive: Path) -> Task:
    """1,000 recordings to learn from, 2,000 to validate on."""
    x, y, _ = recordings(archive)
    x = (x - x.mean((0, 1))) / x.std((0, 1))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return Task(x[:1000], y[:1000], x[1000:], y[1000:], 3, 32)


def evaluated_at() -> list[int]:
    """The units after which a run is evaluated."""
    return [*range(1, DENSE_UNTIL + 1), *range(DENSE_UNTIL + SPARSE, SPARSE_UNTIL + 1, SPARSE)]


def settings(task: str, seed: int) -> dict[str, Any]:
    """What differs between the ten trainings of a task."""
    kind, rate, schedule = [
        ("adam", 5e-3, "constant"), ("adamw", 1.5e-2, "cosine"), ("sgd", 1e-1, "cosine"), ("adam", 1.5e-2, "constant"),
    ][seed % 4]  # fmt: skip
    return {"layer": LAYERS[(seed + TASKS.index(task)) % 5], "optimizer": kind, "lr": rate, "schedule": schedule}


def train(task: Task, seed: int, options: dict[str, Any]) -> NDArray[np.bool_]:
    """One training without cuts.

    Returns:
        whether each validation example was right at each evaluation, shape ``(evaluations, M)``.
    """
    torch.manual_seed(seed)
    classes = int(task.y.max()) + 1
    norm = None if options["layer"] == "mamba" else "batch"
    width = 16 if options["layer"] != "mamba" else 8
    slow: dict[str, float] = {"r_min": 0.9, "max_phase": 0.6} if options["layer"] == "lru" else {}
    model = SequenceClassifier(
        task.x.shape[-1], classes, width, 32, layer=options["layer"], norm=norm, dropout=0.1, **slow
    )
    groups = parameter_groups(model, options["lr"], 0.01, 0.5)
    optimizer = {
        "adam": lambda: torch.optim.Adam(groups),
        "adamw": lambda: torch.optim.AdamW(groups),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9),
    }[options["optimizer"]]()
    steps = UNITS * task.steps_per_unit

    def factor(step: int) -> float:
        if options["schedule"] == "constant":
            return 1.0
        warm = steps // 10
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    due, rows = set(evaluated_at()), []
    for step in range(1, SPARSE_UNTIL * task.steps_per_unit + 1):
        batch = torch.randint(0, len(task.x), (task.batch,))
        loss = F.cross_entropy(model.train()(task.x[batch]), task.y[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % task.steps_per_unit == 0 and step // task.steps_per_unit in due:
            rows.append(correct(model, task))
    return np.stack(rows)


@torch.no_grad()
def correct(model: nn.Module, task: Task) -> NDArray[np.bool_]:
    """Which validation examples the model classifies correctly, shape ``(M,)``."""
    model.eval()
    parts = [model(x).argmax(-1) for x in task.valid_x.split(500)]
    return (torch.cat(parts) == task.valid_y).numpy()


def packed(right: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bits, each evaluation as its difference from the one before, which compresses well."""
    changes = right.copy()
    changes[1:] ^= right[:-1]
    return np.packbits(changes, axis=1)


def unpacked(bits: NDArray[np.uint8], examples: int) -> NDArray[np.bool_]:
    """The inverse of `packed`."""
    changes = np.unpackbits(bits, axis=1, count=examples).astype(bool)
    return np.logical_xor.accumulate(changes, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train without cuts, and store every evaluation.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("results/cushion_curves.npz"))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--parts", type=Path, default=None, help="keep each finished training in this folder")
    parser.add_argument("--share", default="0/1", help="i/n: of the trainings, only every n-th from the i-th")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    index, shares = map(int, arguments.share.split("/"))
    found = {name: tasks(name, arguments.data) for name in TASKS}
    stored: dict[str, Any] = {}
    wanted = [(name, seed) for seed in range(arguments.seeds) for name in TASKS][index::shares]
    for name, seed in wanted:
        part = None if arguments.parts is None else arguments.parts / f"{name}-{seed}.npz"
        if part is not None and part.exists():
            right = np.load(part)["right"]
        else:
            began = time.perf_counter()
            right = train(found[name], seed, settings(name, seed))
            if part is not None:
                part.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(part, right=right)
            share = right.mean(1)
            print(
                name,
                seed,
                settings(name, seed),
                f"{time.perf_counter() - began:.1f} s",
                [round(float(share[i]), 3) for i in (7, 15, 31, 63, 79, -1)],
                flush=True,
            )
        stored[f"{name}-{seed}"] = packed(right)
        stored[f"{name}-examples"] = np.array(right.shape[1])
    if shares == 1:
        np.savez_compressed(arguments.output, **stored)


if __name__ == "__main__":
    main()
