"""How time and memory grow with states, length, batch, width and layers, beside the slopes that theory says.

    python benchmarks/growth.py --json results/growth.json --plot docs/images/growth.svg
    python benchmarks/growth.py --counts        the numbers that tests/lab/bench/test_growth.py holds, counted anew

A training step of the LRU classifier; a Mamba-2 language model, and the scans of Mamba, Mamba-2, gated linear attention
and the gated delta rule, forward and backward; on one thread. Time is the processor time of the step, the least of a
few, which other processes hardly change. Memory is what the forward pass keeps for the backward pass, counted. A slope
is that of a straight line through the logarithms of the upper half of the points; theory's is that of the roofline's
formulas (compressm/lab/bench/roofline.py) at the same points: operations for time, bytes moved for memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from compressm.layers.families import FAMILIES as LAYERS

COUNTS = Path(__file__).parents[1] / "tests" / "lab" / "bench" / "counts.json"
AXES: dict[str, tuple[int, ...]] = {
    "n": (16, 32, 64, 128, 256),
    "length": (64, 128, 256, 512, 1024),
    "batch": (2, 4, 8, 16, 32),
    "width": (16, 32, 64, 128, 256),
    "layers": (1, 2, 4, 8),
}
HEAD = 32  # values of a head


def lru(width: int, **sizes: int) -> tuple[Step, Work]:
    return ours.lru_training_step(width=width, **sizes), roofline.lru_training_step(width=width, **sizes)


def selective(n: int, length: int, batch: int, width: int) -> tuple[Step, Work]:
    return ours.selective(n, width, batch, length), roofline.selective_training(batch, length, width, n)


def ssd(n: int, length: int, batch: int, width: int) -> tuple[Step, Work]:
    heads = width // HEAD
    return ours.ssd(n, heads, HEAD, batch, length), roofline.ssd_training(batch, length, heads, HEAD, n)


def gla(n: int, length: int, batch: int, width: int) -> tuple[Step, Work]:
    heads = width // HEAD
    return ours.gla(n, heads, HEAD, batch, length), roofline.gla_training(batch, length, heads, HEAD, n)


def gated_delta(n: int, length: int, batch: int, width: int) -> tuple[Step, Work]:
    heads = width // HEAD
    work = roofline.delta_training(batch, length, heads, HEAD, n, gated=True)
    return ours.delta(n, heads, HEAD, batch, length, gated=True), work


def mamba2(n: int, length: int, batch: int, width: int, layers: int) -> tuple[Step, Work]:
    heads = 2 * width // HEAD
    work = roofline.mamba2_model_training_step(batch, length, heads, HEAD, n, layers, ours.VOCABULARY)
    return ours.mamba2_model(n, width, layers, batch, length, HEAD), work


@dataclass(frozen=True)
class Family:
    """What is measured: its name in tables and figures, step and work by sizes, the sizes, and a colour."""

    name: str
    build: Callable[..., tuple[Step, Work]]
    sizes: dict[str, int]
    colour: str


SCAN = {"n": 32, "length": 256, "batch": 4, "width": 64}
FAMILIES = {
    "lru": Family("LRU model, training step", lru, {**SCAN, "n": 64, "batch": 8, "width": 32, "layers": 1}, "#0b6e4f"),
    "mamba2": Family("Mamba-2 model", mamba2, {**SCAN, "layers": 1}, "#6b4c9a"),
    "selective": Family("Mamba's scan", selective, {**SCAN, "n": 16}, "#c8553d"),
    "ssd": Family("Mamba-2's scan", ssd, SCAN, "#3b5b92"),
    "gla": Family("gated linear attention's scan", gla, SCAN, "#b8860b"),
    "gated_delta": Family("gated delta rule's scan", gated_delta, SCAN, "#555555"),
}


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
    points, chosen = list[dict[str, Any]](), FAMILIES[family]
    for value in AXES[axis]:
        if axis == "width" and value < HEAD and family in ("ssd", "gla", "gated_delta"):
            continue  # less than a head
        step, work = chosen.build(**{**chosen.sizes, axis: value})
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

    figure, panels = plt.subplots(2, len(AXES), figsize=(13, 5.6), layout="constrained", sharey="row")
    for one in curves:
        column, family = list(AXES).index(one["axis"]), FAMILIES[one["family"]]
        x = np.array([p["value"] for p in one["points"]])
        for row, (key, kind) in enumerate((("ms", "time"), ("kept_mb", "memory"))):
            y, panel = np.array([p[key] for p in one["points"]]), panels[row, column]
            panel.plot(x, y, "o-", color=family.colour, markersize=3, label=family.name)
            theory = one["slopes"][f"{kind} in theory"]
            panel.plot(x, y[-1] * (x / x[-1]) ** theory, ":", color=family.colour, linewidth=1)
            panel.set(xscale="log", yscale="log", xlabel=one["axis"] if row else "")
            panel.set_xticks(AXES[one["axis"]], [str(value) for value in AXES[one["axis"]]])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("processor time of a step, ms")
    panels[1, 0].set_ylabel("kept for the backward pass, MB")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=10, ncols=len(names), loc="outside lower center")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--counts", action="store_true", help="only count, and rewrite the tests' numbers")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="the others stay as stored")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.counts:
        counts = {family: count_family(family) for family in track(LAYERS, "counting")}
        COUNTS.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
        return
    wanted = [(f, a) for f in FAMILIES for a in AXES if a in FAMILIES[f].sizes and f in arguments.only]
    curves = [curve(family, axis) for family, axis in track(wanted, "measuring")]
    if arguments.json and arguments.json.exists():
        stored = json.loads(arguments.json.read_text(encoding="utf-8"))["curves"]
        curves += [one for one in stored if one["family"] not in arguments.only]
        curves.sort(key=lambda one: list(FAMILIES).index(one["family"]))
    print("| | against | time | in theory | memory | in theory |")
    print("|---|---|---:|---:|---:|---:|")
    for one in curves:
        s = one["slopes"]
        values = " | ".join(f"{s[k]:.2f}" for k in ("time", "time in theory", "memory", "memory in theory"))
        print(f"| {FAMILIES[one['family']].name} | {one['axis']} | {values} |")
    if arguments.json:
        store(arguments.json, threads=1, curves=curves)
    if arguments.plot:
        draw(curves, arguments.plot)


if __name__ == "__main__":
    main()
