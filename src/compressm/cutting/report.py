"""What one reduction did to a model, layer by layer, as values that print as a table and go into JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compressm.theory.certificate import Certificate
from compressm.theory.recurrence import ErrorEstimate


@dataclass(frozen=True)
class LayerReport:
    """What a reduction does to one layer.

    Attributes:
        name: the layer's name in the model.
        states_before, states_after: state dimension; equal where nothing is cut.
        outcome: ``"cut"``, ``"kept"`` (the rule asks for no cut worth making) or ``"refused"`` (the certificate
            failed).
        reason: why, in words, unless cut.
        certificate: of the truncation, or for a selective layer the error to expect of its recurrence; None where none
            was computed.
        hsv: Hankel singular values before the cut, decreasing; the mean over the systems of a layer that has several.
        energy_kept: share of the layer's Hankel energy that the cut which was made keeps, all its systems together;
            `RankRule.tolerance` promises it. See `SelectiveReduction.discarded` for selective layers. None without a
            cut, and where states were taken out as they are.
        error_on_data: relative error of the layer's output on the data that the cut was made from, measured by running
            the layer before and after on the same inputs, see `compressm.cutting.replay`. In training on the sequence
            that was observed last, and for selective layers only. None without a cut or without data.
        error_held_out: the same on data that the cut was not made from, what to expect on others: measured with cuts to
            as many states, made from half of the sequences each, on the other half. None where the cut does not depend
            on the data (time-invariant layers), or there is only one sequence, or in training.
        poles_before, poles_after: eigenvalues of a linear time-invariant layer that was cut; empty otherwise.
    """

    name: str
    states_before: int
    states_after: int
    outcome: str
    reason: str
    certificate: Certificate | ErrorEstimate | None
    hsv: tuple[float, ...]
    energy_kept: float | None = None
    error_on_data: float | None = None
    error_held_out: float | None = None
    poles_before: tuple[complex, ...] = ()
    poles_after: tuple[complex, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **self.__dict__,
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
            "hsv": [float(f"{value:.6g}") for value in self.hsv],
            "poles_before": _pairs(self.poles_before),
            "poles_after": _pairs(self.poles_after),
        }


def _pairs(values: tuple[complex, ...]) -> list[list[float]]:
    """Real and imaginary parts, to four places."""
    return [[round(value.real, 4), round(value.imag, 4)] for value in values]


def _number(value: float | None, width: int, digits: int) -> str:
    """A cell of the table."""
    return f"{'' if value is None else f'{value:.{digits}e}':>{width}}"


@dataclass(frozen=True)
class Report:
    """What a reduction did to a model, layer by layer, and how long it took in seconds.

    ``print`` shows for every layer the error measured at its output on the data, and on held-out data; the error
    expected: of a linear
    time-invariant layer the relative H2 error, which is that under white noise, of a selective one the error of its
    recurrence, before the norm and the projection that follow; the H-infinity error and its bound.
    """

    layers: tuple[LayerReport, ...]
    seconds: float

    @property
    def cut(self) -> bool:
        """Whether any layer was cut."""
        return any(layer.outcome == "cut" for layer in self.layers)

    @property
    def state_dims(self) -> dict[str, int]:
        """State dimension of every layer afterwards."""
        return {layer.name: layer.states_after for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"seconds": self.seconds, "layers": [layer.to_dict() for layer in self.layers]}

    def __str__(self) -> str:
        titles = f"{'on data':>9} {'held out':>9} {'expected':>9} {'H∞ error':>10} {'bound':>10}"
        rows = [f"{'layer':32} {'states':>14} {titles}  outcome"]
        for layer in self.layers:
            dims, c = f"{layer.states_before} → {layer.states_after}", layer.certificate
            expected, *hinf = (None, None, None) if c is None else c.errors()
            shares = [_number(value, 9, 2) for value in (layer.error_on_data, layer.error_held_out, expected)]
            numbers = " ".join([*shares, *(_number(value, 10, 3) for value in hinf)])
            outcome = f"{layer.outcome}{': ' + layer.reason if layer.reason else ''}"
            rows.append(f"{layer.name:32} {dims:>14} {numbers}  {outcome}")
        return "\n".join(rows)


__all__ = ["LayerReport", "Report"]
