"""Time of one whole reduction of an LRU layer: HSVs, truncation, certificate, and the state of AdamW.

    python benchmarks/reduction_time.py --json results/reduction_time.json

Medians of several runs on layers at initialisation (|lam| in [0.9, 0.999]). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from stored import store

import compressm
from compressm.layers import LRU

LAYERS = ((256, 8), (512, 512))
RULES: tuple[dict[str, float], ...] = ({"tolerance": 0.02}, {"fraction": 0.5}, {"fraction": 0.125})


def reduction(n: int, width: int, rule: dict[str, float], seed: int) -> tuple[float, int]:
    torch.manual_seed(seed)
    layer = LRU(width, n, r_min=0.9, r_max=0.999)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 16, width)).square().mean().backward()
    optimizer.step()
    started = time.perf_counter()
    report = compressm.compress(layer, optimizer=optimizer, **rule)  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    assert report.cut
    return seconds, report.layers[0].states_after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("| n | H | rule | states kept | seconds, median | min | max |\n|---|---|---|---|---|---|---|")
    for n, width in LAYERS:
        for rule in RULES:
            reduction(n, width, rule, 0)  # warm up
            runs = [reduction(n, width, rule, seed) for seed in range(arguments.runs)]
            seconds = [run[0] for run in runs]
            name = ", ".join(f"{key} {value}" for key, value in rule.items())
            median = statistics.median(seconds)
            rows.append({"n": n, "H": width, "rule": rule, "states": [run[1] for run in runs], "seconds": seconds})
            print(f"| {n} | {width} | {name} | {runs[0][1]} | {median:.2f} | {min(seconds):.2f} | {max(seconds):.2f} |")
    if arguments.json:
        store(
            arguments.json,
            threads=torch.get_num_threads(),
            rows=rows,
        )


if __name__ == "__main__":
    main()
