"""Checkpoints on disk: one cut and a table of what was lost (`compress`), or what cuts would do (`analyze`)."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import find_layers
from compressm.cutting import Report, plan_reduction
from compressm.cutting.made_cuts import MadeCuts
from compressm.cutting.spectrum import AnyBalancing, Spectrum, balance_layers
from compressm.errors import CheckpointError, ConfigError, MissingExtraError
from compressm.lab.data.arrays import Arrays, are_arrays, read_arrays
from compressm.layers import LanguageModel, SequenceClassifier
from compressm.observing.expected import Expected
from compressm.observing.held_out import gather_halves, joined
from compressm.observing.moments import gather
from compressm.runtime.files import read_pair
from compressm.saving.card import model_card
from compressm.saving.checkpoint import load, save_with_history
from compressm.saving.source_folder import Carried, carry, contents, copy_files, new_folder, some, unloaded
from compressm.theory.ranks import RankRule

if TYPE_CHECKING:
    from rich.table import Table

_BATCH = 4  # sequences
_TOKENIZERS = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*")  # files of one


@dataclass(frozen=True)
class Loss:
    """What a cut took from a model.

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
    loss_before: float
    loss_after: float
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
        rows.append(
            f"loss {self.loss_before:.4f} → {self.loss_after:.4f} ({self.sequences} sequences of {self.length}), "
            f"parameters {self.parameters_before:,} → {self.parameters_after:,}"
        )
        return "\n".join([*rows, str(self.carried)]).rstrip()


def compress_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    states: int | None = None,
    tolerance: float | None = None,
    fraction: float | None = None,
    sequences: int = 32,
    length: int = 512,
) -> Loss:
    """Cut a checkpoint once, and save the smaller model in the format that it came in.

    All that the checkpoint's folder holds beside the model reaches the output: files, and tensors that transformers
    does not load. What does not, such as weights in other formats, is named in `Loss.carried`.

    Args:
        checkpoint: a folder written by Hugging Face's ``save_pretrained`` (a causal language model), or by `save`.
        output: folder to write, new or empty.
        data: for language models a text file, read with the checkpoint's tokenizer, or as bytes where there is none and
            the vocabulary is 256; or an ``.npz`` or ``.npy`` file of tokens. For a `SequenceClassifier` an ``.npz``
            file with ``x`` of shape ``(N, length, channels)``, or ``(N, length)`` for tokens, and ``y`` of shape
            ``(N,)``; with ``lengths``, shape ``(N,)``, where rows are padded. See `compressm.lab.data.arrays`.
        states, tolerance, fraction: how far, exactly one of them; see `RankRule`.
        sequences: the cut is made from the first so many sequences of the data, and the loss is measured on the next.
        length: tokens per sequence.

    Raises:
        CheckpointError: a checkpoint that cannot be read, or holds what cannot reach the output; or an output folder
            that is not empty.
        ConfigError: data that cannot be used.
        InvalidRankRuleError, UnsupportedModelError: as `compress`.
    """
    rule = RankRule(states=states, tolerance=tolerance, fraction=fraction, min_reduction=0.0)
    folder, target = Path(checkpoint), Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"output {target} exists and is not an empty folder: choose another")
    model, tokenizer, unexpected = _read(folder)
    extra = None if unexpected is None else unloaded(model, folder, unexpected)
    batches = _batches(model, tokenizer, Path(data), 2 * sequences, length, halves=2)
    half = len(batches) // 2
    before, contained = _parameters(model), contents(model)
    seen = [inputs for inputs, _ in batches[:half]]
    with _fast(model):
        halves = gather_halves(model, seen)
        balancings = balance_layers(model, moments=joined(halves))
        loss_before = _loss(model, batches[half:])
        report = plan_reduction(model, rule, balancings=balancings).measured(model, seen, halves).apply(model)
        loss_after = _loss(model, batches[half:])
    with new_folder(target) as new:
        if extra is None:
            carried = _resave(model, folder, new)
        else:
            cast("Any", model).save_pretrained(new)
            carried = carry(folder, new, model, extra, contained)
    rows = next(iter(batches[0][0].values()))
    counts = (before, _parameters(model), half * _BATCH, rows.shape[1])
    return Loss(report, loss_before, loss_after, *counts, carried)


