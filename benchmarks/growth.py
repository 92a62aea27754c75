"""How time and memory grow with states, length, batch, width and layers, beside the slopes that theory says.

    python benchmarks/growth.py --json results/growth.json --plot docs/images/growth.svg
    python benchmarks/growth.py --counts        the numbers that tests/lab/bench/test_growth.py holds, counted anew

A training step of the LRU classifier, and Mamba's and Mamba-2's scan forward and backward, on one thread. Time is the
processor time of the step, the least of a few, which other processes hardly change. Memory is what the forward pass
keeps for the backward pass, counted. A slope is that of a straight line through the logarithms of the upper half of the
points; theory's is that of the roofline's formulas (compressm/lab/bench/roofline.py) at the same points: operations for
time, bytes moved for memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from stored import store

from compressm.lab.bench import ours, roofline
from compressm.lab.bench.counting import count_family
from compressm.lab.bench.roofline import Work
from compressm.lab.bench.worker import Step
from compressm.layers.families import FAMILIES

COUNTS = Path(__file__).parents[1] / "tests" / "lab" / "bench" / "counts.json"
LRU: dict[str, int] = {"n": 64, "length": 256, "batch": 8, "width": 32, "layers": 1}
SELECTIVE: dict[str, int] = {"n": 16, "length": 256, "batch": 4, "d": 64}
SSD: dict[str, int] = {"n": 32, "length": 256, "batch": 4, "heads": 2, "p": 32}
AXES: dict[str, tuple[int, ...]] = {
    "n": (16, 32, 64, 128, 256),
    "length": (64, 128, 256, 512, 1024),
    "batch": (2, 4, 8, 16, 32),
    "width": (16, 32, 64, 128, 256),
    "layers": (1, 2, 4, 8),
}


def lru(**sizes: int) -> tuple[Step, Work]:
    return ours.lru_training_step(**sizes), roofline.lru_training_step(**sizes)


def selective(n: int, length: int, batch: int, d: int) -> tuple[Step, Work]:
    return ours.selective(n, d, batch, length), roofline.selective_training(batch, length, d, n)


def ssd(n: int, length: int, batch: int, heads: int, p: int) -> tuple[Step, Work]:
    return ours.ssd(n, heads, p, batch, length), roofline.ssd_training(batch, length, heads, p, n)


def at(family: str, axis: str, value: int) -> tuple[Step, Work]:
    """The step and its work, with one size changed; the width of a scan is its channels, or heads of 32 of them."""
    if family == "lru":
        return lru(**{**LRU, axis: value})
    if family == "selective":
        return selective(**{**SELECTIVE, "d" if axis == "width" else axis: value})
    return ssd(**{**SSD, **({"heads": max(1, value // 32)} if axis == "width" else {axis: value})})


def kept_bytes(step: Step) -> int:
    """What a step keeps for its backward pass: the storages that autograd saves, each counted once."""
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(size for size, _ in kept.values())


def milliseconds(step: Step, repeats: int = 5) -> float:
    """Processor time of a step."""
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        step()
        taken.append(time.process_time() - started)
    return 1e3 * min(taken)


def slope(points: list[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> float:
    """Of the logarithms, over the upper half of the points."""
    upper = points[len(points) // 2 :] if len(points) > 3 else points
    x, y = np.log([p["value"] for p in upper]), np.log([of(p) for p in upper])
    return float(np.polyfit(x, y, 1)[0])


def curve(family: str, axis: str) -> dict[str, Any]:
    """The points along one axis, and slopes."""
    points = list[dict[str, Any]]()
    for value in AXES[axis]:
        if family == "ssd" and axis == "width" and value < 32:
            continue
        step, work = at(family, axis, value)
        memory = kept_bytes(step)  # and caches are filled
        ms = milliseconds(step)
        points.append({"value": value, "ms": ms, "kept_mb": memory / 1e6, "flops": work.flops, "bytes": work.bytes})
    slopes = {"time": "ms", "memory": "kept_mb", "time in theory": "flops", "memory in theory": "bytes"}
    return {
        "family": family,
        "axis": axis,
        "points": points,
        "slopes": {name: round(slope(points, lambda p, key=key: p[key]), 2) for name, key in slopes.items()},
    }


def draw(curves: list[dict[str, Any]], path: Path) -> None:
    """Two rows of panels, time and memory; dotted, the slope that theory says, from the last point."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"lru": "#0b6e4f", "selective": "#c8553d", "ssd": "#3b5b92"}
    names = {"lru": "LRU model, a training step", "selective": "Mamba's scan", "ssd": "Mamba-2's scan"}
    figure, panels = plt.subplots(2, len(AXES), figsize=(13, 5.6), layout="constrained", sharey="row")
    for one in curves:
        column = list(AXES).index(one["axis"])
        x = np.array([p["value"] for p in one["points"]])
        for row, (key, kind) in enumerate((("ms", "time"), ("kept_mb", "memory"))):
            y, panel = np.array([p[key] for p in one["points"]]), panels[row, column]
            panel.plot(x, y, "o-", color=colours[one["family"]], markersize=3, label=names[one["family"]])
            theory = one["slopes"][f"{kind} in theory"]
            panel.plot(x, y[-1] * (x / x[-1]) ** theory, ":", color=colours[one["family"]], linewidth=1)
            panel.set(xscale="log", yscale="log", xlabel=one["axis"] if row else "")
            panel.set_xticks(AXES[one["axis"]], [str(value) for value in AXES[one["axis"]]])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("processor time of a step, ms")
    panels[1, 0].set_ylabel("kept for the backward pass, MB")
    panels[0, 0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--counts", action="store_true", help="only count, and rewrite the tests' numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.counts:
        counts = {family: count_family(family) for family in track(FAMILIES, "counting")}
        COUNTS.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
        return
    wanted = [(f, a) for f in ("lru", "selective", "ssd") for a in AXES if f == "lru" or a != "layers"]
    curves = [curve(family, axis) for family, axis in track(wanted, "measuring")]
    print("| | axis | time | in theory | memory | in theory |")
    print("|---|---|---:|---:|---:|---:|")
    for one in curves:
        s = one["slopes"]
        values = " | ".join(f"{s[k]:.2f}" for k in ("time", "time in theory", "memory", "memory in theory"))
        print(f"| {one['family']} | {one['axis']} | {values} |")
    if arguments.json:
        store(arguments.json, threads=1, curves=curves)
    if arguments.plot:
        draw(curves, arguments.plot)


if __name__ == "__main__":
    main()
