"""The page: everything in one file, plotly included, so that it opens offline; plotly and the data are compressed."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from compressm import __version__
from compressm.errors import ConfigError, MissingExtraError
from compressm.lab.pages.charts import Chart, comparison_charts, run_charts
from compressm.lab.pages.metrics import name_of, shown, validation_of
from compressm.lab.pages.runs import Run
from compressm.lab.pages.words import in_words
from compressm.runtime.files import write_text

_HERE = Path(__file__).parent


def write_page(runs: Sequence[Run], path: Path, command: str | None = None) -> None:
    """Write the page about some runs.

    Args:
        runs: from `load_runs`, at least one.
        path: the HTML file.
        command: the exact command line, for the record.

    Raises:
        ConfigError: no run, or the file cannot be written.
        MissingExtraError: plotly is not installed.
    """
    if not runs:
        raise ConfigError("report: no run was named")
    write_text(path, render(runs, command))


def render(runs: Sequence[Run], command: str | None = None) -> str:
    """The page as text; see `write_page`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    charts: dict[str, Chart] = {}

    def numbered(made: Sequence[Chart]) -> list[tuple[str, Chart, list[str]]]:
        named = [(f"chart-{len(charts) + index}", chart) for index, chart in enumerate(made)]
        charts.update(named)
        return [(name, chart, in_words(chart)) for name, chart in named]

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        comparison=numbered(comparison_charts(runs)),
        rows=[_row(run) for run in runs],
        runs=[
            {
                "name": run.name,
                "cards": _cards(run),
                "charts": numbered(run_charts(run)),
                "events": [_event(event) for event in run.history],
                "record": _record(run),
            }
            for run in runs
        ],
        command=command,
        version=__version__,
        # Scripts and styles are the package's own. The charts' data are not, and cannot end the script as base64.
        data=_packed(json.dumps({name: chart.to_dict() for name, chart in charts.items()}, allow_nan=False)),
        plotly=_plotly(),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


@cache
def _plotly() -> str:
    """plotly.js, packed: under 2 MB."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError('compressm report needs plotly: pip install "compressm[train]"') from error
    return _packed(get_plotlyjs())


def _packed(text: str) -> str:
    """Compressed, in base64."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 6, mtime=0)).decode("ascii")


def _cards(run: Run) -> list[tuple[str, str]]:
    """What was gained, in a few numbers: label and value."""
    result, cards = run.result, list[tuple[str, str]]()
    if result is None:
        return cards
    cards.append((f"test {name_of(result.metric)}", shown(result.metric, result.score)))
    if result.test_loss is not None:
        cards.append(("test loss", f"{result.test_loss:.4f}"))
    first = list(result.phases[0]["state_dims"].values()) if result.phases else result.state_dims
    now = _dims(result.state_dims)
    cards.append(("states", now if first == result.state_dims else f"{_dims(first)} → {now}"))
    cards.append(("training", _seconds(result.train_seconds)))
    if result.savings is not None:
        # Both costs in savings are sums of medians, which other work on the machine moves; their ratio is what counts.
        longer = result.savings["seconds_if_big"] / result.savings["seconds"]
        cards.append(("training without cuts (estimate)", _seconds(longer * result.train_seconds)))
    times = [1000 * phase["step_seconds"] for phase in result.phases if phase.get("step_seconds")]
    if len(times) > 1:
        cards.append(("a step", f"{times[0]:.3g} → {times[-1]:.3g} ms"))
    kept = [phase["kept_bytes"] for phase in result.phases if phase.get("kept_bytes")]
    if len(kept) > 1:
        cards.append(("memory for the backward pass", f"{kept[0] / 1e6:.1f} → {kept[-1] / 1e6:.1f} MB"))
    if result.energy is not None and result.energy.get("kwh") is not None:
        steps = result.energy.get("steps", result.steps)
        part = f", of {steps:,} of {result.steps:,} steps" if steps < result.steps else ""
        cards.append((f"energy (estimate{part})", f"{1000 * result.energy['kwh']:.2f} Wh"))
    return cards


