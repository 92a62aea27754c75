"""The history of a compressor: one small class for each kind of event."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from compressm.errors import CheckpointError
from compressm.runtime.html import table

# Every event is stored with all of these keys, in this order. A kind without such a value stores the one given here.
_ABSENT: dict[str, Any] = {
    "seconds": 0.0, "layers": (), "metric": None, "reference": None, "restored_step": None, "graphs": 0,
    "loss": None, "error": None, "predicted_loss": None, "promised": None, "reason": "",
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    """Something that the compressor did after a training step.

    The kinds are `Cut`, `Unchanged`, `FellShort`, `Watched`, `Kept`, `RolledBack`, `Postponed`, `Stopped`, `Ended` and
    `Recompiled`.

    Attributes:
        kind: the kind as a word: ``"cut"``, ``"unchanged"``, ``"fell_short"``, ``"watched"``, ``"kept"``,
            ``"rolled_back"``, ``"postponed"``, ``"stopped"``, ``"ended"`` or ``"recompiled"``.
        step: number of training steps done when it happened.
        seconds: time that it took, without evaluations.
    """

    kind: ClassVar[str]

    step: int
    seconds: float = 0.0

    @property
    def layers(self) -> tuple[dict[str, Any], ...]:
        """The report and certificate of each layer (see `LayerReport.to_dict`), for `Cut` and `Unchanged` only."""
        return ()

    def __str__(self) -> str:
        return f"step {self.step}: {self._what()}"

    def _what(self) -> str:
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger, by name. Most kinds have none."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. All kinds have the same keys."""
        values = {name: getattr(self, name) for name in self._names()}
        return {"kind": self.kind, "step": self.step, **_ABSENT, **values, "layers": [dict(one) for one in self.layers]}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Event:
        """The inverse of `to_dict`. It also reads histories of earlier versions, which have fewer keys.

        Raises:
            CheckpointError: a kind that this version does not know.
        """
        kind = _KINDS.get(values["kind"])
        if kind is None:
            raise CheckpointError(
                f"a history has an event of kind {values['kind']!r}; this version knows {', '.join(_KINDS)}: read it "
                "with the version that wrote it"
            )
        known = {name: values[name] for name in kind._names() if name in values}  # later versions may store more keys
        if "layers" in known:
            known["layers"] = tuple(known["layers"])
        return kind(**known)

    @classmethod
    def _names(cls) -> list[str]:
        return [field.name for field in fields(cls)]


