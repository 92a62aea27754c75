"""Checkpoints on disk: one cut and a table of what was lost (`compress`), or what cuts would do (`analyze`)."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import find_layers
from compressm.cutting import Report, plan_reduction
from compressm.cutting.compression import check_rule, plan_on
from compressm.cutting.made_cuts import MadeCuts
from compressm.cutting.nats import damage_curves
from compressm.cutting.spectrum import Spectrum, balance_layers, balancing_of
from compressm.errors import CheckpointError, ConfigError
from compressm.lab.one_shot_inputs import BATCH, read_batches, read_checkpoint
from compressm.layers import LanguageModel
from compressm.observing.labels import Likelihood
from compressm.observing.loss_evidence import Gramians, evidence_on
from compressm.observing.moments import gather
from compressm.runtime.files import read_pair
from compressm.saving.card import model_card
from compressm.saving.checkpoint import save_with_history
from compressm.saving.source_folder import Carried, carry, contents, copy_files, new_folder, unloaded
from compressm.theory.balanced import Balanced
from compressm.theory.ranks import RankRule

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Loss:
    """How a model changed by a cut: its states, its loss, its parameters.

    Attributes:
        report: the cut itself, layer by layer.
        loss_before, loss_after: cross-entropy in nats per token (per sequence for a classifier), on data that the cut
            was not made from.
        parameters_before, parameters_after: number of the model's parameters.
        sequences: how many sequences the cut was made from, and as many the loss was measured on.
        length: tokens per sequence.
        carried: what the smaller checkpoint got from its source as it was, and what it did not get.
    """

    report: Report
    loss_before: float | None
    loss_after: float | None
    parameters_before: int
    parameters_after: int
    sequences: int
    length: int
    carried: Carried = field(default_factory=Carried)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self.__dict__, "report": self.report.to_dict(), "carried": asdict(self.carried)}

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.report.layers)
        rows = [f"{'layer':{width}}  {'states':>10}  {'energy discarded':>16}  {'error on data':>13}"]
        for layer in self.report.layers:
            discarded = 0.0 if layer.energy_kept is None else 1 - layer.energy_kept
            dims = f"{layer.states_before} → {layer.states_after}"
            note = f"  {layer.outcome}: {layer.reason}" if layer.reason else ""
            measured = layer.error_on_data if layer.error_held_out is None else layer.error_held_out
            error = "" if measured is None else f"{measured:.2%}"
            rows.append(f"{layer.name:{width}}  {dims:>10}  {discarded:16.2%}  {error:>13}{note}")
        parameters = f"parameters {self.parameters_before:,} → {self.parameters_after:,}"
        if self.loss_before is None or self.loss_after is None:
            rows.append(f"{parameters}; the loss was not measured: give --data with labels for that")
        else:
            measured = f"({self.sequences} sequences of {self.length})"
            rows.append(f"loss {self.loss_before:.4f} → {self.loss_after:.4f} {measured}, {parameters}")
        rows += self.report.rises()
        return "\n".join([*rows, str(self.carried)]).rstrip()


def compress_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    data: str | os.PathLike[str] | None = None,
    *,
    build: str | None = None,
    states: int | None = None,
    tolerance: float | None = None,
    fraction: float | None = None,
    total_states: int | None = None,
    max_loss: float | None = None,
    gramians: Gramians | None = None,
    sequences: int = 32,
    length: int = 512,
) -> Loss:
    """Cut a checkpoint once, and save the smaller model in the format that it came in.

    Everything else in the checkpoint's folder is copied too: files, and tensors that transformers does not load.
    `Loss.carried` names what was not copied, such as weights in other formats.

    Args:
        checkpoint: a folder written by Hugging Face's ``save_pretrained`` (a causal language model), or by `save`.
        output: folder to write, new or empty; None writes nothing and only says what would be lost.
        data: None if all layers are linear; the loss is then not measured. ``package.module:function``, see
            `compressm.lab.data.own`, or a file or folder, see `compressm.lab.data.files`. For language models a text
            file, read with the checkpoint's tokenizer, or as bytes where there is none and the vocabulary is 256; or
            a file of tokens. For a `SequenceClassifier` ``x`` of shape ``(N, length, channels)``, or ``(N, length)``
            for tokens, and ``y`` of shape ``(N,)``; with ``lengths``, shape ``(N,)``, where rows are padded.
        build: ``package.module:function`` that returns the model, if it is of a class of your own. The checkpoint may
            then be a ``.safetensors`` file of its state dict.
        states, tolerance, fraction, total_states, max_loss: how far, exactly one of them; see `RankRule`.
        gramians: as in `compress`, with the model's own predictions as labels; by default ``"loss"`` under ``max_loss``
            and ``"white"`` otherwise. The rise of the loss is measured on the sequences that were not cut by.
        sequences: the cut is made from the first so many sequences of the data, and the loss is measured on the next.
        length: tokens per sequence.

    Raises:
        CheckpointError: a checkpoint that cannot be read, or holds what cannot reach the output; or an output folder
            that is not empty.
        ConfigError: data that cannot be used.
        InvalidRankRuleError, UnsupportedModelError: as `compress`.
    """
    rule = RankRule(
        states=states, tolerance=tolerance, fraction=fraction, total_states=total_states, max_loss=max_loss,
        min_reduction=0.0,
    )  # fmt: skip
    loss: Likelihood | None = "classification" if gramians == "loss" or max_loss is not None else None
    _check_data(loss, data)
    check_rule(rule, balancing_of(gramians, loss, data))
    folder, target = Path(checkpoint), None if output is None else Path(output)
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"output {target} exists and is not an empty folder: choose another")
    model, tokenizer, unexpected = read_checkpoint(folder, build)
    extra = None if unexpected is None else unloaded(model, folder, unexpected)
    batches = [] if data is None else read_batches(model, tokenizer, Path(data), 2 * sequences, length, halves=2)
    half = len(batches) // 2
    before, contained = _parameters(model), contents(model)
    seen = [inputs for inputs, _ in batches[:half]] or None
    with _fast(model):
        loss_before = _loss(model, batches[half:])
        report = plan_on(model, rule, seen, [inputs for inputs, _ in batches[half:]], loss).apply(model)
        loss_after = _loss(model, batches[half:])
    carried = Carried()
    if target is not None:
        with new_folder(target) as new:
            if extra is None:
                carried = _resave(model, folder, new)
            else:
                cast("Any", model).save_pretrained(new)
                carried = carry(folder, new, model, extra, contained)
    rows = 0 if not batches else next(iter(batches[0][0].values())).shape[1]
    return Loss(report, loss_before, loss_after, before, _parameters(model), half * BATCH, rows, carried)


def _check_data(loss: Likelihood | None, data: object) -> None:
    if loss is not None and data is None:
        raise ConfigError("--max-loss and --gramians loss look at the loss on data: give some by --data")


def _resave(model: nn.Module, source: Path, target: Path) -> Carried:
    """Save as `save` does, with the history and the other files of the source."""
    names = ("model.safetensors", "compressm.json")
    if not (source / names[1]).is_file():  # the weights of a model of the user's
        save_with_history(model, target, [])
        return Carried()
    history = read_pair(source, *names)[0].get("history")
    save_with_history(model, target, history if isinstance(history, list) else [])
    card = source / "README.md"
    ours = card.is_file() and "\nlibrary_name: compressm\n" in card.read_text(encoding="utf-8", errors="replace")
    if ours:  # our own card, which says the sizes from before the cut
        (target / card.name).write_text(model_card(model), encoding="utf-8")
    files, left = copy_files(source, target, [source / name for name in (*names, *([card.name] * ours))])
    return Carried((), files, left)


@dataclass(frozen=True)
class Prospect:
    """What a cut of a model would do, without making it.

    Attributes:
        tolerance: share of the Hankel energy that it would discard in every layer.
        states: state dimension of every layer afterwards.
        refused: why, for the layers that may not be cut.
        parameters: number of the model's parameters afterwards.
    """

    tolerance: float
    states: dict[str, int]
    refused: dict[str, str]
    parameters: int


@dataclass(frozen=True)
class Analysis:
    """How many of its states a checkpoint needs.

    Attributes:
        spectrum: Hankel singular values of every layer.
        parameters: number of the model's parameters.
        prospects: what cuts would do, one for every tolerance that was tried.
    """

    spectrum: Spectrum
    parameters: int
    prospects: tuple[Prospect, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        cuts = [asdict(prospect) for prospect in self.prospects]
        return {"layers": self.spectrum.to_dict(), "parameters": self.parameters, "cuts": cuts}

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
        made.add_row("parameters", f"{self.parameters:,}", *(f"{one.parameters:,}" for one in self.prospects))
        return made

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

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: as `compress_checkpoint`.
    """
    model, tokenizer, _ = read_checkpoint(Path(checkpoint), build)
    loss: Likelihood | None = "classification" if gramians == "loss" else None
    _check_data(loss, data)
    balancing_of(gramians, loss, data)
    moments, evidence = None, None
    if data is not None:
        read = read_batches(model, tokenizer, Path(data), sequences, length, labelled=False)
        batches = [inputs for inputs, _ in read]
        with _fast(model):
            moments = gather(model, batches)
            evidence = None if loss is None else evidence_on(model, batches, loss)
    balancings = balance_layers(model, moments=moments, covariances=None if evidence is None else evidence.covariances)
    layers = find_layers(model)
    cuts = MadeCuts(layers, balancings, "hankel", None if evidence is None else evidence.fishers)
    prospects = tuple(_prospect(model, balancings, cuts, tolerance) for tolerance in tolerances)
    rises = None if evidence is None else damage_curves(layers, balancings, cuts, evidence)
    return Analysis(Spectrum.of(balancings, rises), _parameters(model), prospects)


