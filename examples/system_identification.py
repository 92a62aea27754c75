"""System identification: an LRU model of a nonlinear system, shrunk while it trains, against a linear one.

    python examples/system_identification.py --data FOLDER [--task silverbox|tanks] [--quick] [--json FILE]

FOLDER holds ``silverbox/SNLS80mV.csv`` and ``cascaded_tanks/dataBenchmark.csv`` of nonlinearbenchmark.org. Silverbox is
an electronic mass-spring-damper with a hardening spring: the growing sweep at the start of the record is the test, the
random multisines after it are for training, but for the last two of the ten, validation and a second test. Cascaded
tanks overflow: 1024 samples to learn from, the last fifth for validation, and 1024 others to test; both records begin
with the same unknown levels, so that a model learns the record from its beginning, and is tested from there.

All errors are of simulation: the model gets the input alone, never a measured output. The linear baseline is an ARX
model by least squares, its order chosen by its simulation error on the validation part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import compressm  # (1)
from compressm.layers import GLUBlock, parameter_groups
from compressm.saving.export import flatten_state, onnx_runner, to_onnx

WASHOUT = 64  # samples in which a model may forget that it did not start where the system did


@dataclass(frozen=True)
class Settings:
    """What was chosen on validation data. The tanks are slow, and there is little of them to learn from."""

    steps: int
    lr: float
    weight_decay: float
    dropout: float
    r_max: float
    max_phase: float


SETTINGS = {
    "silverbox": Settings(6000, 4e-3, 1e-4, 0.0, 0.99, 6.28),
    "tanks": Settings(1200, 2e-3, 0.1, 0.2, 0.995, 0.3),
}


class Simulator(nn.Module):
    """One input to one output: a linear encoder, blocks of an LRU and a static nonlinearity, a linear decoder."""

    def __init__(self, d_model: int, d_state: int, settings: Settings, n_layers: int = 2) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(1, d_model), nn.Linear(d_model, 1)
        circle = {"r_max": settings.r_max, "max_phase": settings.max_phase}
        self.blocks = nn.ModuleList(
            GLUBlock("lru", d_model, d_state, settings.dropout, "layer", r_min=0.5, **circle) for _ in range(n_layers)
        )

    def forward(self, u: Tensor) -> Tensor:
        z = self.encoder(u)
        for block in self.blocks:
            z = block(z)
        return self.decoder(z)

    def initial_state(self, batch: int) -> list[Any]:
        return [block.initial_state(batch) for block in self.blocks]  # type: ignore[operator]

    def step(self, u: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        z, after = self.encoder(u), list[Any]()
        for block, before in zip(self.blocks, state, strict=True):
            z, new = block.step(z, before)  # type: ignore[operator]
            after.append(new)
        return self.decoder(z), after


@dataclass(frozen=True)
class Record:
    """Sequences ``(length, 2)`` of input and output, scaled by the training part, and which of their samples count.

    Attributes:
        parts: ``train``, ``valid``, ``test``, and for Silverbox ``sweep``.
        scale: volts of one unit of input and output.
        first: the first sample of a part whose error counts.
        window: samples of a training sequence; all of the training part where it must be seen from its beginning.
    """

    parts: dict[str, np.ndarray]
    scale: np.ndarray
    first: dict[str, int]
    window: int

    def error(self, name: str, y: np.ndarray) -> float:
        """Root mean square error of a simulation of a part, in volts."""
        return float(np.sqrt(np.mean((y - self.parts[name][:, 1])[self.first[name] :] ** 2)) * self.scale[1])


def read(folder: Path, task: str) -> Record:
    """Both data sets as they are published."""
    if task == "silverbox":
        table = np.genfromtxt(folder / "silverbox/SNLS80mV.csv", delimiter=",", skip_header=1, usecols=(0, 1))
        places = {
            "train": (40_700, 110_000),
            "valid": (110_000, 118_600),
            "test": (118_600, 127_400),
            "sweep": (0, 40_500),
        }
        parts, seen = {name: table[a:b] for name, (a, b) in places.items()} | {"sweep": table[:40_500]}, 0
    else:
        table = np.genfromtxt(folder / "cascaded_tanks/dataBenchmark.csv", delimiter=",", skip_header=1)
        learnt, seen = table[:, [0, 2]], 820
        parts = {"train": learnt[:seen], "valid": learnt, "test": table[:, [1, 3]]}
    mean, scale = parts["train"].mean(0), parts["train"].std(0)
    first = dict.fromkeys(parts, WASHOUT) | ({"train": 0, "valid": seen} if seen else {})
    parts = {name: (part - mean) / scale for name, part in parts.items()}
    return Record(parts, scale, first, seen or min(512, len(parts["train"]) // 2))


def arx(record: Record) -> dict[str, float]:
    """Root mean square simulation errors of the linear baseline, and its order. It is given the first outputs."""

    def simulate(weights: np.ndarray, order: int, part: np.ndarray) -> np.ndarray:
        y = list(part[:order, 1])
        for t in range(order, len(part)):
            y.append(float(weights @ np.concatenate([y[-order:], part[t - order : t + 1, 0]])))
        return np.array(y)

    best: tuple[float, int, np.ndarray] | None = None
    train = record.parts["train"]
    for order in range(1, 13):
        past = [
            np.concatenate([train[t - order : t, 1], train[t - order : t + 1, 0]]) for t in range(order, len(train))
        ]
        weights = np.linalg.lstsq(np.array(past), train[order:, 1], rcond=None)[0]
        error = record.error("valid", simulate(weights, order, record.parts["valid"]))
        if np.isfinite(error) and (best is None or error < best[0]):
            best = (error, order, weights)
    assert best is not None
    error, order, weights = best
    tests = {name: part for name, part in record.parts.items() if name in ("test", "sweep")}
    found = {name: record.error(name, simulate(weights, order, part)) for name, part in tests.items()}
    return {"order": order, "valid": error, **found}


@torch.no_grad()
def simulation_error(model: nn.Module, record: Record, name: str) -> float:
    """Of a model that sees the input alone."""
    y = model.eval()(torch.tensor(record.parts[name][None, :, :1], dtype=torch.float32))[0, :, 0]
    model.train()
    return record.error(name, y.numpy())


def median_microseconds(step: Callable[[], None]) -> float:
    """Of 2000 calls."""
    times = list[float]()
    for _ in range(2000):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return 1e6 * float(np.median(times))


@torch.no_grad()
def step_microseconds(model: Simulator) -> dict[str, float]:
    """Median of one step of one sequence, on one thread: in PyTorch and, where it is installed, in ONNX Runtime."""
    state, u = model.eval().initial_state(1), torch.zeros(1, 1)

    def in_pytorch() -> None:
        nonlocal state
        _, state = model.step(u, state)

    found = {"step_microseconds": median_microseconds(in_pytorch)}
    if importlib.util.find_spec("onnxruntime"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.onnx"
            to_onnx(model, path, example=torch.randn(2, 200, 1), step=True)
            run, states = onnx_runner(path), list(flatten_state(model.initial_state(1)).values())

        def in_onnx() -> None:
            nonlocal states
            _, *states = run([u, *states])

        found["onnx_step_microseconds"] = median_microseconds(in_onnx)
    return found


def train(record: Record, settings: Settings, steps: int, d_state: int, seed: int, **cut: Any) -> dict[str, Any]:
    """One model: errors, states, seconds."""
    torch.manual_seed(seed)
    model = Simulator(16, d_state, settings)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.lr, settings.weight_decay))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    compressor = compressm.Compressor(model, optimizer, steps, **cut) if cut else None  # (2)
    sequences = torch.tensor(record.parts["train"], dtype=torch.float32)
    windows = sequences.unfold(0, record.window, 1)  # (count, 2, length)
    best, started = (np.inf, model.state_dict()), time.perf_counter()
    for step in range(1, steps + 1):
        batch = windows[torch.randint(len(windows), (min(16, len(windows)),))]
        error = model(batch[:, :1].mT)[..., 0] - batch[:, 1]
        loss = error[:, record.first["train"] :].square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if compressor is not None and (event := compressor.step()):  # (3)
            print(event, flush=True)
        if step > steps // 4 and step % max(1, steps // 40) == 0:  # the validation part says which step was best
            found = simulation_error(model, record, "valid")
            best = min(best, (found, {k: v.clone() for k, v in model.state_dict().items()}), key=lambda pair: pair[0])
    seconds = time.perf_counter() - started
    model.load_state_dict(best[1])
    errors = {name: simulation_error(model, record, name) for name in record.parts if name != "train"}
    states = [block.ssm.d_state for block in model.blocks]  # type: ignore[union-attr]
    return {"states": states, **errors, "seconds": seconds, **step_microseconds(model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=["silverbox", "tanks"], default="silverbox")
    parser.add_argument("--steps", type=int, help="instead of the task's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--big", type=int, default=64)
    parser.add_argument("--small", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    a = parser.parse_args()
    torch.set_num_threads(1)
    settings = SETTINGS[a.task]
    steps = 40 if a.quick else a.steps or settings.steps
    record = read(a.data, a.task)
    results: dict[str, Any] = {"task": a.task, "steps": steps, "seed": a.seed, "linear": arx(record)}
    print("linear", results["linear"], flush=True)
    arms = {
        "big": (a.big, {}),
        "shrunk": (a.big, {"states": a.small}),
        "small": (a.small, {}),
        "random": (a.big, {"states": a.small, "selection": "random"}),
    }
    for name, (states, cut) in arms.items():
        results[name] = train(record, settings, steps, states, a.seed, **cut)
        print(name, results[name], flush=True)
    if a.json:
        results["command"] = "python " + shlex.join(sys.argv)
        results["versions"] = {"torch": torch.__version__, "compressm": compressm.__version__}
        a.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
