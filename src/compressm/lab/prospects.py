"""What cuts of a checkpoint on disk would do, without making them; behind ``compressm analyze``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from compressm.adapters import find_layers
from compressm.cutting import plan_reduction
from compressm.cutting.compression import check_model_sizes
from compressm.cutting.made_cuts import MadeCuts
from compressm.cutting.nats import damage_curves
from compressm.cutting.serving import Memory, attention_of, human
from compressm.cutting.spectrum import Spectrum, balance_layers, balancing_of
from compressm.lab.one_shot import check_data, parameters_in
from compressm.lab.one_shot_inputs import read_batches, read_checkpoint
from compressm.lab.quality import likelihood_of
from compressm.lab.state_bits import StateBits, asked
from compressm.observing.expected import Expected
from compressm.observing.loss_evidence import Gramians, evidence_on
from compressm.observing.over_data import gather
from compressm.theory.balanced import Balanced
from compressm.theory.rank_rule import RankRule
from compressm.theory.targets import Target

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Prospect:
    """What a cut of a model would do, without making it.

    Attributes:
        tolerance: share of the Hankel energy that it would discard in every layer.
        states: state dimension of every layer afterwards.
        refused: why, for the layers that may not be cut.
        parameters: number of the model's parameters afterwards.
        state_bytes: what one sequence would keep in the recurrent layers.
        targets: the kernels and servers that would take all layers.
    """

    tolerance: float
    states: dict[str, int]
    refused: dict[str, str]
    parameters: int
    state_bytes: int
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Analysis:
    """How many of its states a checkpoint needs.

    Attributes:
        spectrum: Hankel singular values of every layer.
        parameters: number of the model's parameters.
        prospects: what cuts would do, one for every tolerance that was tried.
        memory: the bytes of the model as it is.
        bits: what states in few bits cost; None without ``state_bits``.
    """

    spectrum: Spectrum
    parameters: int
    prospects: tuple[Prospect, ...]
    memory: Memory
    bits: StateBits | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        cuts = [asdict(prospect) for prospect in self.prospects]
        advice = {} if not (text := self.spectrum.advice()) else {"advice": text}
        memory = self.memory.to_dict()
        parts = {"layers": self.spectrum.to_dict(), "parameters": self.parameters, "memory": memory, "cuts": cuts}
        return {**parts, **advice, **({} if self.bits is None else {"bits": self.bits.to_dict()})}

    def table(self) -> Table:
        """For the terminal: how many states each layer needs, and the model in all."""
        from rich.table import Table

        title = "States that hold all but a share τ of the Hankel energy"
        nats = (0.1, 0.01, 0.001) if all(layer.rise is not None for layer in self.spectrum) else ()
        title += "\nor keep the rise of the loss below some nats per prediction" if nats else ""
        made = Table(title=title, title_justify="left")
        columns = [*(f"τ = {one.tolerance:g}" for one in self.prospects), *(f"{x:g} nats" for x in nats)]
        for column in ("layer", "states", *columns):
            made.add_column(column, justify="left" if column == "layer" else "right")
        for layer in self.spectrum:
            cells = ["refused" if layer.name in one.refused else str(one.states[layer.name]) for one in self.prospects]
            made.add_row(layer.name, str(layer.states), *cells, *(str(layer.states_within(x)) for x in nats))
        made.add_section()
        total = sum(layer.states for layer in self.spectrum)
        made.add_row("all", str(total), *(str(sum(one.states.values())) for one in self.prospects))
        sizes = (human(one.state_bytes) for one in self.prospects)
        made.add_row("bytes per sequence", human(self.memory.checkpoint), *sizes)
        made.add_row("parameters", f"{self.parameters:,}", *(f"{one.parameters:,}" for one in self.prospects))
        return made

    @property
    def takers(self) -> list[str]:
        """A line for every cut that was tried: the kernels and servers that would take its sizes. None for a model that
        no server knows at any size."""
        if self.memory.attention is None and not any(one.targets for one in self.prospects):
            return []
        return [
            f"τ = {one.tolerance:g}: taken by {', '.join(one.targets) or 'no known target'}" for one in self.prospects
        ]

    @property
    def refusals(self) -> list[str]:
        """A line for every layer that would refuse a cut, and why."""
        return [
            f"{name} refuses τ = {one.tolerance:g}: {reason}"
            for one in self.prospects
            for name, reason in one.refused.items()
        ]


def analyze_checkpoint(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    sequences: int = 32,
    length: int = 512,
    tolerances: Sequence[float] = (0.1, 0.01, 0.001),
    gramians: Gramians | None = None,
    build: str | None = None,
    target: Target | None = None,
    state_bits: int | None = None,
) -> Analysis:
    """How many states every layer of a checkpoint really uses, and what cuts would save; see `compressm.analyze`.

    Args:
        checkpoint, data: as `compress_checkpoint`; data are needed for selective layers only, and labels never.
        sequences: how many sequences of the data are looked at.
        length: tokens per sequence.
        tolerances: of the cuts that are tried.
        gramians: ``"loss"`` also tells what states are worth to the loss, by one backward pass per batch, with the
            model's own predictions as labels; see `compressm.analyze`.
        build: as `compress_checkpoint`.
        target: try sizes only that these kernels or this server take.
        state_bits: as `compress_checkpoint`.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: as `compress_checkpoint`.
    """
    read = read_checkpoint(Path(checkpoint), build)
    model = read.model
    rules = [RankRule(tolerance=one, min_reduction=0.0, target=target) for one in tolerances]
    check_model_sizes(model, rules[0])
    by_loss = gramians == "loss"
    check_data(by_loss, data)
    bits = asked(state_bits, data)
    balancing_of(gramians, "classification" if by_loss else None, data)
    batches, loss = list[Any](), None
    if data is not None:
        # Of a model of the user's the labels alone tell whether it predicts numbers.
        labelled = by_loss and Expected.of(model).kind == "anything"
        pairs = read_batches(model, read.tokenizer, Path(data), sequences, length, labelled=labelled)
        batches, loss = [inputs for inputs, _ in pairs], likelihood_of(model, pairs) if by_loss else None
    with read.at_work("reading the data", len(batches) * (1 if loss is None else 2)):
        moments = gather(model, batches) if batches else None
        evidence = evidence_on(model, batches, loss) if batches and loss is not None else None
        covariances = None if evidence is None else evidence.covariances
        balancings = balance_layers(model, moments=moments, covariances=covariances)
        layers = find_layers(model)
        cuts = MadeCuts(layers, balancings, "hankel", None if evidence is None else evidence.fishers)
        memory = Memory.of(model, attention_of(model))
        bits = None if bits is None else bits.plus("uncut", model, batches[0])
        prospects = tuple(_prospect(model, balancings, cuts, rule, memory) for rule in rules)
        rises = None if evidence is None else damage_curves(layers, balancings, cuts, evidence)
    if read.mapped is not None:
        read.mapped.pager.close()
    return Analysis(Spectrum.of(balancings, rises), parameters_in(model), prospects, memory, bits)


def _prospect(
    model: nn.Module, balancings: Mapping[str, Balanced], cuts: MadeCuts, rule: RankRule, memory: Memory
) -> Prospect:
    plan = plan_reduction(model, rule, balancings=balancings, cuts=cuts)
    refused = {layer.name: layer.reason for layer in plan.report.layers if layer.outcome == "refused"}
    dims, parameters = plan.report.state_dims, parameters_in(model)
    for name, change in plan.changes.items():
        layer = model.get_submodule(name)
        parameters += sum(new.numel() - layer.get_parameter(one).numel() for one, new in change.values().items())
    smaller = memory.resized(dims)
    return Prospect(rule.tolerance or 0.0, dims, refused, parameters, smaller.checkpoint, smaller.takers())


__all__ = ["Analysis", "Prospect", "analyze_checkpoint"]
