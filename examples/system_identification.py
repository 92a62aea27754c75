"""System identification: an LRU model of a nonlinear system, shrunk while it trains, against a linear one.

    python examples/system_identification.py --data FOLDER [--task silverbox|tanks] [--quick] [--json FILE]

FOLDER holds ``silverbox/SNLS80mV.csv`` and ``cascaded_tanks/dataBenchmark.csv`` of nonlinearbenchmark.org. Silverbox is
an electronic mass-spring-damper with a hardening spring: the growing sweep at the start of the record is the test, the
random multisines after it are for training, but for the last two of the ten, validation and a second test. Cascaded
tanks overflow: 1024 samples to learn from, the last fifth for validation, and 1024 others to test.

All errors are of simulation: the model gets the input alone, never a measured output. The linear baseline is an ARX
model by least squares, its order chosen by its simulation error on the validation part.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import compressm  # (1)
from compressm.layers import GLUBlock, parameter_groups

WASHOUT = 64  # samples in which a model may forget that it did not start where the system did


class Simulator(nn.Module):
    """One input to one output: a linear encoder, blocks of an LRU and a static nonlinearity, a linear decoder."""

    def __init__(self, d_model: int, d_state: int, n_layers: int = 2) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(1, d_model), nn.Linear(d_model, 1)
        self.blocks = nn.ModuleList(
            GLUBlock("lru", d_model, d_state, 0.0, "layer", r_min=0.5, r_max=0.99) for _ in range(n_layers)
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


def read(folder: Path, task: str) -> dict[str, np.ndarray]:
    """Sequences ``(length, 2)`` of input and output, scaled by the training part; ``scale`` gives volts back."""
    if task == "silverbox":
        table = np.genfromtxt(folder / "silverbox/SNLS80mV.csv", delimiter=",", skip_header=1, usecols=(0, 1))
        parts = {"train": (40_700, 110_000), "valid": (110_000, 118_600), "test": (118_600, 127_400)}
        record = {name: table[a:b] for name, (a, b) in parts.items()} | {"sweep": table[:40_500]}
    else:
        table = np.genfromtxt(folder / "cascaded_tanks/dataBenchmark.csv", delimiter=",", skip_header=1)
        learnt, tested = table[:, [0, 2]], table[:, [1, 3]]
        record = {"train": learnt[:820], "valid": learnt[820:], "test": tested}
    mean, scale = record["train"].mean(0), record["train"].std(0)
    return {name: (part - mean) / scale for name, part in record.items()} | {"scale": scale}


def arx(record: dict[str, np.ndarray]) -> dict[str, float]:
    """Root mean square simulation errors of the linear baseline, and its order."""

    def simulate(weights: np.ndarray, order: int, part: np.ndarray) -> np.ndarray:
        y = list(part[:order, 1])
        for t in range(order, len(part)):
            y.append(float(weights @ np.concatenate([y[-order:], part[t - order : t + 1, 0]])))
        return np.array(y)

    best: tuple[float, int, np.ndarray] | None = None
    train = record["train"]
    for order in range(1, 13):
        past = [
            np.concatenate([train[t - order : t, 1], train[t - order : t + 1, 0]]) for t in range(order, len(train))
        ]
        weights = np.linalg.lstsq(np.array(past), train[order:, 1], rcond=None)[0]
        error = rms(simulate(weights, order, record["valid"]), record["valid"], record["scale"])
        if np.isfinite(error) and (best is None or error < best[0]):
            best = (error, order, weights)
    assert best is not None
    tests = {name: part for name, part in record.items() if name in ("test", "sweep")}
    found = {name: rms(simulate(best[2], best[1], part), part, record["scale"]) for name, part in tests.items()}
    return {"order": best[1], "valid": best[0], **found}


def rms(y: np.ndarray, part: np.ndarray, scale: np.ndarray) -> float:
    """Root mean square error in volts, after the washout."""
    return float(np.sqrt(np.mean((y - part[:, 1])[WASHOUT:] ** 2)) * scale[1])


@torch.no_grad()
def simulation_error(model: nn.Module, part: np.ndarray, scale: np.ndarray) -> float:
    y = model.eval()(torch.tensor(part[None, :, :1], dtype=torch.float32))[0, :, 0]
    model.train()
    return rms(y.numpy(), part, scale)


@torch.inference_mode()
def step_microseconds(model: Simulator) -> float:
    """Median of one step of one sequence, on one thread."""
    model.eval()
    state, u, times = model.initial_state(1), torch.zeros(1, 1), list[float]()
    for _ in range(2000):
        started = time.perf_counter()
        _, state = model.step(u, state)
        times.append(time.perf_counter() - started)
    return 1e6 * float(np.median(times))


def train(record: dict[str, np.ndarray], steps: int, d_state: int, seed: int, **cut: Any) -> dict[str, Any]:
    """One model: errors, states, seconds."""
    torch.manual_seed(seed)
    model = Simulator(16, d_state)
    optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3, 1e-4))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    compressor = compressm.Compressor(model, optimizer, steps, **cut) if cut else None  # (2)
    sequences = torch.tensor(record["train"], dtype=torch.float32)
    length = min(512, len(sequences) // 2)
    windows = sequences.unfold(0, length, 1)  # (count, 2, length)
    best, started = (np.inf, model.state_dict()), time.perf_counter()
    for step in range(1, steps + 1):
        batch = windows[torch.randint(len(windows), (16,))]
        error = model(batch[:, :1].mT)[..., 0] - batch[:, 1]
        loss = error[:, WASHOUT:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if compressor is not None and (event := compressor.step()):  # (3)
            print(event, flush=True)
        if step > steps // 4 and step % max(1, steps // 40) == 0:  # the validation part says which step was best
            found = simulation_error(model, record["valid"], record["scale"])
            best = min(best, (found, {k: v.clone() for k, v in model.state_dict().items()}), key=lambda pair: pair[0])
    seconds = time.perf_counter() - started
    model.load_state_dict(best[1])
    errors = {n: simulation_error(model, record[n], record["scale"]) for n in ("valid", "test", "sweep") if n in record}
    states = [block.ssm.d_state for block in model.blocks]  # type: ignore[union-attr]
    return {"states": states, **errors, "seconds": seconds, "step_microseconds": step_microseconds(model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=["silverbox", "tanks"], default="silverbox")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--big", type=int, default=64)
    parser.add_argument("--small", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    a = parser.parse_args()
    torch.set_num_threads(1)
    steps = 40 if a.quick else a.steps
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
        results[name] = train(record, steps, states, a.seed, **cut)
        print(name, results[name], flush=True)
    if a.json:
        results["versions"] = {"torch": torch.__version__, "compressm": compressm.__version__}
        a.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
