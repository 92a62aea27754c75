"""The spectrum of a model: Hankel singular values of its layers, and the change between two snapshots of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compressm.adapters import find_layers
from compressm.adapters.plain import check_readable, check_wrappers
from compressm.adapters.registry import check_plain
from compressm.cutting.choosing import Which, of_chosen_layers
from compressm.cutting.made_cuts import MadeCuts
from compressm.cutting.nats import damage_curves
from compressm.cutting.plots import Backend, plot_discarded, plot_rise
from compressm.cutting.spectrum_change import SpectrumChange, compare
from compressm.errors import ConfigError, InvalidRankRuleError, MissingExtraError, UnsupportedModelError
from compressm.observing.inputs import calls_and_batches, refuse_files
from compressm.observing.labels import Likelihood
from compressm.observing.loss_evidence import Gramians, Loss, evidence_on
from compressm.observing.over_data import gather
from compressm.runtime.html import table
from compressm.runtime.processes import raised_on_all
from compressm.theory.balanced import Balanced
from compressm.theory.balancing import Method, balance
from compressm.theory.covariance import balance_covariances
from compressm.theory.evidence import Covariances
from compressm.theory.rank_rule import RankRule, check_choice
from compressm.theory.ranks import choose_ranks
from compressm.theory.recurrence import Moments, balance_selective
from compressm.theory.selection import Selection
from compressm.theory.systems import DiagonalSystem

if TYPE_CHECKING:
    import pandas


# Shares of the energy, and nats, in a printed spectrum.
_LEVELS = (0.1, 0.01, 0.001)

_FEW, _MANY = 0.25, 0.5  # shares of the states that say "train small next time", and "state matters"


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's Hankel singular values.

    Attributes:
        name: the layer's name in the model.
        hsv: Hankel singular values, decreasing along the last axis, float64, shape ``(m,)`` with one or two values per
            state (see `Balancing`); ``(*batch, m)`` if the layer has several systems.
        energy: Hankel energy per complex state, decreasing, shape ``(n,)`` (see `Balancing.energy`); ``(*batch, n)``
            if the layer has several systems, one per channel or head, with one common rank.
        rise: predicted rise of the loss if this layer alone keeps 0, 1, ..., n states, in nats per prediction, shape
            ``(n + 1,)``; None without a loss.
    """

    name: str
    hsv: Tensor
    energy: Tensor
    rise: Tensor | None = None

    @property
    def states(self) -> int:
        """State dimension of the layer."""
        return self.energy.shape[-1]

    def states_for(self, tolerance: float) -> int:
        """The least number of states that hold all but this share of the Hankel energy. If states are selected, as in
        most selective layers, a cut that keeps as much energy needs more states."""
        return choose_ranks({self.name: self.energy}, RankRule(tolerance=tolerance))[self.name]

    def states_within(self, nats: float) -> int:
        """The least number of states with which the predicted rise of the loss is at most this, in nats per prediction.

        Raises:
            ConfigError: the spectrum was computed without a loss.
        """
        if self.rise is None:
            raise ConfigError(f"the loss of {self.name!r} is not known: call analyze(model, data=..., loss=...)")
        return max(1, int((self.rise > nats).sum()))

    def rise_by_state(self) -> list[float]:
        """Predicted rise of the loss if the first 1, 2, ... states are kept; empty if it is not known."""
        return [] if self.rise is None else self.rise[1:].tolist()

    def mean_energy(self) -> list[float]:
        """Energy per state, averaged over the layer's systems."""
        return self.energy.reshape(-1, self.states).mean(0).tolist()

    def discarded(self) -> list[float]:
        """Share of the Hankel energy that is lost if the first 1, 2, ... states are kept; the last entry is 0. If the
        layer has several systems, the largest share counts. If states are selected, a cut loses more."""
        beyond = self.energy.flip(-1).cumsum(-1).flip(-1)
        share = beyond[..., 1:] / beyond[..., :1].clamp_min(1e-300)
        return [*share.reshape(-1, share.shape[-1]).amax(0).tolist(), 0.0]


