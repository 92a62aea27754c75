"""The report of one cut, layer by layer: values that print as a table and convert to JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compressm.cutting.serving import Serving
from compressm.runtime.html import table
from compressm.theory.certificate import Certificate
from compressm.theory.recurrence import ErrorEstimate


@dataclass(frozen=True)
class LayerReport:
    """The report of one cut about one layer.

    Attributes:
        name: the layer's name in the model.
        states_before, states_after: state dimension; equal if the layer is not cut.
        outcome: ``"cut"``, ``"kept"`` (the rule asks for no cut, or its gate rejects it) or ``"refused"`` (the
            certificate failed).
        reason: why the layer is not cut, or not as far as a rule of size asks, in words; empty otherwise.
        certificate: of the truncation; for a selective layer the predicted error of its recurrence. None if there is
            none.
        hsv: Hankel singular values before the cut, decreasing; their mean if the layer has several systems.
        energy_kept: share of the layer's Hankel energy that the cut keeps, over all its systems; `RankRule.tolerance`
            promises it. See `SelectiveReduction.discarded` for selective layers. None without a cut, and if states were
            pruned without a change of basis.
        error_on_data: relative error of the layer's output on the data of the cut, measured by running the layer before
            and after on the same inputs, see `compressm.cutting.replay`. During training it is measured on the last
            observed sequence, for selective layers only. None without a cut or without data.
        error_held_out: the error to expect on other data, measured with two cuts to as many states: each is computed
            from half of the sequences and measured on the other half. None if the cut does not depend on the data
            (time-invariant layers), if there is only one sequence, and during training.
        poles_before, poles_after: eigenvalues of a linear time-invariant layer that was cut; empty otherwise.
        predicted_loss: rise of the loss predicted for the cut of this layer alone, in nats per prediction; see
            `compressm.observing.damage`. None without evidence from the loss.
        matched: relative error of the layer's output on held-out sequences, by the truncation and after ``match_steps``
            (the certificate is of the truncation); None if the layer is written as truncated.
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
    predicted_loss: float | None = None
    matched: tuple[float, float] | None = None

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
    """Real and imaginary parts, rounded to four decimals."""
    return [[round(value.real, 4), round(value.imag, 4)] for value in values]


def _number(value: float | None, width: int, digits: int) -> str:
    """A cell of the table."""
    return f"{'' if value is None else f'{value:.{digits}e}':>{width}}"


PICK_NAMES = {
    "fisher": "the Fisher matrix",
    "saliency": "the Fisher matrix's diagonal",
    "moments": "second moments",
    "powers": "powers of states and outputs",
    "mixed": "the Fisher matrix or second moments, layer by layer",
}
_CHANGES = ("predicted_loss", "measured_loss", "measured_loss_error", "metric_before", "metric_after")