@dataclass(frozen=True)
class _Looked(Event):
    """A cut of all layers was planned.

    Attributes:
        layers: the report and certificate of each layer (see `LayerReport.to_dict`).
        reference: the metric right before the cut; None without ``evaluate``.
    """

    layers: tuple[dict[str, Any], ...] = ()  # pyright: ignore[reportIncompatibleMethodOverride]
    reference: float | None = None

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger, for each layer: states, kept share of Hankel energy and, where measured, the error of
        the output. A `Cut` adds its seconds."""
        values: dict[str, float] = {}
        for layer in self.layers:
            values[f"compressm/states/{layer['name']}"] = float(layer["states_after"])
            for name in ("energy_kept", "error_on_data"):
                if (value := layer.get(name)) is not None:
                    values[f"compressm/{name}/{layer['name']}"] = float(value)
        return values


@dataclass(frozen=True)
class Cut(_Looked):
    """At least one layer was cut.

    Attributes:
        metric: the metric right after the cut, on the same weights but for the cut; None without ``evaluate``.
        predicted_loss: rise of the training loss that was predicted for the cut, in nats per prediction; None if the
            cut was planned without evidence from the loss.
    """

    kind = "cut"

    metric: float | None = None
    predicted_loss: float | None = None

    def _what(self) -> str:
        changed = ", ".join(f"{layer['states_before']} → {layer['states_after']}" for layer in self.layers)
        text = f"cut, states {changed}"
        if self.metric is not None and self.reference is not None:
            text += f", metric {self.reference:.4g} → {self.metric:.4g}"
        if self.predicted_loss is not None:
            text += f", predicted rise of the loss {self.predicted_loss:.2g} nats"
        return text

    def metrics(self) -> dict[str, float]:
        values = {**super().metrics(), "compressm/cut_seconds": self.seconds}
        if self.metric is not None and self.reference is not None:
            values["compressm/metric_change"] = self.metric - self.reference
        if self.predicted_loss is not None:
            values["compressm/predicted_loss"] = self.predicted_loss
        return values


@dataclass(frozen=True)
class Unchanged(_Looked):
    """A cut was due, and its plan changes no layer."""

    kind = "unchanged"

    def _what(self) -> str:
        return "nothing to cut"


@dataclass(frozen=True)
class FellShort(Event):
    """No cut comes any more, and layers are larger than ``states``, ``fraction`` or ``total_states`` asks.

    Attributes:
        reason: what was asked for, what they have, and why, in words.
    """

    kind = "fell_short"

    reason: str = ""

    def _what(self) -> str:
        return self.reason


@dataclass(frozen=True)
class _Examined(Event):
    """A cut was examined.

    Attributes:
        metric: the metric, the mean of all examinations of the cut. None in a stored history if it was not finite.
        reference: where the training without the cut is expected to stand at that time.
        loss: how much worse the metric is than the reference; None in histories of earlier versions.
        error: standard error of the loss; None if it is not known.
    """

    metric: float | None = None
    reference: float | None = None
    loss: float | None = None
    error: float | None = None

    def _against(self) -> str:
        text = f"metric {_number(self.metric)} against {self.reference or 0:.4g}"
        return text if self.loss is None else f"{text}, loss {_with_error(self.loss, self.error)}"


def _number(metric: float | None) -> str:
    """A metric; None was stored for one that was not finite."""
    return "not finite" if metric is None else f"{metric:.4g}"


def _with_error(loss: float, error: float | None) -> str:
    return f"{loss:.2g}" if error is None else f"{loss:.2g} ± {error:.1g}"


@dataclass(frozen=True)
class Watched(_Examined):
    """A cut was examined, and noise may explain its loss, so that it is examined again."""

    kind = "watched"

    def _what(self) -> str:
        return f"cut watched on, {self._against()}"


@dataclass(frozen=True)
class Kept(_Examined):
    """A cut was examined and kept."""

    kind = "kept"

    def _what(self) -> str:
        return f"cut kept, {self._against()}"


@dataclass(frozen=True)
class RolledBack(_Examined):
    """A cut was examined and undone, and everything is as it was before the cut.

    Attributes:
        restored_step: the step whose weights and optimizer state were restored; the present one if the uncut twin took
            the cut model's place.
    """

    kind = "rolled_back"

    restored_step: int = 0

    def _what(self) -> str:
        back = "the uncut twin goes on" if self.restored_step == self.step else f"back to step {self.restored_step}"
        return f"cut undone, {back}, {self._against()}"

    def metrics(self) -> dict[str, float]:
        """The seconds of the roll-back, for a logger."""
        return {"compressm/cut_seconds": self.seconds}


@dataclass(frozen=True)
class Postponed(Event):
    """A cut was due and was not made, because the metric was not finite.

    Attributes:
        metric: the metric. None in a stored history, since JSON cannot store NaN or infinity.
    """

    kind = "postponed"

    metric: float | None = None

    def _what(self) -> str:
        return f"no cut, since the metric is {_number(self.metric)}"


@dataclass(frozen=True)
class Stopped(Event):
    """No more cuts will be tried, although some were planned.

    Attributes:
        reason: why, in words.
    """

    kind = "stopped"

    reason: str = ""

    def _what(self) -> str:
        return f"no more cuts will be tried: {self.reason}"


@dataclass(frozen=True)
class Ended(Event):
    """The training is at its end.

    Attributes:
        metric: the metric at the end. None in a stored history if it was not finite.
        loss: what the kept cuts cost together when they were examined; None if no cut was kept.
        error: standard error of the loss; None if it is not known.
        promised: what they were allowed to cost together, ``max_drop`` for each; None if no cut was kept.
    """

    kind = "ended"

    metric: float | None = None
    loss: float | None = None
    error: float | None = None
    promised: float | None = None

    def _what(self) -> str:
        if self.loss is None or self.promised is None:
            return f"end, metric {_number(self.metric)}; no cut was kept, so none cost anything"
        return (
            f"end, metric {_number(self.metric)}; the kept cuts cost {_with_error(self.loss, self.error)} when they "
            f"were examined, {self.promised:.2g} was allowed; where the training would be without cuts is not known, "
            "since none ran beside it to the end"
        )


@dataclass(frozen=True)
class Recompiled(Event):
    """`torch.compile` compiled graphs anew after a cut.

    Attributes:
        graphs: number of graphs.
    """

    kind = "recompiled"

    graphs: int = 0

    def _what(self) -> str:
        return f"{self.graphs} graphs recompiled"

    def metrics(self) -> dict[str, float]:
        """The number of graphs, for a logger."""
        return {"compressm/graphs_recompiled": float(self.graphs)}


_ALL = (Cut, Unchanged, FellShort, Watched, Kept, RolledBack, Postponed, Stopped, Ended, Recompiled)
_KINDS: dict[str, type[Event]] = {kind.kind: kind for kind in _ALL}


def history_line(step: int, steps: int, coming: Sequence[int], state_dims: Mapping[str, int]) -> str:
    """Where a compressor is, in one line: its step, the cuts that are still due, and the states of all layers.

    Layers of one size that follow each other are counted: ``24 layers of 128 states``.
    """
    cuts = f"cuts due at {', '.join(f'{one:,}' for one in coming)}" if coming else "no cut due"
    sizes = [(count, len([*same])) for count, same in itertools.groupby(state_dims.values())]
    layers = ", ".join(f"{many} layer{'s' if many > 1 else ''} of {count} states" for count, many in sizes)
    return f"step {step:,} of {steps:,}; {cuts}; {layers}"


def history_table(steps: int, state_dims: Mapping[str, int], history: Sequence[Event]) -> str:
    """A compressor's history as an HTML table, for notebooks."""
    rows = [[event.step, str(event).partition(": ")[2]] for event in history]
    dims = ", ".join(f"{name} {states}" for name, states in state_dims.items())
    return table(f"Compressor after {steps:,} steps: {dims}", ["step", "what"], rows, [] if rows else ["No cut yet."])


__all__ = [
    "Cut", "Ended", "Event", "FellShort", "Kept", "Postponed", "Recompiled", "RolledBack", "Stopped", "Unchanged",
    "Watched", "history_line", "history_table",
]  # fmt: skip
