"""A chart in words, for who cannot see it."""

from __future__ import annotations

import html
from collections.abc import Sequence

from compressm.lab.pages.charts import Chart, Trace

_LINES = 8  # of a view, at most


def in_words(chart: Chart) -> list[str]:
    """What a chart shows: for every view and line its points, first and last value, least and largest."""
    lines: list[str] = []
    for view, frames in chart.views.items():
        frame = next((one for one in frames if one.first), frames[0])
        told = [text for trace in frame.traces if (text := _trace(trace))]
        more = [] if len(told) <= _LINES else [f"and {len(told) - _LINES} more"]
        where = ", ".join(filter(None, (html.unescape(view), frame.label)))
        lines.append((f"{where}: " if where else "") + "; ".join([*told[:_LINES], *more]) + ".")
    return lines


def _trace(trace: Trace) -> str:
    """One line or group of points."""
    x, y = list(trace["x"]), list(trace["y"])
    if trace.get("hoverinfo") == "skip" or not x:
        return ""
    name = html.unescape(str(trace.get("name", "")))
    labels = trace.get("text")
    if trace.get("type") == "bar" and isinstance(labels, Sequence) and not isinstance(labels, str):
        return ", ".join(f"{label}: {_number(value)}" for label, value in zip(labels, y, strict=False))
    if len(x) == 1:
        return f"{name} at {_number(x[0])}: {_number(y[0])}".strip()
    of = f"{name}, " if name else ""
    return (
        f"{of}{len(x)} points, from {_number(y[0])} at {_number(x[0])} to {_number(y[-1])} at {_number(x[-1])}, least "
        f"{_number(min(y))}, largest {_number(max(y))}"
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


__all__ = ["in_words"]