def _resave(model: nn.Module, source: Path, target: Path) -> Carried:
    """As `save`, with the history that the source has, and its other files."""
    names = ("model.safetensors", "compressm.json")
    history = read_pair(source, *names)[0].get("history")
    save_with_history(model, target, history if isinstance(history, list) else [])
    card = source / "README.md"
    ours = card.is_file() and "\nlibrary_name: compressm\n" in card.read_text(encoding="utf-8", errors="replace")
    if ours:  # it tells sizes from before the cut
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
    """What a checkpoint's states are good for.

    Attributes:
        spectrum: Hankel singular values of every layer.
        parameters: number of the model's parameters.
        prospects: what cuts would do, for growing care.
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

        made = Table(title="States that hold all but a share τ of the Hankel energy", title_justify="left")
        for column in ("layer", "states", *(f"τ = {one.tolerance:g}" for one in self.prospects)):
            made.add_column(column, justify="left" if column == "layer" else "right")
        for layer in self.spectrum:
            cells = ["refused" if layer.name in one.refused else str(one.states[layer.name]) for one in self.prospects]
            made.add_row(layer.name, str(layer.states), *cells)
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
) -> Analysis:
    """How many states every layer of a checkpoint really uses, and what cuts would save; see `compressm.analyze`.

    Args:
        checkpoint, data: as `compress_checkpoint`; data are needed for selective layers only, and labels never.
        sequences: how many sequences of the data are looked at.
        length: tokens per sequence.
        tolerances: of the cuts that are tried.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: as `compress_checkpoint`.
    """
    model, tokenizer, _ = _read(Path(checkpoint))
    moments = None
    if data is not None:
        batches = _batches(model, tokenizer, Path(data), sequences, length, labelled=False)
        with _fast(model):
            moments = gather(model, [inputs for inputs, _ in batches])
    balancings = balance_layers(model, moments=moments)
    cuts = MadeCuts(find_layers(model), balancings, "hankel")
    prospects = tuple(_prospect(model, balancings, cuts, tolerance) for tolerance in tolerances)
    return Analysis(Spectrum.of(balancings), _parameters(model), prospects)


def _prospect(model: nn.Module, balancings: Mapping[str, AnyBalancing], cuts: MadeCuts, tolerance: float) -> Prospect:
    rule = RankRule(tolerance=tolerance, min_reduction=0.0)
    plan = plan_reduction(model, rule, balancings=balancings, cuts=cuts)
    smaller = copy.deepcopy(model)
    plan.apply(smaller)
    refused = {layer.name: layer.reason for layer in plan.report.layers if layer.outcome == "refused"}
    return Prospect(tolerance, plan.report.state_dims, refused, _parameters(smaller))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _read(folder: Path) -> tuple[nn.Module, Any, list[str] | None]:
    """Model in evaluation mode, tokenizer or None, and what transformers found no place for; None for our own."""
    own = (folder / "compressm.json").is_file()
    if not own and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: expected a folder with config.json (Hugging Face) or compressm.json"
        )
    model, tokenizer, unexpected = (load(folder), None, None) if own else _hugging_face(folder)
    return model.eval(), tokenizer, unexpected


def _hugging_face(folder: Path) -> tuple[nn.Module, Any, list[str]]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            'a Hugging Face checkpoint needs transformers: pip install "compressm[transformers]"'
        ) from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as a causal language model: {_first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {some(missing)}, which transformers would draw at random: copy the folder again, or save "
            "the model that you trained"
        )
    unexpected = list(info["unexpected_keys"])
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        return model, None, unexpected
    try:
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True), unexpected
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _batches(
    model: nn.Module,
    tokenizer: Any,
    path: Path,
    sequences: int,
    length: int,
    halves: int = 1,
    labelled: bool = True,
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Inputs, by the names of the model's arguments, and what they should lead to: as many batches in each of the
    halves."""
    if sequences < halves * _BATCH or length < 2:
        raise ConfigError(
            f"sequences must be at least {_BATCH} and length at least 2; got {sequences // halves} and {length}"
        )
    expected = Expected.of(model)
    if isinstance(model, SequenceClassifier):
        arrays = read_arrays(path, expected, labelled)
    elif are_arrays(path):
        arrays = _rows(read_arrays(path, expected, labelled=False), length)
    else:
        arrays = Arrays(_windows(model, tokenizer, path, length)[0])
    count = halves * (min(sequences, len(arrays)) // (halves * _BATCH))
    if count == 0:
        why = ": half for the cut, half to measure the loss on" if halves == 2 else ""
        raise ConfigError(
            f"{path} holds {len(arrays)} sequences of {arrays.x.shape[1]}; {halves * _BATCH} are needed{why}; give "
            "more data, or a smaller length"
        )
    targets = arrays.x if arrays.y is None else arrays.y
    places = [(i * _BATCH, (i + 1) * _BATCH) for i in range(count)]
    return [(arrays.batch(expected, start, stop), targets[start:stop]) for start, stop in places]


def _rows(arrays: Arrays, length: int) -> Arrays:
    """Sequences of tokens of at most this length: what goes beyond it is left out."""
    lengths = None if arrays.lengths is None else arrays.lengths.clamp_max(length)
    return Arrays(arrays.x[:, :length], None, lengths)


def _windows(model: nn.Module, tokenizer: Any, path: Path, length: int) -> tuple[Tensor, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"data {path} cannot be read: {error.strerror}") from error
    vocabulary = cast("Any", model).config["vocabulary"] if isinstance(model, LanguageModel) else _vocabulary(model)
    if tokenizer is not None:
        tokens = torch.tensor(tokenizer(content.decode("utf-8", "replace"))["input_ids"], dtype=torch.long)
    elif vocabulary == 256:  # the only size at which every byte has an id and no id is anything else
        tokens = torch.from_numpy(np.frombuffer(content, np.uint8).astype(np.int64))
    else:
        raise ConfigError(
            f"the checkpoint has no tokenizer and a vocabulary of {vocabulary}, and only one of 256 is that of bytes: "
            "save the tokenizer in the checkpoint's folder, or call compressm.compress from Python, with ids as data"
        )
    if len(tokens) and (largest := int(tokens.max())) >= vocabulary:
        raise ConfigError(
            f"the tokenizer gives ids up to {largest}, and the model's vocabulary has {vocabulary}: save the model's "
            "own tokenizer in the checkpoint's folder"
        )
    count = len(tokens) // length
    windows = tokens[: count * length].view(count, length)
    return windows, windows


def _vocabulary(model: nn.Module) -> int:
    return int(cast("Any", model).get_input_embeddings().num_embeddings)


@torch.no_grad()
def _loss(model: nn.Module, batches: list[tuple[dict[str, Tensor], Tensor]]) -> float:
    losses: list[float] = []
    for inputs, targets in batches:
        out = model(**inputs)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        if logits.ndim == 3:
            targets = _without_padding(model, inputs, targets)
            logits, targets = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
        losses.append(float(F.cross_entropy(logits.float(), targets)))
    return sum(losses) / len(losses)


def _without_padding(model: nn.Module, inputs: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The tokens, with what cross entropy leaves out in the place of padding."""
    present = model.present(**inputs) if isinstance(model, LanguageModel) else inputs.get("attention_mask")
    return tokens if present is None else tokens.masked_fill(present == 0, -100)


def _fast(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    from compressm.integrations.hf_scan import can_be_fast, fast_scan

    return fast_scan(model) if can_be_fast(model) else contextlib.nullcontext()


__all__ = ["Loss", "compress_checkpoint"]
