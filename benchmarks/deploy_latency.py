"""Latency of a time step and size of exported classifiers, before and after compression, with and without int8.

    python benchmarks/deploy_latency.py --json results/deploy.json

ONNX Runtime on one CPU thread, one sequence, the state handed from step to step; beside it the same step in PyTorch.
Each figure is the median over steps, with quartiles. The models are classifiers with two blocks of width 64 at
initialisation, cut to an eighth of their states: the time of a step depends on the sizes, not on the weights. Each file
is also held against PyTorch over 1000 steps. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stored import store

import compressm
from compressm.layers import SequenceClassifier
from compressm.saving.export import flatten_state, onnx_runner, to_onnx

MODELS: dict[str, dict[str, Any]] = {
    "LRU": {"d_state": 256, "r_min": 0.9},
    "Mamba": {"layer": "mamba", "d_state": 128},
    "Mamba-2": {"layer": "mamba2", "d_state": 128},
}
STEPS = 3000


def quartiles(step: Callable[[], None]) -> list[float]:
    """Microseconds of a call: lower quartile, median, upper quartile."""
    microseconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        microseconds.append(1e6 * (time.perf_counter() - started))
    return np.percentile(microseconds[STEPS // 10 :], [25, 50, 75]).round(1).tolist()


def of_onnx(path: Path, model: SequenceClassifier) -> list[float]:
    run, now = onnx_runner(path), torch.randn(1, 8)
    state = list(flatten_state(model.initial_state(1)).values())

    def step() -> None:
        nonlocal state
        _, *state = run([now, *state])

    return quartiles(step)


def of_pytorch(model: SequenceClassifier) -> list[float]:
    now, state = torch.randn(1, 8), model.initial_state(1)

    @torch.inference_mode()
    def step() -> None:
        nonlocal state
        _, state = model.step(now, state)

    return quartiles(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| model | states | weights | kB | step, µs (quartiles) | PyTorch's step, µs | error over 1000 steps |")
    print("|---|---|---|---|---|---|---|")
    for name, options in MODELS.items():
        torch.manual_seed(0)
        model = SequenceClassifier(8, 10, d_model=64, n_layers=2, **options).eval()
        for compressed in (False, True):
            if compressed:
                data = {} if name == "LRU" else {"data": [torch.randn(4, 256, 8)]}
                compressm.compress(model, fraction=1 / 8, **data)  # type: ignore[arg-type]
                model.eval()
            states, pytorch = model.config["d_state"][0], of_pytorch(model)
            for int8 in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    report = to_onnx(model, Path(folder) / "step.onnx", step=True, int8=int8)
                    onnx = of_onnx(Path(folder) / "step.onnx", model)
                row = {
                    "model": name,
                    "states": states,
                    "weights": "int8" if int8 else "float32",
                    "bytes": report.bytes,
                    "onnx_microseconds_quartiles": onnx,
                    "pytorch_microseconds_quartiles": pytorch,
                    "max_error": report.max_error,
                    "largest_output": report.largest_output,
                    "relative_error": report.relative_error,
                }
                rows.append(row)
                low, median, high = (f"{value:.0f}" for value in onnx)
                print(
                    f"| {name} | {states} | {row['weights']} | {report.bytes / 1000:.0f} | {median} ({low} to {high}) "
                    f"| {pytorch[1]:.0f} | {report.max_error:.0e} |",
                    flush=True,
                )
    if arguments.json:
        import onnxruntime

        store(arguments.json, threads=1, steps=STEPS, onnxruntime=onnxruntime.__version__, rows=rows)


if __name__ == "__main__":
    main()
