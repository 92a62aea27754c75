"""Relative H2 error of real-part aware and of complex balanced truncation, at equal numbers of complex states.

    python benchmarks/truncation_table.py --json results/truncation.json [--model FOLDER ...]

The layers are LRUs at initialisation (n = 256, H = 8, |lam| in [0.9, 0.999], one per seed), and those of models stored
with `compressm.save`. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from stored import store

import compressm
from compressm.adapters import find_layers
from compressm.adapters.changes import layer_values
from compressm.layers import LRU
from compressm.theory.balancing import balance, truncate

STATES = (128, 64, 32, 16)


def errors(model: torch.nn.Module) -> dict[str, dict[int, float]]:
    (layer, adapter), *_ = find_layers(model).values()
    system = adapter.read(layer_values(layer))
    return {
        method: {r: truncate(balance(system, method), r).certificate.relative_h2_error for r in STATES if r < system.n}
        for method in ("real", "complex")
    }


def states_at(model: torch.nn.Module, tolerance: float) -> dict[str, int]:
    return {
        method: next(iter(compressm.analyze(model, method))).states_for(tolerance)  # type: ignore[arg-type]
        for method in ("real", "complex")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--model", type=Path, action="append", default=[], help="folder of a stored model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    groups: dict[str, list[torch.nn.Module]] = {"at initialisation": []}
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        groups["at initialisation"].append(LRU(8, 256, r_min=0.9, r_max=0.999))
    for folder in arguments.model:
        groups[f"trained: {folder.parent.name or folder.name}"] = [compressm.load(folder)]
    result = {}
    print("| LRU | states kept | real-part aware | complex |\n|---|---|---|---|")
    for name, models in groups.items():
        each = [errors(model) for model in models]
        kept = [states_at(model, 0.02) for model in models]
        result[name] = {"relative_h2_error": each, "states_at_tolerance_0.02": kept}
        for r in each[0]["real"]:
            real, complex_ = ([e[method][r] for e in each] for method in ("real", "complex"))
            print(f"| {name} | {r} | {statistics.fmean(real):.3f} | {statistics.fmean(complex_):.3f} |")
        real, complex_ = (statistics.fmean(k[method] for k in kept) for method in ("real", "complex"))
        print(f"| {name} | needed at tolerance 0.02 | {real:.0f} states | {complex_:.0f} states |")
    if arguments.json:
        store(
            arguments.json,
            seeds=list(range(arguments.seeds)),
            result=result,
        )


if __name__ == "__main__":
    main()