def _prospect(model: nn.Module, balancings: Mapping[str, Balanced], cuts: MadeCuts, tolerance: float) -> Prospect:
    rule = RankRule(tolerance=tolerance, min_reduction=0.0)
    plan = plan_reduction(model, rule, balancings=balancings, cuts=cuts)
    smaller = copy.deepcopy(model)
    plan.apply(smaller)
    refused = {layer.name: layer.reason for layer in plan.report.layers if layer.outcome == "refused"}
    return Prospect(tolerance, plan.report.state_dims, refused, _parameters(smaller))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _loss(model: nn.Module, batches: list[tuple[dict[str, Tensor], Tensor]]) -> float | None:
    """Cross-entropy of classes and tokens, the mean squared error of numbers; None without data or labels."""
    losses: list[float] = []
    for inputs, targets in batches:
        if not targets.numel():
            return None
        out = model(**inputs)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        if targets.is_floating_point():
            losses.append(float(F.mse_loss(logits.float().reshape(targets.shape), targets.float())))
            continue
        if logits.ndim == 3:
            targets = _without_padding(model, inputs, targets)
            logits, targets = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
        losses.append(float(F.cross_entropy(logits.float(), targets)))
    return sum(losses) / len(losses) if losses else None


def _without_padding(model: nn.Module, inputs: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The tokens, with padding replaced by the label that cross entropy ignores."""
    present = model.present(**inputs) if isinstance(model, LanguageModel) else inputs.get("attention_mask")
    return tokens if present is None else tokens.masked_fill(present == 0, -100)


def _fast(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    from compressm.integrations.hf_scan import can_be_fast, fast_scan

    return fast_scan(model) if can_be_fast(model) else contextlib.nullcontext()


__all__ = ["Loss", "compress_checkpoint"]