@dataclass(frozen=True)
class Spectrum:
    """Spectra of all layers of a model, in the order in which the model lists them."""

    layers: tuple[LayerSpectrum, ...]

    @classmethod
    def of(cls, balancings: Mapping[str, Balanced], rises: Mapping[str, Tensor] | None = None) -> Spectrum:
        """The spectrum of balanced layers, given by name, with the rise of the loss where it is known."""
        known = rises or {}
        return cls(tuple(LayerSpectrum(name, one.hsv, one.energy, known.get(name)) for name, one in balancings.items()))

    def __iter__(self) -> Iterator[LayerSpectrum]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerSpectrum:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; there are {[layer.name for layer in self.layers]}")

    def advice(self, nats: float = 0.01) -> str:
        """What the rise of the loss says about the next training of this kind, in a sentence; empty without a loss.

        Args:
            nats: how much of the loss all layers together may cost, in nats per prediction.
        """
        if not self.layers or any(layer.rise is None for layer in self.layers):
            return ""
        needed = sum(layer.states_within(nats / len(self)) for layer in self)
        present = sum(layer.states for layer in self)
        fact = f"{needed} of {present} states hold all but {nats:g} nats per prediction ({needed / present:.0%})"
        if needed <= _FEW * present:
            largest = max(layer.states_within(nats / len(self)) for layer in self)
            return (
                f"{fact}: train small next time, from {largest} states a layer, if compressm.probe says that so few "
                "learn as well; else cut this model"
            )
        if needed >= _MANY * present:
            return f"{fact}: state matters here, and a cut would cost"
        return f"{fact}: a cut would cost little, and a training that starts smaller is not obviously as good"

    def to_dict(self) -> dict[str, Any]:
        """Lists of numbers by layer name, for JSON."""
        return {
            layer.name: {"hsv": layer.hsv.tolist(), "energy": layer.energy.tolist()}
            | ({} if layer.rise is None else {"rise": layer.rise.tolist()})
            for layer in self.layers
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """A row per layer and state, with the columns ``layer``, ``state`` (from 1), ``energy``, and ``discarded``: the
        share of the layer's Hankel energy that is lost if the states up to this one are kept. With a loss there is also
        ``rise``, the predicted rise of the loss in nats per prediction.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("a data frame needs pandas: pip install pandas") from error
        rows = [
            {"layer": layer.name, "state": state, "energy": energy, "discarded": discarded}
            for layer in self.layers
            for state, (energy, discarded) in enumerate(zip(layer.mean_energy(), layer.discarded(), strict=True), 1)
        ]
        table = pandas.DataFrame(rows)
        if all(layer.rise is not None for layer in self.layers):
            table["rise"] = [rise for layer in self.layers for rise in layer.rise_by_state()]
        return table

    def plot(self, backend: Backend | None = None) -> Any:
        """Plot the cost of keeping only r states of a layer, on a logarithmic axis.

        The cost is the predicted rise of the loss where it is known of every layer, and otherwise the discarded share
        of the Hankel energy.

        Args:
            backend: ``"plotly"`` or ``"matplotlib"``; by default plotly where it is installed.

        Returns:
            a ``plotly.graph_objects.Figure`` or a ``matplotlib.figure.Figure``, which notebooks display.

        Raises:
            MissingExtraError: the backend is not installed.
            ValueError: another backend.
        """
        if all(layer.rise is not None for layer in self):
            return plot_rise({layer.name: layer.rise_by_state() for layer in self}, backend)
        return plot_discarded({layer.name: layer.discarded() for layer in self}, backend)

    def _repr_html_(self) -> str:
        with_loss = any(layer.rise is not None for layer in self.layers)
        columns = ["layer", "states", *(f"τ = {level:g}" for level in _LEVELS)]
        columns += [f"{level:g} nats" for level in _LEVELS] if with_loss else []
        rows = [
            [layer.name, layer.states, *map(layer.states_for, _LEVELS)]
            + ([] if layer.rise is None else list(map(layer.states_within, _LEVELS)))
            for layer in self.layers
        ]
        title = "States that hold all but a share τ of the Hankel energy"
        return table(
            title + (", or all but some nats of the loss" if with_loss else ""), columns, rows, [self.advice()]
        )

    def __str__(self) -> str:
        with_loss = any(layer.rise is not None for layer in self.layers)
        title = f"{'layer':32} {'states':>6} {'τ=0.1':>6} {'0.01':>6} {'0.001':>6}"
        rows = [f"{title}   {'nats=0.1':>8} {'0.01':>6} {'0.001':>6}" if with_loss else title]
        for layer in self.layers:
            kept = " ".join(f"{layer.states_for(tolerance):6d}" for tolerance in _LEVELS)
            rows.append(f"{layer.name:32} {layer.states:6d} {kept}")
            if layer.rise is not None:
                first, *others = (layer.states_within(nats) for nats in _LEVELS)
                rows[-1] += f"   {first:8d} " + " ".join(f"{states:6d}" for states in others)
        return "\n".join([*rows, self.advice()]).rstrip()


def balance_layers(
    model: nn.Module,
    method: Method = "real",
    moments: Mapping[str, Moments] | None = None,
    covariances: Mapping[str, Covariances] | None = None,
) -> dict[str, Balanced]:
    """Balance every layer that has a state, by layer name.

    Args:
        model: only read.
        method: for linear time-invariant layers, see `balancing`.
        moments: of every selective layer, from `statistics`.
        covariances: moments of states and adjoint states of linear layers. Those without are balanced by white noise.

    Raises:
        UnsupportedModelError: no layer, or a selective one without moments.
        InvalidSystemError: parameters or moments that are not finite.
    """
    balancings: dict[str, Balanced] = {}
    for name, (layer, adapter) in find_layers(model).items():
        if not adapter.needs_data:
            check_plain({name: layer})
        elif moments is None or name not in moments:
            raise UnsupportedModelError(
                f"{name!r} is a selective layer, and what its states carry depends on the data: pass some "
                "batches of the model's inputs by data= (on the command line --data)"
            )
        evidence = (moments if adapter.needs_data else covariances) or {}
        balancings[name] = adapter.balance(layer, evidence.get(name), method)
    return balancings


@of_chosen_layers
def analyze(
    model: nn.Module,
    method: Method = "real",
    data: Any = None,
    loss: Loss | None = None,
    gramians: Gramians | None = None,
    *,
    layers: Which | None = None,
    exclude: Which | None = None,
) -> Spectrum:
    """Hankel singular values of every layer of a model that has a state. The model is only read.

    Args:
        model: any module that contains layers compressm knows.
        method: for linear time-invariant layers, ``"real"`` (of the real system that the layer computes) or
            ``"complex"`` (as in the CompreSSM paper).
        data: a batch of the model's inputs, or an iterable of batches, which selective layers need; see
            `compressm.observing.inputs` for the forms.
        loss: the loss of the model's predictions, as in `compress`. With it the spectrum tells what states are worth to
            the loss, at the cost of one backward pass per batch.
        gramians: as in `compress`: by default ``"loss"`` if a loss is given, and ``"white"`` otherwise, where the
            spectrum of a time-invariant layer knows neither the data nor the loss.
        layers: these layers only: a name, a glob, a list of these, or a function of a layer's name and the layer.
        exclude: not these layers; as ``layers``.

    Returns:
        the spectra by layer, in the model's order; ``print`` shows how many states hold which share of the energy, and
        with a loss how many keep its predicted rise below some nats per prediction.

    Raises:
        UnsupportedModelError: the model has no such layer, or has a selective one and no data were given.
        InvalidSystemError: a layer's parameters are not finite, its Gramians overflow, it is unstable (``|lam| >= 1``),
            or the method is unknown.
        ConfigError: data that the model cannot take.
        InvalidRankRuleError: arguments that contradict each other, or ``layers`` or ``exclude`` that name no layer.
    """
    del layers, exclude  # see `of_chosen_layers`
    refuse_files(data)
    gramians, found = balancing_of(gramians, loss, data, method), find_layers(model)
    plain = {name: layer for name, (layer, _) in found.items()}
    observed = [name for name, (_, adapter) in found.items() if adapter.needs_data or gramians == "loss"]
    check_wrappers(model, plain, observed)
    check_readable(plain)
    if gramians == "white":
        return Spectrum.of(balance_layers(model, method, None if data is None else gather(model, data)))
    assert loss is not None
    batches = raised_on_all(lambda: [batch for _, batch in calls_and_batches(model, data)])
    evidence = evidence_on(model, batches, loss)
    balancings = balance_layers(model, method, gather(model, batches), evidence.covariances)
    cuts = MadeCuts(found, balancings, "hankel", evidence.fishers)
    return Spectrum.of(balancings, damage_curves(found, balancings, cuts, evidence))


def balancing_of(
    gramians: Gramians | None, loss: Loss | None, data: Any, method: Method = "real", selection: Selection = "hankel"
) -> Gramians:
    """What balances the layers, by default ``"loss"`` if a loss is given.

    Raises:
        InvalidRankRuleError: arguments that contradict each other.
    """
    if gramians is None:
        gramians = "white" if loss is None else "loss"
    check_choice("gramians", gramians, Gramians)
    if loss is not None and not callable(loss):
        check_choice("loss", loss, Likelihood)
    if gramians == "white":
        if loss is not None:
            raise InvalidRankRuleError(
                f"gramians='white' does not look at the loss, and loss={loss!r} is given: leave out one of the two"
            )
        return gramians
    if data is None or loss is None:
        missing = "data" if data is None else "loss"
        raise InvalidRankRuleError(
            f"gramians='loss' needs data= and loss=, and {missing} is missing: pass batches, and "
            "loss='classification', 'regression' or a function of output and batch"
        )
    check_cut_by_loss(method, selection)
    return gramians


def check_match(match_steps: int, gramians: Gramians) -> None:
    """Refuse steps without the recorded inputs that they need.

    Raises:
        InvalidRankRuleError: under white noise, or no whole number of at least 0.
    """
    if not isinstance(match_steps, int) or match_steps < 0:
        raise InvalidRankRuleError(f"match_steps must be a whole number of at least 0; got {match_steps!r}")
    if match_steps and gramians == "white":
        raise InvalidRankRuleError(
            f"match_steps={match_steps} needs the inputs of the layers, which are recorded under gramians='loss' only: "
            "pass gramians='loss' (compress: data= and loss=), or match_steps=0"
        )


def check_cut_by_loss(method: Method, selection: Selection) -> None:
    """Refuse choices that have no meaning where layers are balanced by data and loss.

    Raises:
        InvalidRankRuleError: the option, and what to choose instead.
    """
    for name, value, only in (("method", method, "real"), ("selection", selection, "hankel")):
        if value != only:
            raise InvalidRankRuleError(
                f"{name}={value!r} is there for cuts by white noise: use {name}={only!r} with gramians='loss', or "
                "gramians='white'"
            )


def snapshot_state(balancing: Balanced) -> Any:
    """The tensors from which a layer was balanced, as a dict or list; see `Balanced.state`."""
    return balancing.state()


def snapshot(state: Any, method: Method) -> Balanced:
    """The inverse of `snapshot_state`."""
    if isinstance(state, Mapping) and "evidence" in state:
        return balance_covariances(DiagonalSystem(*state["system"]), Covariances(**state["evidence"]))
    if isinstance(state, Mapping):
        return balance_selective(Moments(**state))
    return balance(DiagonalSystem(*state), method)


def spectrum_changes(before: Mapping[str, Balanced], after: Mapping[str, Balanced]) -> dict[str, SpectrumChange]:
    """`compare` for every layer present in both snapshots with the same order."""
    return {
        name: compare(before[name], now)
        for name, now in after.items()
        if name in before and before[name].hsv.shape == now.hsv.shape
    }
