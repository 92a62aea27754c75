"""The charts of a page, as plain data for plotly."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from compressm.cutting.plots import COLOURS
from compressm.lab.pages.metrics import axis_of, curve_of, front, name_of, scaled, shown
from compressm.lab.pages.runs import Run
from compressm.lab.runs.result import RunResult
from compressm.observing.scores import better

Trace = dict[str, Any]

_FRONT = "Pareto front"
BEFORE, AFTER, CUT, UNDONE = "#8d99ae", "#009e73", "#009e73", "#d55e00"


@dataclass(frozen=True)
class Frame:
    """One position of a chart's slider.

    Attributes:
        label: says which.
        traces: plotly's ``data``.
        layout: plotly's ``layout``, as far as it differs from the chart's.
        first: whether it is shown first, where the slider has others before it.
    """

    label: str
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict[str, Any])
    first: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with a choice of views (layers, say), each with one frame or several.

    Attributes:
        title, caption: text around it.
        views: frames by the view's name.
        layout: plotly's ``layout``.
        square: drawn as high as wide.
    """

    title: str
    caption: str
    views: dict[str, list[Frame]]
    layout: dict[str, Any]
    square: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        views = {
            name: [{"label": f.label, "traces": f.traces, "layout": f.layout, "first": f.first} for f in frames]
            for name, frames in self.views.items()
        }
        return {"views": views, "layout": self.layout, "square": self.square}


def run_charts(run: Run) -> list[Chart]:
    """Everything that can be drawn of one run."""
    charts = [progress(run), dimensions(run), spectra(run), poles(run), certificates(run), costs(run)]
    return [chart for chart in charts if chart is not None]


def comparison_charts(runs: Sequence[Run]) -> list[Chart]:
    """Several runs beside each other: their metric over the steps, against states, and against time.

    Runs that are measured by another metric than the first one are left out.
    """
    finished = [(run, run.result) for run in runs if run.result is not None]
    alike = [(run, result) for run, result in finished if result.metric == finished[0][1].metric]
    if len(alike) < 2:
        return []
    return [_curves(alike), _pareto(alike, "states"), _pareto(alike, "seconds")]


def _text(value: object) -> str:
    """A name for plotly, which reads some HTML in text."""
    return html.escape(str(value), quote=False)


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def _events(run: Run) -> list[dict[str, Any]]:
    """Vertical lines where something was cut, and where a cut was undone."""
    lines: list[dict[str, Any]] = []
    for event in run.history:
        if event["kind"] in ("cut", "rolled_back"):
            undone = event["kind"] == "rolled_back"
            lines.append(
                {
                    "type": "line", "x0": event["step"], "x1": event["step"], "yref": "paper", "y0": 0, "y1": 1,
                    "line": {"color": UNDONE if undone else CUT, "width": 1, "dash": "dash" if undone else "dot"},
                }
            )  # fmt: skip
    return lines


def progress(run: Run) -> Chart | None:
    """Training loss and the metric on validation data over the steps, with the cuts and the roll-backs."""
    if run.result is None or not run.result.curve:
        return None
    curve, metric = curve_of(run.result), run.result.metric
    steps = [step for step, _ in curve]
    traces: list[Trace] = [
        {
            "x": steps, "y": [value for _, value in curve], "name": f"validation {axis_of(metric)}",
            "mode": "lines+markers", "line": {"color": COLOURS[0]},
        },
        {
            "x": steps, "y": [point["loss"] for point in run.result.curve], "name": "training loss", "yaxis": "y2",
            "mode": "lines", "line": {"color": COLOURS[4]},
        },
    ]  # fmt: skip
    kept = [event for event in run.history if event["kind"] in ("kept", "rolled_back") and event["metric"] is not None]
    for kind, name, colour in (("kept", "cut kept", CUT), ("rolled_back", "cut undone", UNDONE)):
        at = [event for event in kept if event["kind"] == kind]
        if at:
            traces.append(
                {
                    "x": [event["step"] for event in at], "name": name,
                    "y": [scaled(metric, event["metric"]) for event in at],
                    "mode": "markers", "marker": {"color": colour, "size": 10, "symbol": "diamond"},
                    "text": [f"held against {shown(metric, event['reference'] or 0)}" for event in at],
                }
            )  # fmt: skip
    layout = {
        "xaxis": _axis("training step"),
        "yaxis": _axis(axis_of(metric)),
        "yaxis2": _axis("loss", overlaying="y", side="right", showgrid=False, tickmode="auto", nticks=6),
        "shapes": _events(run),
    }
    caption = "Dotted lines: cuts. Dashed lines: cuts that were undone."
    return Chart(f"Loss and {name_of(metric)}", caption, {"": [Frame("", traces)]}, layout)