def _dims(dims: Sequence[int]) -> str:
    return str(dims[0]) if len(set(dims)) == 1 else " + ".join(map(str, dims))


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _event(event: dict[str, Any]) -> dict[str, Any]:
    """A line of the history: the step, what happened, and for every layer the promised and the true error."""
    titles = {
        "cut": "cut", "rolled_back": "cut undone", "kept": "cut kept", "unchanged": "nothing to cut",
        "recompiled": "graphs recompiled", "postponed": "cut put off: the metric is not finite",
        "watched": "cut watched on", "fell_short": "the size was not reached", "stopped": "no more cuts",
        "ended": "end",
    }  # fmt: skip
    details: list[str] = [event["reason"]] if event.get("reason") else []
    if event.get("metric") is not None:
        details.append(_measured(event))
    if event.get("predicted_loss") is not None:
        details.append(f"predicted rise of the loss {event['predicted_loss']:.2g} nats")
    return {
        "step": f"{event['step']:,}",
        "what": titles.get(event["kind"], event["kind"]),
        "details": ", ".join(details),
        "layers": [_layer(layer) for layer in event["layers"]],
    }


def _measured(event: dict[str, Any]) -> str:
    """The metric of an event, beside what it is compared with and what was promised."""
    metric, reference, kind = event["metric"], event.get("reference"), event["kind"]
    if kind == "cut" and reference is not None:
        return f"metric {reference:.4f} → {metric:.4f}"
    text = f"metric {metric:.4f}"
    if kind not in ("postponed", "ended"):
        text += f" against {reference or 0:.4f}"
    if event.get("loss") is not None:
        what = "kept cuts cost" if kind == "ended" else "loss"
        text += f", {what} {event['loss']:.4f}"
        text += "" if event.get("error") is None else f" ± {event['error']:.4f}"
    if kind == "ended" and event.get("promised") is None:
        text += "; no cut was kept"
    if event.get("promised") is not None:
        text += f", allowed {event['promised']:.4f}; no training without cuts ran beside"
    if event.get("restored_step") is not None:
        text += f", back to step {event['restored_step']:,}"
    return text


def _layer(layer: dict[str, Any]) -> dict[str, str]:
    certificate = layer["certificate"] or {}
    relative = certificate.get("relative_h2_error", certificate.get("relative_error"))
    bound, error = certificate.get("bound"), certificate.get("hinf_error")
    return {
        "name": layer["name"],
        "states": f"{layer['states_before']} → {layer['states_after']}",
        "outcome": layer["outcome"] + (f": {layer['reason']}" if layer["reason"] else ""),
        "relative": "" if relative is None else f"{100 * relative:.2g} %",
        "on_data": "" if (measured := layer.get("error_on_data")) is None else f"{100 * measured:.2g} %",
        "bound": "" if bound is None else f"{bound:.3g}",
        "error": "" if error is None else f"{error:.3g}",
    }


def _record(run: Run) -> dict[str, str]:
    """What the run was made with."""
    result = run.result
    if result is None:
        return {}
    return {
        "command": result.command or "started from Python",
        "data": result.data,
        "seed": str(result.seed),
        "steps": f"{result.steps:,}",
        "device": f"{result.device}, {result.processes} processes of {result.threads} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        "configuration": json.dumps(result.config, indent=1),
    }


def _row(run: Run) -> dict[str, str]:
    """A line of the comparison."""
    result = run.result
    if result is None:
        empty = dict.fromkeys(("states", "test", "validation", "metric", "seconds", "seed"), "")
        return {"name": run.name, **empty}
    return {
        "name": run.name,
        "states": _dims(result.state_dims),
        "test": shown(result.metric, result.score),
        "validation": "" if (value := validation_of(result)) is None else shown(result.metric, value),
        "metric": name_of(result.metric),
        "seconds": _seconds(result.train_seconds),
        "seed": str(result.seed),
    }


__all__ = ["render", "write_page"]
