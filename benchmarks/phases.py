"""Where the eigenvalues of trained LRUs are: why starting big pays on one task and not on another.

    compressm reproduce smnist-quarter --data DIRECTORY && compressm reproduce psmnist --data DIRECTORY
    python benchmarks/phases.py [--runs runs]

Reads the models that these two experiments leave in ``runs``: how many states have a phase within pi / 5 of zero, that
is, remember what changes slowly. For the small models, which no cut has touched, also how far training has moved the
phases: the model at initialisation is made again from the seed. Writes ``results/phases.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from stored import store
from torch import Tensor

import compressm
from compressm.lab.config import Config
from compressm.lab.runs.models import build_model
from compressm.layers import LRU

EXPERIMENTS = ("smnist-quarter", "psmnist")


def phases(layer: LRU) -> Tensor:
    """As the parameters have them, which may be several turns."""
    return layer.system()[1].detach().double()


def of_run(folder: Path) -> dict[str, Any]:
    layer: LRU = compressm.load(folder / "model").blocks[0].ssm  # type: ignore[union-attr]
    trained = phases(layer)
    slow = int((torch.polar(torch.ones_like(trained), trained).angle().abs() < math.pi / 5).sum())
    found = {"run": f"{folder.parent.name}/{folder.name}", "states": len(trained), "slow": slow}
    if folder.name.startswith("small"):
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        torch.manual_seed(result["seed"])
        start = build_model(Config(**result["config"]), channels=1, n_classes=10)
        moved = trained - phases(start.blocks[0].ssm)  # type: ignore[arg-type]
        found |= {"median_move": float(moved.abs().median()), "largest_move": float(moved.abs().max())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results/phases.json"))
    a = parser.parse_args()
    folders = sorted(path.parent for name in EXPERIMENTS for path in (a.runs / name).glob("*/model"))
    if not folders:
        parser.error(f"no trained model in {a.runs}: run the experiments first, see --help")
    found = [of_run(folder) for folder in folders]
    print(json.dumps(found, indent=1))
    store(a.results, slow_below=math.pi / 5, runs=found)


if __name__ == "__main__":
    main()
