"""What a compressor did and when: the lines of its history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something that the compressor did after a training step.

    Attributes:
        kind: ``"cut"``; ``"unchanged"`` (it looked, and no layer was to be cut); ``"postponed"`` (a cut was due, and
            the metric not finite); ``"kept"`` (a cut under observation proved harmless); ``"rolled_back"`` (it did not,
            and everything is as it was before it); ``"recompiled"`` (graphs were compiled anew after a cut).
        step: training steps done when it happened.
        seconds: time that it took, without evaluations.
        layers: per layer what was done, with its certificate (see `LayerReport.to_dict`); empty unless it looked.
        metric, reference: the metric after the cut, and the one that it was held against; None without ``evaluate``.
        restored_step: the step to which a roll-back went back.
        graphs: how many graphs were recompiled.
    """

    kind: str
    step: int
    seconds: float = 0.0
    layers: tuple[dict[str, Any], ...] = ()
    metric: float | None = None
    reference: float | None = None
    restored_step: int | None = None
    graphs: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self.__dict__, "layers": [dict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        changed = ", ".join(f"{layer['states_before']} → {layer['states_after']}" for layer in self.layers)
        metrics = "" if self.metric is None else f"metric {self.metric:.4g} against {self.reference or 0:.4g}"
        what = {
            "cut": f"cut, states {changed}",
            "unchanged": "nothing to cut",
            "postponed": f"no cut, since the metric is {self.metric}",
            "kept": f"cut kept, {metrics}",
            "rolled_back": f"cut undone, back to step {self.restored_step}, {metrics}",
            "recompiled": f"{self.graphs} graphs recompiled",
        }
        return f"step {self.step}: {what[self.kind]}"

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: after a cut, states, kept share of Hankel energy and, where measured, the error of the
        output per layer, and its seconds."""
        values: dict[str, float] = {}
        for layer in self.layers:
            values[f"compressm/states/{layer['name']}"] = float(layer["states_after"])
            if (kept := layer.get("energy_kept")) is not None:
                values[f"compressm/energy_kept/{layer['name']}"] = float(kept)
            if (error := layer.get("error_on_data")) is not None:
                values[f"compressm/error_on_data/{layer['name']}"] = float(error)
        if self.kind in ("cut", "rolled_back"):
            values["compressm/cut_seconds"] = self.seconds
        if self.kind == "recompiled":
            values["compressm/graphs_recompiled"] = float(self.graphs)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Event:
        """The inverse of `to_dict`."""
        names = {field.name for field in fields(cls)}
        known: dict[str, Any] = {name: value for name, value in values.items() if name in names}  # later ones tell more
        known["layers"] = tuple(values["layers"])
        return cls(**known)


__all__ = ["Event"]