@dataclass(frozen=True)
class Report:
    """The report of one cut of a model, layer by layer, with its duration in seconds.

    ``print`` shows for every layer the error of its output measured on the data and on held-out data, the expected
    error, and the H-infinity error with its bound. The expected error of a linear time-invariant layer is the relative
    H2 error, which holds under white noise. That of a selective layer is the error of its recurrence, before the norm
    and the projection that follow.

    Attributes:
        layers: in the model's order.
        seconds: duration.
        predicted_loss: rise of the loss predicted for all cuts together, in nats per prediction. None without evidence
            from the loss.
        measured_loss: the same, measured on held-out data before the cut was written; see `compressm.cutting.rise`.
        measured_loss_error: standard error of ``measured_loss``.
        picks: how states were picked where layers leave a choice (``"fisher"``, ``"saliency"``, ``"moments"``,
            ``"powers"`` or ``"mixed"``), each with the rise of the loss on the data of the cut; the first was taken,
            and the others were tried. See `compressm.cutting.picking`. Empty without such layers.
        hint: what else could be tried, in words; empty for nothing.
        metric_before, metric_after: what ``evaluate`` returned for the model before and after the cut, if the cut was
            searched for under ``max_drop``; else None.
        serving: bytes of state before and after; None in training, and for layers whose width is not known.
    """

    layers: tuple[LayerReport, ...]
    seconds: float
    predicted_loss: float | None = None
    measured_loss: float | None = None
    measured_loss_error: float | None = None
    metric_before: float | None = None
    metric_after: float | None = None
    serving: Serving | None = None
    picks: tuple[tuple[str, float], ...] = ()
    hint: str = ""

    @property
    def cut(self) -> bool:
        """Whether any layer was cut."""
        return any(layer.outcome == "cut" for layer in self.layers)

    @property
    def state_dims(self) -> dict[str, int]:
        """State dimension of every layer afterwards."""
        return {layer.name: layer.states_after for layer in self.layers}

    def rises(self) -> list[str]:
        """Lines about what layers have learnt, and about the rise of the loss, as far as it is known."""
        lines = [
            f"{one.name} learnt the old layer's output: error {one.matched[0]:.2g} → {one.matched[1]:.2g}"
            for one in self.layers
            if one.matched is not None
        ]
        if self.picks:
            (taken, rise), *others = self.picks
            tried = "".join(f", by {PICK_NAMES[one]} {nats:.3g}" for one, nats in others)
            lines.append(f"states picked by {PICK_NAMES[taken]}: {rise:.3g} nats on the data of the cut{tried}")
        if self.predicted_loss is not None:
            lines.append(f"predicted rise of the loss: {self.predicted_loss:.3g} nats per prediction")
        if self.measured_loss is not None:
            error = f" ± {self.measured_loss_error:.1g}" if self.measured_loss_error else ""
            lines.append(f"measured on held-out data:  {self.measured_loss:.3g}{error}")
        return lines

    def changes(self) -> list[str]:
        """Lines about the rise of the loss and the change of the metric, as far as they are known."""
        lines = self.rises()
        if self.metric_before is not None and self.metric_after is not None:
            lines.append(f"metric: {self.metric_before:.4g} → {self.metric_after:.4g}")
        return [*lines, self.hint] if self.hint else lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        numbers = {name: getattr(self, name) for name in _CHANGES}
        known = {name: value for name, value in numbers.items() if value is not None}
        serving = {} if self.serving is None else {"serving": self.serving.to_dict()}
        picks = {"picks": dict(self.picks)} if self.picks else {}
        layers = [layer.to_dict() for layer in self.layers]
        return {"seconds": self.seconds, **known, **picks, **serving, "layers": layers}

    def _repr_html_(self) -> str:
        columns = ["layer", "states", "on data", "held out", "expected", "H∞ error", "bound", "outcome"]
        rows: list[list[object]] = []
        for layer in self.layers:
            errors = (None, None, None) if layer.certificate is None else layer.certificate.errors()
            states = f"{layer.states_before} → {layer.states_after}"
            outcome = f"{layer.outcome}{': ' + layer.reason if layer.reason else ''}"
            rows.append([layer.name, states, layer.error_on_data, layer.error_held_out, *errors, outcome])
        served = "" if self.serving is None else self.serving.headline()
        return table(
            "Report of a cut: relative errors of each layer's output", columns, rows, [served, *self.changes()]
        )

    def __str__(self) -> str:
        titles = f"{'on data':>9} {'held out':>9} {'expected':>9} {'H∞ error':>10} {'bound':>10}"
        rows = [] if self.serving is None else [self.serving.headline()]
        rows.append(f"{'layer':32} {'states':>14} {titles}  outcome")
        for layer in self.layers:
            dims, c = f"{layer.states_before} → {layer.states_after}", layer.certificate
            expected, *hinf = (None, None, None) if c is None else c.errors()
            shares = [_number(value, 9, 2) for value in (layer.error_on_data, layer.error_held_out, expected)]
            numbers = " ".join([*shares, *(_number(value, 10, 3) for value in hinf)])
            outcome = f"{layer.outcome}{': ' + layer.reason if layer.reason else ''}"
            rows.append(f"{layer.name:32} {dims:>14} {numbers}  {outcome}")
        rows += self.changes()
        return "\n".join(rows)


__all__ = ["LayerReport", "Report"]
