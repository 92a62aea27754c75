"""Hankel singular values over the course of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from compressm.adapters import find_layers
from compressm.cutting.spectrum import (
    SpectrumChange,
    snapshot,
    snapshot_state,
    spectrum_changes,
)
from compressm.theory.balanced import Balanced
from compressm.theory.balancing import Method

_DIGITS = 5  # of a singular value in the record


class SpectrumLog:
    """Records the Hankel singular values of linear time-invariant layers. Those of selective layers depend on the data.

    Args:
        method: see `balancing`.

    Attributes:
        record: for every look its ``step``, and under ``layers``, by layer name: ``states``; ``hsv``, see
            `Balanced.mean_hsv`; and ``change``, a `SpectrumChange` since the look before. It is None where that one was
            of another order.
    """

    def __init__(self, method: Method) -> None:
        self.method: Method = method
        self.record: list[dict[str, Any]] = []
        self._previous: dict[str, Balanced] = {}

    def look(self, model: nn.Module, step: int) -> None:
        """Add an entry."""
        now: dict[str, Balanced] = {
            name: adapter.balance(layer, method=self.method)
            for name, (layer, adapter) in find_layers(model).items()
            if not adapter.needs_data
        }
        changes = spectrum_changes(self._previous, now)
        self.record.append(
            {
                "step": step,
                "layers": {
                    name: {
                        "states": balancing.energy.shape[-1],
                        "hsv": [float(f"{value:.{_DIGITS}g}") for value in balancing.mean_hsv().tolist()],
                        "change": asdict(changes[name]) if name in changes else None,
                    }
                    for name, balancing in now.items()
                },
            }
        )
        self._previous = now

    def back_to(self, step: int) -> None:
        """Forget what was seen at a step and after it."""
        if self.record and self.record[-1]["step"] >= step:
            self.record = [entry for entry in self.record if entry["step"] < step]
            self._previous = {}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"record": self.record, "previous": {k: snapshot_state(v) for k, v in self._previous.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.record = list(state["record"])
        self._previous = {name: snapshot(value, self.method) for name, value in state["previous"].items()}


def settled_at(record: Sequence[Mapping[str, Any]], layer: str, threshold: float = 0.02) -> int | None:
    """The step from which on a layer's spectrum held still, see `SpectrumChange.settled`. None if it never did.

    Only looks that could be compared with the one before count.
    """
    settled: int | None = None
    previous: int | None = None
    for entry in record:
        change = entry["layers"].get(layer, {}).get("change")
        if change is not None and previous is not None:
            still = SpectrumChange(**change).settled(threshold)
            settled = None if not still else previous if settled is None else settled
        previous = entry["step"]
    return settled


__all__ = ["SpectrumLog", "settled_at"]