def dimensions(run: Run) -> Chart | None:
    """State dimension of every layer over the steps."""
    lines: dict[str, tuple[list[float], list[int]]] = {}
    before: dict[str, int] = {}
    for event in run.history:
        if event["kind"] == "cut":
            before = {layer["name"]: layer["states_before"] for layer in event["layers"]}
            now = {layer["name"]: layer["states_after"] for layer in event["layers"]}
        elif event["kind"] == "rolled_back":
            now = before
        else:
            continue
        for name, states in now.items():
            line = lines.setdefault(name, ([0], [before[name]]))
            line[0].append(event["step"])
            line[1].append(states)
    last = run.result.steps if run.result else max((event["step"] for event in run.history), default=0)
    if run.result is not None and not lines:
        names = run.layers or [f"layer {index}" for index in range(len(run.result.state_dims))]
        lines = {name: ([0], [n]) for name, n in zip(names, run.result.state_dims, strict=False)}
    if not lines:
        return None
    traces: list[Trace] = [
        {
            "x": [*steps, last], "y": [*states, states[-1]], "name": _text(name), "mode": "lines",
            "line": {"shape": "hv", "width": 2, "color": COLOURS[index % len(COLOURS)]},
        }
        for index, (name, (steps, states)) in enumerate(lines.items())
    ]  # fmt: skip
    layout = {"xaxis": _axis("training step"), "yaxis": _axis("states", rangemode="tozero"), "shapes": _events(run)}
    return Chart("State dimension", "Of every layer, over the training.", {"": [Frame("", traces)]}, layout)


def spectra(run: Run) -> Chart | None:
    """Hankel singular values of a layer at every cut, and between cuts where they were recorded."""
    views: dict[str, list[Frame]] = {}
    for name in run.layers:
        frames: list[tuple[int, Frame]] = []
        for event in run.history:
            for layer in event["layers"]:
                if layer["name"] == name and layer["hsv"]:
                    frames.append((event["step"], _spectrum(run, event, layer)))
        for entry in (run.result.spectra if run.result else None) or []:
            if name in entry["layers"]:
                states = entry["layers"][name]["states"]
                trace = _points(entry["layers"][name]["hsv"], states, states)
                frames.append((entry["step"], Frame(f"step {entry['step']:,}", trace)))
        if frames:
            views[_text(name)] = [frame for _, frame in sorted(frames, key=lambda item: item[0])]
    if not views:
        return None
    layout = {
        "xaxis": _axis("state"),
        "yaxis": _axis("Hankel singular value", type="log", exponentformat="power", dtick=1),
    }
    caption = (
        "How much of the input's energy reaches the output through each direction of the state; what was cut is grey."
    )
    return Chart("Hankel singular values", caption, views, layout)


def _label(run: Run, event: dict[str, Any], layer: dict[str, Any]) -> str:
    """What became of a layer at an event."""
    made = f"{layer['states_before']} → {layer['states_after']} states" + ", undone" * run.was_undone(event)
    what = {"cut": made, "refused": "refused"}.get(layer["outcome"], "not cut")
    return f"step {event['step']:,}: {what}"


def _spectrum(run: Run, event: dict[str, Any], layer: dict[str, Any]) -> Frame:
    before, after = layer["states_before"], layer["states_after"]
    label, cut = _label(run, event, layer), layer["outcome"] == "cut"
    return Frame(label, _points(layer["hsv"], before, after if cut else before), first=cut)


