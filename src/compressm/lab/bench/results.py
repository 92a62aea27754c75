"""What a benchmark leaves behind: the result file's frame, a table, and plots."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from compressm import __version__
from compressm.errors import MissingExtraError
from compressm.runtime.files import replacing
from compressm.runtime.processor import processor_name


def versions() -> dict[str, str | None]:
    """Of Python, compressm and everything that a row may run; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "compressm": __version__}
    for package in ("torch", "jax", "equinox", "optax", "transformers", "pymor", "onnxruntime", "numpy", "scipy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine(device: str, threads: int, cpus: Sequence[int] | None) -> dict[str, Any]:
    """The processor, and how much of it was used."""
    import psutil

    description: dict[str, Any] = {
        "cpu": processor_name(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "threads": threads,
        "pinned": cpus is not None,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device != "cpu":
        description["gpu"] = torch.cuda.get_device_name()
    return description


COLUMNS = (
    "row",
    "ours, ms",
    "peer",
    "peer, ms",
    "peer / ours",
    "limit, ms",
    "ours / limit",
    "MB",
    "peer MB",
    "moved, MB",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's cells, as text; quartiles in brackets."""
    return [
        row["name"],
        _time(row["ours_ms"], row["ours_quartiles_ms"]),
        row["peer"],
        _time(row["peer_ms"], row["peer_quartiles_ms"]),
        number(row["ratio"]),
        number(row["roofline_ms"]),
        number(row["of_roofline"]),
        number(row["peak_mb"]),
        number(row["peer_peak_mb"]),
        number(row.get("traffic_mb")),
    ]


def number(value: float | None) -> str:
    """About three digits; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _time(median: float | None, quartiles: Sequence[float] | None) -> str:
    if median is None or quartiles is None:
        return "–"
    return f"{number(median)} ({number(quartiles[0])}–{number(quartiles[1])})"


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table, with the machine and the command."""
    m, rates = result["machine"], result["rates"]
    lines = [
        f"{m.get('gpu', m['cpu'])}, {m['threads']} threads: matrix product {number(rates['gflops'])} GFLOP/s, "
        f"{number(rates['gexps'])} · 10⁹ exponentials/s, memory {number(rates['gbytes'])} GB/s. "
        f"Medians, quartiles in brackets.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in result["rows"]]
    missing = [f"- {row['name']}: {row['reason']}" for row in result["rows"] if row["reason"]]
    lines += ["", *missing] if missing else []
    return "\n".join([*lines, "", "```console", str(result["command"]), "```", ""])


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the sweeps: a row of panels for each suite, time against n, length and batch; both axes logarithmic.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise MissingExtraError('plots need matplotlib: pip install "compressm[bench]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points: list[dict[str, Any]] = result["sweep"]
    suites = list(dict.fromkeys(point["suite"] for point in points))
    axes_names = {"n": "state dimension n", "length": "sequence length", "batch": "batch"}
    figure, panels = plt.subplots(
        len(suites), 3, figsize=(11, 3.3 * len(suites)), layout="constrained", squeeze=False, sharey="row"
    )
    for suite, line in zip(suites, panels, strict=True):
        for axis, panel in zip(axes_names, line, strict=True):
            chosen = sorted((p for p in points if (p["suite"], p["axis"]) == (suite, axis)), key=lambda p: p["value"])
            if not chosen:
                continue
            _curve(panel, chosen, "ours", "compressm", "#0b6e4f")
            _curve(panel, chosen, "peer", chosen[0]["peer"], "#c8553d")
            panel.plot(
                [p["value"] for p in chosen],
                [p["roofline_ms"] for p in chosen],
                color="#888888",
                linestyle=":",
                label="limit of the machine",
            )
            panel.set(xscale="log", yscale="log", xlabel=axes_names[axis])
            ticks = [p["value"] for p in chosen]
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_title(f"{suite}: {_others(chosen[0], axis)}", fontsize=9)
        line[0].set_ylabel("ms a step, forward and backward")
        line[0].legend(frameon=False, fontsize=8)
    with replacing(path) as new:
        figure.savefig(new, dpi=140, format=path.suffix[1:] or None)
    plt.close(figure)


def _curve(panel: Any, points: Sequence[Mapping[str, Any]], side: str, label: str, colour: str) -> None:
    known = [point for point in points if point[f"{side}_ms"] is not None]
    at = [point["value"] for point in known]
    panel.plot(at, [point[f"{side}_ms"] for point in known], color=colour, marker="o", markersize=3.5, label=label)
    low, high = zip(*(point[f"{side}_quartiles_ms"] for point in known), strict=True) if known else ((), ())
    panel.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)


def _others(point: Mapping[str, Any], axis: str) -> str:
    return ", ".join(f"{key} {value}" for key, value in point["sizes"].items() if key not in (axis, "device"))
