"""Test, time and train on a CUDA device, and write one JSON file: see gpu_check.sh.

Four steps, each with a limit of its own; one that fails or runs out of time says so in the file, and the others go on:

tests   every CUDA path against float64 loops (``pytest -m gpu``)
bench   ``compressm bench`` with a roofline of the device
demo    ``compressm demo``
scifar  a model of six LRU blocks of width 512 on sequences of the shape of sCIFAR (1024 x 3, random numbers: only time
        and memory matter), trained for a minute with 384 states and for another one after a cut to 93
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import compressm
from compressm.layers import SequenceClassifier

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"tests": 120, "bench": 140, "demo": 80}  # seconds; with the two minutes of scifar 460
LARGE: dict[str, int] = {
    "width": 512,
    "layers": 6,
    "states": 384,
    "cut_to": 93,
    "batch": 32,
    "length": 1024,
    "seconds": 60,
}
TINY: dict[str, int] = {"width": 16, "layers": 2, "states": 16, "cut_to": 4, "batch": 2, "length": 64, "seconds": 1}


def limit(step: str, device: str) -> float:
    """Seconds that a step may take; a dry run may be beside other work."""
    return LIMITS[step] * (1 if device == "cuda" else 4)


def run(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a command; its exit status, seconds and last lines. A status of None: it ran out of time."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        status, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status, output = None, (error.stdout or b"").decode(errors="replace")
    spent = round(time.perf_counter() - started, 1)
    return {"command": " ".join(command), "status": status, "seconds": spent, "tail": output.splitlines()[-8:]}


def with_json(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a command that takes ``--json``, and add what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        result = run([*command, "--json", str(path)], seconds)
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return {**result, "result": content}


def tests(device: str) -> dict[str, Any]:
    """Under a dry run every one of them is skipped, which is a status of 0 too."""
    return run(
        ["pytest", "tests/scans/test_triton.py", "-m", "gpu", "-q", "-p", "no:cacheprovider"], limit("tests", device)
    )


def bench(device: str) -> dict[str, Any]:
    suites = ["lru", "selective", "ssd"] if device == "cuda" else ["train", "--only", "step-after-cut"]
    return with_json(["compressm", "bench", *suites, "--quick", "--device", device], limit("bench", device))


def demo(device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        short = ["--seeds", "1", *([] if device == "cuda" else ["--steps", "40"])]
        return with_json(["compressm", "demo", *short, "--picture", f"{folder}/demo.png"], limit("demo", device))


def scifar(device: str) -> dict[str, Any]:
    """Train, cut, train on; steps a second, memory and losses of both halves."""
    sizes = LARGE if device == "cuda" else TINY
    torch.manual_seed(0)
    model = SequenceClassifier(3, 10, sizes["width"], sizes["states"], n_layers=sizes["layers"], r_min=0.9).to(device)
    full = trained(model, sizes, device)
    report = compressm.compress(model, states=sizes["cut_to"])
    return {"status": 0, "sizes": sizes, "full": full, "shrunk": trained(model, sizes, device), "report": str(report)}


def trained(model: SequenceClassifier, sizes: dict[str, int], device: str) -> dict[str, Any]:
    """Steps of Adam for so many seconds, after three that are not counted."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    inputs = torch.randn(sizes["batch"], sizes["length"], 3, device=device)
    labels = torch.randint(0, 10, (sizes["batch"],), device=device)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())  # waits for the device

    first, *_ = (step() for _ in range(3))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started, steps, loss = time.perf_counter(), 0, first
    while (spent := time.perf_counter() - started) < sizes["seconds"]:
        loss, steps = step(), steps + 1
    peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else None
    return {"steps": steps, "ms": 1e3 * spent / max(1, steps), "peak_mb": peak, "losses": [first, loss]}


def guarded(step: Callable[[str], dict[str, Any]], device: str) -> dict[str, Any]:
    """A step's result, or what went wrong."""
    try:
        return step(device)
    except Exception as error:  # the other steps go on
        return {"status": 1, "tail": [f"{type(error).__name__}: {error}"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there; --dry-run runs the same steps on the CPU")
    started, results = time.perf_counter(), dict[str, Any]()
    for name, step in {"tests": tests, "bench": bench, "demo": demo, "scifar": scifar}.items():
        print(f"{name} ...", end=" ", flush=True)
        begun = time.perf_counter()
        results[name] = guarded(step, device)
        print(f"status {results[name]['status']}, {time.perf_counter() - begun:.0f} s", flush=True)
    content = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu (dry run)",
        "versions": {"torch": torch.__version__, "compressm": compressm.__version__},
        "seconds": round(time.perf_counter() - started, 1),
        **results,
    }
    arguments.json.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"{arguments.json}: {content['seconds']:.0f} s in all")
    return int(any(result["status"] != 0 for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
