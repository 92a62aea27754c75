"""The model card: what a compressed model is, how it came to its size, and how to load it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from compressm.cutting import Report, state_dims
from compressm.errors import CheckpointError, MissingExtraError
from compressm.theory.certificate import Certificate
from compressm.training.history import Cut, Event

_HEAD = """---
library_name: compressm
tags:
- state-space-model
- compressed
---
"""


def model_card(
    model: nn.Module, history: Sequence[Event] = (), saved: object = None, load: str = "compressm.load(FOLDER)"
) -> str:
    """A model card in Markdown, with the metadata that model hubs read.

    Args:
        model: the model as it is now.
        history: `Compressor.history`.
        saved: what the cuts saved, for example `Compressor.savings`; left out where it is None.
        load: the expression that loads the model.
    """
    from compressm import __version__  # not at the top: the package imports this module's users

    cuts = [event for event in history if isinstance(event, Cut)]
    first: dict[str, int] = {}
    for event in cuts:
        for layer in event.layers:
            first.setdefault(layer["name"], layer["states_before"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [_HEAD, f"# {type(model).__name__}", ""]
    lines += [f"{parameters:,} parameters. State dimensions by compressm {__version__}:", ""]
    lines += ["| layer | at first | now |", "|---|---:|---:|"]
    lines += [f"| `{name}` | {first.get(name, states)} | {states} |" for name, states in state_dims(model).items()]
    if history:
        lines += ["", "## How it was compressed", "", "While it trained. What was done after which step:", ""]
        lines += [f"- {line}" for event in history for line in _lines(event)]
    if saved is not None:
        lines += ["", f"{saved} (an estimate)."]
    lines += ["", "## Loading it", "", "```python", "import compressm", "", f"model = {load}", "```", ""]
    return "\n".join(lines)


def loading(model: nn.Module, folder: str, alone: bool) -> str:
    """The expression that loads a model from a folder; ``alone`` if `load` can build it by itself."""
    return f'compressm.load("{folder}")' if alone else f'compressm.load("{folder}", model={type(model).__name__}(...))'


_SECTION = "## Compressed states"
_TASKS = {"perplexity": "text-generation", "accuracy": "sequence-classification"}


@dataclass(frozen=True)
class Measured:
    """What was measured of the smaller model, for the ``model-index`` that hubs read.

    Attributes:
        data: name of the data.
        values: by the metric's name.
    """

    data: str
    values: Mapping[str, float]

    @property
    def task(self) -> str:
        """The task, in the words of model hubs."""
        return next((_TASKS[name] for name in self.values if name in _TASKS), "sequence-regression")


def extend_card(
    path: Path,
    report: Report,
    facts: Sequence[str] = (),
    measured: Measured | None = None,
    name: str | None = None,
) -> None:
    """Add what a cut did to a card that is there: a section, and among its metadata two tags and what was measured.

    The rest of the metadata is kept, the licence for one, but for the results of the uncut model: they are not those of
    this one.

    Args:
        path: the card, with or without metadata.
        report: of the cut.
        facts: further lines, such as the loss before and after.
        measured: of the smaller model; None if nothing was.
        name: of the model, where the card tells none; by default that of the card's folder.

    Raises:
        CheckpointError: the card's metadata cannot be read.
        MissingExtraError: huggingface_hub is not installed.
    """
    from compressm import __version__  # not at the top: the package imports this module's users

    try:
        from huggingface_hub import EvalResult, ModelCard
        from yaml import YAMLError
    except ModuleNotFoundError as error:
        raise MissingExtraError('cards need huggingface_hub: pip install "compressm[transformers]"') from error
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except (ValueError, YAMLError) as error:
        raise CheckpointError(f"{path.name}: its metadata cannot be read ({str(error).splitlines()[0]})") from error
    data: Any = card.data
    tags = list(data.get("tags") or [])
    data["tags"] = [*tags, *(tag for tag in ("compressed", "state-space-model") if tag not in tags)]
    data.model_name = data.model_name or name or path.resolve().parent.name
    data.eval_results = [] if measured is None else [
        EvalResult(measured.task, measured.data, measured.data, name, value) for name, value in measured.values.items()
    ]  # fmt: skip
    counts = Counter((layer.states_before, layer.states_after) for layer in report.layers)
    rows = [f"| {number} | {before} | {after} |" for (before, after), number in counts.items()]
    table = ["| layers | states before | states now |", "|---:|---:|---:|", *rows]
    lines = [_SECTION, "", f"The state dimension was cut by compressm {__version__}.", "", *table]
    bounds = [
        f"`{layer.name}`: H-infinity error {certificate.hinf_error:.3g}, its bound {certificate.bound:.3g}"
        for layer in report.layers
        if isinstance(certificate := layer.certificate, Certificate) and math.isfinite(certificate.bound)
    ]
    if facts or bounds:
        lines += ["", *(f"- {fact.strip()}" for fact in (*facts, *bounds))]
    card.text = f"{card.text.rstrip()}\n\n" + "\n".join(lines) + "\n"
    path.write_text(str(card), encoding="utf-8")


def _lines(event: Event) -> list[str]:
    if not isinstance(event, Cut):
        return [str(event)]
    layers = [layer for layer in event.layers if layer["outcome"] == "cut"]
    return [
        f"step {event.step}: `{layer['name']}` from {layer['states_before']} to {layer['states_after']} states"
        f"{_certificate(layer['certificate'] or {})}{_measured(layer.get('error_on_data'))}"
        for layer in layers
    ]


def _certificate(values: Mapping[str, Any]) -> str:
    if values.get("bound") is not None:
        return f"; H-infinity error {values['hinf_error']:.3g}, its bound {values['bound']:.3g}"
    if "relative_output_error" in values:
        expected = values["relative_output_error"] ** 0.5
        return f"; balanced by data and loss, expected error of its output {expected:.2%}"
    if "relative_error" in values:
        expected, least = values["relative_error"], values["least_error"]
        return f"; expected error of the recurrence {expected:.2%}, least possible {least:.2%}"
    return ""


def _measured(error: float | None) -> str:
    return "" if error is None else f"; error of its output on a sequence of the training data {error:.2%}"


__all__ = ["Measured", "extend_card", "loading", "model_card"]
