"""`compressm demo`: one comparison on embedded data, in a table and a picture.

The same small classifier reads handwritten digits pixel by pixel. It is trained in three ways, with several seeds:
``full`` is big all the way, ``shrunk`` is cut in the first fifth of the training, and ``small`` has from the start the
state dimension with which ``shrunk`` ended. Everything runs through `compressm.lab.runs`, as `compressm train` does.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compressm.lab.demo_picture import LABELS, WAYS, draw
from compressm.lab.reproduce import Arm, Experiment, plan_runs, run_grid
from compressm.lab.reproduce.tables import computing, cutting
from compressm.lab.runs.result import RunResult

_BIG = {"compression.enabled": False}
DEMO = Experiment(
    "demo",
    "Handwritten digits, pixel by pixel",
    "demo",
    (Arm("full", _BIG), Arm("shrunk", {}), Arm("small", _BIG, same_states_as="shrunk")),
)


def run_demo(
    seeds: int = 4,
    steps: int | None = None,
    picture: Path | None = Path("demo.png"),
    workers: int | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Train all runs, print the table, draw the picture.

    Args:
        seeds: how many seeds, from 0.
        steps: training steps of each run; by default as many as the comparison needs.
        picture: where to draw it; None for no picture.
        workers: processes; by default one per CPU, with one thread each.
        command: the exact command line, for the record.

    Returns:
        ``full``, ``shrunk`` and ``small``, each with ``accuracy_mean``, ``accuracy_std``, ``seeds``, ``state_dims``,
        ``train_seconds``, ``reduction_seconds``, and ``computing_seconds`` with ``cutting_seconds`` in it, which other
        work on the machine does not lengthen; and ``command``, ``versions``, ``config``.
    """
    with tempfile.TemporaryDirectory(prefix="compressm-demo-") as folder:
        plan = plan_runs(DEMO, range(seeds), results=Path(folder) / "results", runs=Path(folder) / "runs")
        found = run_grid(plan, steps=steps, workers=workers, command=command)
    runs = {key: run.to_dict() for key, run in found.items()}
    result: dict[str, Any] = {way: _summary([found[way, seed] for seed in range(seeds)]) for way in WAYS}
    result |= {"command": command, "versions": runs["full", 0]["versions"], "config": runs["shrunk", 0]["config"]}
    Console().print(_table(result))
    if picture is not None:
        draw(result, runs, picture)
        Console().print(f"picture: {picture}")
    return result


def _summary(runs: Sequence[RunResult]) -> dict[str, Any]:
    accuracies = [float(run.test_accuracy or 0.0) for run in runs]
    return {
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "accuracies": accuracies,
        "seeds": [run.seed for run in runs],
        "state_dims": [max(dims) for dims in zip(*(run.state_dims for run in runs), strict=True)],
        "state_dims_per_seed": [list(run.state_dims) for run in runs],
        "train_seconds": statistics.fmean(run.train_seconds for run in runs),
        "reduction_seconds": statistics.fmean(run.reduction_seconds for run in runs),
        "computing_seconds": statistics.fmean(computing(run) or run.train_seconds for run in runs),
        "cutting_seconds": statistics.fmean(cutting(run) for run in runs),
    }


def _table(result: Mapping[str, Any]) -> Table:
    table = Table(title="Handwritten digits, pixel by pixel: test accuracy", title_justify="left")
    for column in ("", "states", "accuracy", "computing time", "of it cutting"):
        table.add_column(column, justify="left" if not column else "right")
    for way in WAYS:
        row = result[way]
        table.add_row(
            LABELS[way],
            "+".join(str(n) for n in row["state_dims"]),
            f"{row['accuracy_mean']:.1%} ± {row['accuracy_std']:.1%}",
            f"{row['computing_seconds']:.1f} s",
            f"{row['cutting_seconds']:.2f} s",
        )
    return table
