"""Plots of a spectrum, by matplotlib or plotly, whichever is installed."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

from compressm.errors import MissingExtraError

Backend = Literal["plotly", "matplotlib"]
# Distinguishable for colour-blind readers (most colours are Okabe and Ito's), on white and on black backgrounds.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8f7fee", "#999999")
_X = "states kept, r"
_FLOOR = 1e-8  # smaller values count as zero


def plot_discarded(discarded: Mapping[str, Sequence[float]], backend: Backend | None = None) -> Any:
    """Plot the share of energy that is discarded if r states are kept, one line per layer; see `Spectrum.plot`.

    Args:
        discarded: by layer name, the share of the Hankel energy that is lost if 1, 2, ... states are kept.
        backend: ``"plotly"`` or ``"matplotlib"``; by default plotly where it is installed.
    """
    titles = "Energy beyond the first r states", "share of the Hankel energy discarded"
    return _plot(discarded, titles, backend)


def plot_rise(rises: Mapping[str, Sequence[float]], backend: Backend | None = None) -> Any:
    """Plot the predicted rise of the loss if r states are kept, one line per layer; see `Spectrum.plot`.

    Args:
        rises: by layer name, nats per prediction if 1, 2, ... states are kept.
        backend: see `plot_discarded`.
    """
    titles = "Rise of the loss if r states are kept", "predicted rise of the loss (nats per prediction)"
    return _plot(rises, titles, backend)


def _plot(values: Mapping[str, Sequence[float]], titles: tuple[str, str], backend: Backend | None) -> Any:
    """Plot a value per number of states, one line per layer; ``titles`` are those of the picture and of its y axis."""
    backend = _backend(backend)
    lines = [(name, [max(value, _FLOOR) for value in layer]) for name, layer in values.items()]
    return _plotly(lines, *titles) if backend == "plotly" else _matplotlib(lines, *titles)


def _backend(asked: Backend | None) -> Backend:
    """The backend that was asked for, or the one that is there."""
    backend = asked or ("plotly" if _found("plotly") else "matplotlib")
    if backend not in ("plotly", "matplotlib"):
        raise ValueError(f"backend must be 'plotly' or 'matplotlib'; got {backend!r}")
    return backend


def _found(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


def _plotly(lines: list[tuple[str, list[float]]], title: str, y_title: str) -> Any:
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise MissingExtraError('this picture needs plotly: pip install "compressm[train]"') from error
    figure = graph_objects.Figure(layout={"title": title, "xaxis_title": _X, "yaxis_title": y_title})
    for index, (name, shares) in enumerate(lines):
        figure.add_scatter(
            x=list(range(1, len(shares) + 1)),
            y=shares,
            name=html.escape(name, quote=False),
            line={"color": COLOURS[index % len(COLOURS)]},
        )
    figure.update_yaxes(type="log", exponentformat="power")
    return figure


def _canvas() -> tuple[Any, Any]:
    """A figure of matplotlib, and its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('this picture needs matplotlib: pip install "compressm[train]"') from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")  # without pyplot, which has global state and opens windows
    return figure, figure.subplots()


def _matplotlib(lines: list[tuple[str, list[float]]], title: str, y_title: str) -> Any:
    figure, axis = _canvas()
    for index, (name, shares) in enumerate(lines):
        axis.semilogy(range(1, len(shares) + 1), shares, label=name, color=COLOURS[index % len(COLOURS)])
    for tolerance in (0.1, 0.01, 0.001):
        axis.axhline(tolerance, color="#999999", linewidth=0.6, linestyle=":")
    axis.set(title=title, xlabel=_X, ylabel=y_title, xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    if len(lines) <= 12:
        axis.legend(frameon=False, fontsize=8)
    return figure


def plot_metrics(
    values: Mapping[int, Sequence[float]], title: str, y_title: str, backend: Backend | None = None
) -> Any:
    """Plot the metrics that trainings of several sizes reach, and their means; see `Probe.plot`.

    Args:
        values: metrics by number of states.
        title: of the picture.
        y_title: of the metrics' axis.
        backend: see `plot_discarded`.
    """
    chosen, x_title = _backend(backend), "states (logarithmic)"
    points = [(states, value) for states, metrics in values.items() for value in metrics]
    means = [(states, sum(metrics) / len(metrics)) for states, metrics in sorted(values.items())]
    if chosen == "plotly":
        figure = _plotly([], title, y_title)
        figure.add_scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="markers", name="a seed each")
        figure.add_scatter(x=[x for x, _ in means], y=[y for _, y in means], name="mean")
        figure.update_xaxes(type="log", title=x_title)
        return figure.update_yaxes(type="linear")
    figure, axis = _canvas()
    axis.plot(*zip(*points, strict=True), ".", color=COLOURS[0], label="a seed each")
    axis.plot(*zip(*means, strict=True), color=COLOURS[1], label="mean")
    axis.set(title=title, xlabel=x_title, ylabel=y_title, xscale="log")
    axis.set_xticks(list(values), [str(states) for states in values], minor=False)
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return figure


__all__ = ["COLOURS", "Backend", "plot_discarded", "plot_metrics", "plot_rise"]