def _points(hsv: Sequence[float], states: int, kept: int) -> list[Trace]:
    """Values over the states that they belong to: two values to a state where a real system was balanced."""
    floor = 1e-12 * max(hsv[0], 1e-300)
    x = [round((index + 1) * states / len(hsv), 3) for index in range(len(hsv))]
    return [
        {
            "x": x, "y": [float(f"{max(value, floor):.4g}") for value in hsv], "mode": "markers", "showlegend": False,
            "marker": {"color": [AFTER if state <= kept else BEFORE for state in x], "size": 5},
        }
    ]  # fmt: skip


def poles(run: Run) -> Chart | None:
    """Eigenvalues of a layer in the unit disc before and after every cut."""
    views: dict[str, list[Frame]] = {}
    for event in run.cuts:
        for layer in event["layers"]:
            if layer.get("poles_after"):
                traces = [
                    _circle(),
                    _disc("before", layer["poles_before"], BEFORE, "circle-open"),
                    _disc("after", layer["poles_after"], AFTER, "circle"),
                ]
                views.setdefault(_text(layer["name"]), []).append(Frame(_label(run, event, layer), traces))
    if not views:
        return None
    layout = {
        "xaxis": _axis("real part", range=[-1.05, 1.05]),
        "yaxis": _axis("imaginary part", range=[-1.05, 1.05], scaleanchor="x"),
    }
    caption = "Near the circle: long memory. The angle is the frequency that a state resonates at."
    return Chart("Eigenvalues in the unit disc", caption, views, layout, square=True)


