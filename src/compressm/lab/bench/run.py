"""Runs suites and collects the result."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from compressm.errors import ConfigError
from compressm.lab.bench.results import machine, markdown, number, plot, versions
from compressm.lab.bench.roofline import measure_rates
from compressm.lab.bench.rows import QUICK, Case, Effort, compare
from compressm.lab.bench.suites import SUITES, Point, sweep
from compressm.runtime.files import write_text


def run_bench(
    suites: Sequence[str],
    quick: bool = False,
    only: str | None = None,
    sweeps: bool = False,
    device: str = "cpu",
    picture: Path | None = None,
    table: Path | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure, print the table, write table and plots.

    Args:
        suites: their names; ``"all"`` stands for all of them.
        quick: few repetitions. Unless `only` is given, rows are left out that are slow, or many of a kind.
        only: only rows whose name contains this.
        sweeps: measure time against n, length and batch too.
        device: ``"cpu"`` or ``"cuda"``.
        picture: where to draw the sweeps.
        table: where to write the table as Markdown.
        command: the exact command line, for the record.

    Returns:
        ``rows`` and ``sweep``, with ``command``, ``versions``, ``machine`` and ``rates``.

    Raises:
        ConfigError: an unknown suite or device, or no row left.
    """
    names = _known(suites)
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device {device!r} is not there; choose cpu, or cuda on a machine that has it")
    if picture is not None and not sweeps:
        raise ConfigError("plot: needs points to draw; add --sweep")
    cases = [case for name in names for case in SUITES[name](device) if _wanted(case, only, quick)]
    points = [p for name in names for p in sweep(name, device) if only is None or only in p.case.name] if sweeps else []
    if not cases and not points:
        raise ConfigError(f"only: no row's name contains {only!r}; leave it out to see them all")
    result = {"command": command, "versions": versions(), **_measured(cases, points, quick, device)}
    _print(result)
    if table is not None:
        write_text(table, markdown(result))
    if picture is not None:
        plot(result, picture)
    return result


def _wanted(case: Case, only: str | None, quick: bool) -> bool:
    return only in case.name if only is not None else case.brief or not quick


def _known(suites: Sequence[str]) -> list[str]:
    """The names of the suites, each once, with all of them in the place of ``"all"``."""
    names = list(dict.fromkeys(n for suite in suites for n in (SUITES if suite == "all" else (suite,))))
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise ConfigError(f"suite {unknown[0]!r} is not known; choose from {', '.join(SUITES)} or all")
    return names


def _measured(cases: Sequence[Case], points: Sequence[Point], quick: bool, device: str) -> dict[str, Any]:
    """The machine, its rates, and what was measured for the rows and for the points of the sweeps."""
    threads = torch.get_num_threads()
    cpus = _cpus(threads)
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with bar:
        task = bar.add_task("rates of this machine", total=len(cases) + len(points))
        rates = measure_rates(device, 0.2 if quick else 1.0)

        def row(case: Case, effort: Effort) -> dict[str, Any]:
            bar.update(task, description=case.name)
            made = compare(case, rates, effort, threads, cpus).to_dict()
            bar.advance(task)
            return made

        rows = [row(case, QUICK if quick else Effort()) for case in cases]
        swept = [_place(point) | row(point.case, QUICK if quick else Effort(10, 2, 5.0)) for point in points]
    return {"machine": machine(device, threads, cpus), "rates": rates.to_dict(), "rows": rows, "sweep": swept}


def _place(point: Point) -> dict[str, Any]:
    """Where a point stands in its sweep."""
    return {"suite": point.suite, "axis": point.axis, "value": point.value, "sizes": point.case.ours.arguments}


def _cpus(threads: int) -> list[int] | None:
    """As many processors as PyTorch has threads, out of those that this process may use.

    XLA starts one thread for each processor that it may use, so both sides get the same number of threads. None where
    the system cannot be asked.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[:threads]


def _print(result: dict[str, Any]) -> None:
    table = Table(title="Milliseconds a step, medians; memory in MB", title_justify="left")
    for column in ("row", "ours", "peer", "peer/ours", "ours/limit", "MB", "peer MB"):
        table.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)
    for row in result["rows"]:
        values = ("ours_ms", "peer_ms", "ratio", "of_roofline", "peak_mb", "peer_peak_mb")
        table.add_row(row["name"], *(number(row[value]) for value in values))
    console = Console(stderr=True)
    console.print(table)
    for row in result["rows"]:
        if row["reason"]:
            console.print(f"{row['name']}: {row['reason']}", markup=False)