def _circle() -> Trace:
    angles = [2 * math.pi * k / 180 for k in range(181)]
    return {
        "x": [round(math.cos(a), 4) for a in angles], "y": [round(math.sin(a), 4) for a in angles], "mode": "lines",
        "line": {"color": BEFORE, "width": 1}, "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip


def _disc(name: str, values: Sequence[Sequence[float]], colour: str, symbol: str) -> Trace:
    return {
        "x": [value[0] for value in values], "y": [value[1] for value in values], "name": name, "mode": "markers",
        "marker": {"color": colour, "symbol": symbol, "size": 6},
    }  # fmt: skip


def certificates(run: Run) -> Chart | None:
    """The promised error of every cut against the true one; for selective layers the one to expect."""
    views: dict[str, list[Frame]] = {}
    certain: dict[str, tuple[list[float], list[float], list[str]]] = {}
    for event in run.cuts:
        for layer in event["layers"]:
            certificate = layer["certificate"] or {}
            if layer["outcome"] == "cut" and certificate.get("bound") is not None and "hinf_error" in certificate:
                bounds, errors, labels = certain.setdefault(_text(layer["name"]), ([], [], []))
                bounds.append(certificate["bound"])
                errors.append(certificate["hinf_error"])
                labels.append(_label(run, event, layer))
    if not certain:
        return None
    traces: list[Trace] = [
        {
            "x": bounds, "y": errors, "text": labels, "name": name, "mode": "markers",
            "marker": {"color": COLOURS[index % len(COLOURS)], "size": 9},
        }
        for index, (name, (bounds, errors, labels)) in enumerate(certain.items())
    ]  # fmt: skip
    positive = [value for bounds, errors, _ in certain.values() for value in (*bounds, *errors) if value > 0]
    ends = [min(positive, default=1e-3) / 2, max(positive, default=1) * 2]
    traces.append(
        {"x": ends, "y": ends, "name": "error = bound", "mode": "lines", "line": {"color": BEFORE, "dash": "dot"}}
    )
    views[""] = [Frame("", traces)]
    layout = {
        "xaxis": _axis("promised H∞ error", type="log", exponentformat="power", dtick=1),
        "yaxis": _axis("true H∞ error", type="log", exponentformat="power", dtick=1),
    }
    caption = (
        "Promised is twice the sum of the discarded Hankel singular values. Every cut was checked: a point above the "
        "line would be an error larger than promised, and refused."
    )
    return Chart("Certificates", caption, views, layout)


def costs(run: Run) -> Chart | None:
    """Time and memory of a training step at every size."""
    phases = [phase for phase in (run.result.phases if run.result else []) if phase.get("step_seconds")]
    if not phases:
        return None
    x = [f"{'+'.join(str(n) for n in phase['state_dims'].values())}" for phase in phases]
    labels = [name if len(name) <= 12 else f"{name[:11]}…" for name in x]
    at = list(range(len(phases)))
    views = {
        "time": [
            Frame(
                "",
                [{"x": at, "y": [1000 * phase["step_seconds"] for phase in phases], "type": "bar", "text": x,
                  "textposition": "none", "marker": {"color": COLOURS[0]}}],
                {"yaxis": _axis("milliseconds a step", rangemode="tozero")},
            )
        ],
    }  # fmt: skip
    if all(phase.get("kept_bytes") for phase in phases):
        views["memory"] = [
            Frame(
                "",
                [{"x": at, "y": [phase["kept_bytes"] / 1e6 for phase in phases], "type": "bar", "text": x,
                  "textposition": "none", "marker": {"color": COLOURS[3]}}],
                {"yaxis": _axis("MB kept for the backward pass", rangemode="tozero")},
            )
        ]  # fmt: skip
    layout = {"xaxis": _axis("states", tickvals=at, ticktext=labels)}
    return Chart("Cost of a step", "Median over the steps at each size.", views, layout)


def _groups(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """A name and a colour for every run, the same for those that differ in their seed only."""
    names = [re.sub(r"-seed\d+( \(\d+\))?$", r"\1", run.name) for run in runs]
    order = list(dict.fromkeys(names))
    return [(_text(name), COLOURS[order.index(name) % len(COLOURS)]) for name in names]


def _curves(runs: Sequence[tuple[Run, RunResult]]) -> Chart:
    metric = runs[0][1].metric
    traces: list[Trace] = [
        {
            "x": [step for step, _ in curve_of(result)], "y": [value for _, value in curve_of(result)],
            "name": name, "mode": "lines", "line": {"color": colour},
        }
        for (_, result), (name, colour) in zip(runs, _groups([run for run, _ in runs]), strict=True)
    ]  # fmt: skip
    layout = {"xaxis": _axis("training step"), "yaxis": _axis(f"validation {axis_of(metric)}")}
    return Chart(f"Validation {name_of(metric)}", "Of all runs.", {"": [Frame("", traces)]}, layout)


def _pareto(runs: Sequence[tuple[Run, RunResult]], against: str) -> Chart:
    """The metric on the test data against a cost, and the front of the runs that no other beats."""
    metric = runs[0][1].metric
    points: list[tuple[float, float]] = []
    traces: list[Trace] = []
    for (run, result), (name, colour) in zip(runs, _groups([run for run, _ in runs]), strict=True):
        x = sum(result.state_dims) if against == "states" else result.train_seconds
        points.append((x, scaled(metric, result.score)))
        traces.append(
            {
                "x": [x], "y": [points[-1][1]], "name": name, "mode": "markers",
                "text": _text(run.name), "marker": {"color": colour, "size": 12},
            }
        )  # fmt: skip
    best = front(points, metric)
    line = {"color": BEFORE, "width": 1, "shape": "hv"}
    traces.append({"x": [x for x, _ in best], "y": [y for _, y in best], "name": _FRONT, "mode": "lines", "line": line})
    title = {"states": "states at the end, all layers", "seconds": "seconds of training"}[against]
    layout = {"xaxis": _axis(title, rangemode="tozero"), "yaxis": _axis(f"test {axis_of(metric)}")}
    what = {"states": "against states", "seconds": "against time"}[against]
    way = "Up" if better(metric) == "max" else "Down"
    caption = f"{way} and to the left is better. No run beats those on the grey line in both."
    return Chart(f"{name_of(metric).capitalize()} {what}", caption, {"": [Frame("", traces)]}, layout)


__all__ = ["Chart", "Frame", "comparison_charts", "run_charts"]
