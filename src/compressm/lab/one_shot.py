"""A checkpoint on disk that is cut once, and a table of what was lost; behind ``compressm compress``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from compressm.cutting import Report
from compressm.cutting.compression import check_model_sizes, check_rule, plan_on
from compressm.cutting.serving import Memory, Serving, attention_of, decoding_speed
from compressm.cutting.spectrum import balancing_of
from compressm.cutting.within_drop import plan_within_drop
from compressm.errors import ConfigError, InvalidRankRuleError
from compressm.lab.one_shot_inputs import BATCH, Checkpoint, read_batches, read_checkpoint
from compressm.lab.one_shot_outputs import check_output, saved, with_card
from compressm.lab.quality import Examination, Quality, likelihood_of
from compressm.lab.recovering import Recover, forget
from compressm.lab.state_bits import StateBits, asked
from compressm.observing.labels import Likelihood
from compressm.observing.loss_evidence import Gramians
from compressm.observing.scores import Metric, better
from compressm.saving.card import Measured
from compressm.saving.source_folder import Carried, contents, new_folder, unloaded
from compressm.theory.rank_rule import RankRule, largest_reduction
from compressm.theory.targets import Target
from compressm.training.options import OPTIONS
from compressm.training.recovery import Recovery


@dataclass(frozen=True)
class Loss:
    """How a model changed by a cut: its states, its loss, its parameters.

    Attributes:
        report: the cut itself, layer by layer.
        loss_before, loss_after: cross-entropy in nats per token (per sequence for a classifier), or the mean squared
            error of numbers, on data that the cut was not made from. None without data or labels.
        metric: accuracy, R² or another metric, measured on the same data; None as the loss.
        score_before, score_after: its values.
        parameters_before, parameters_after: number of the model's parameters.
        sequences: how many sequences the cut was made from, and as many the loss was measured on.
        length: tokens per sequence.
        carried: what the smaller checkpoint got from its source as it was, and what it did not get.
        serving: what serving the model costs before and after.
        recovery: what training after the cut did; None without it.
        bits: what states in few bits cost, before and after; None without ``state_bits``.
    """

    report: Report
    loss_before: float | None
    loss_after: float | None
    parameters_before: int
    parameters_after: int
    sequences: int
    length: int
    carried: Carried = field(default_factory=Carried)
    serving: Serving | None = None
    recovery: Recovery | None = None
    bits: StateBits | None = None
    metric: Metric | None = None
    score_before: float | None = None
    score_after: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        serving = None if self.serving is None else self.serving.to_dict()
        recovery = None if self.recovery is None else self.recovery.to_dict()
        parts = {"report": self.report.to_dict(), "carried": asdict(self.carried), "serving": serving}
        parts |= {"recovery": recovery, "bits": None if self.bits is None else self.bits.to_dict()}
        return {**self.__dict__, **parts}

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.report.layers)
        rows = [] if self.serving is None else self.serving.lines()
        rows += [] if self.bits is None else self.bits.lines()
        rows += [f"{'layer':{width}}  {'states':>10}  {'energy discarded':>16}  {'error on data':>13}"]
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
            metric = f"{self.metric} {self.score_before:.4f} → {self.score_after:.4f}"
            rows.append(f"loss {self.loss_before:.4f} → {self.loss_after:.4f}, {metric} {measured}, {parameters}")
        rows += self.report.rises() + ([self.report.hint] if self.report.hint else [])
        rows += [] if self.recovery is None else [str(self.recovery)]
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
    max_error: float | None = None,
    total_states: int | None = None,
    max_loss: float | None = None,
    max_drop: float | None = None,
    metric: Metric | None = None,
    max_reduction: float | None = None,
    multiple_of: int = 1,
    target: Target | None = None,
    gramians: Gramians | None = None,
    sequences: int = 32,
    length: int = 512,
    memory: int | None = None,
    speed: bool = False,
    recovery: Recover | None = None,
    state_bits: int | None = None,
    command: str | None = None,
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
        states, tolerance, fraction, max_error, total_states, max_loss: how far, exactly one of them; see `RankRule`.
        max_drop: instead of them: how much of the metric the cut may cost, in the metric's units. The largest tolerance
            that keeps it is searched for on the sequences that the cut is not made from.
        metric: see `compressm.observing.scores`; None for the usual one of the data.
        max_reduction: remove at most this share of a layer's states; by default as in `compress`: half under rules of
            quality, and no limit under rules of size.
        multiple_of, target: sizes that are preferred, and those that are allowed; see `RankRule`.
        gramians: as in `compress`, with the model's own predictions as labels; by default ``"loss"`` under ``max_loss``
            and ``"white"`` otherwise. The rise of the loss is measured on the sequences that were not cut by.
        sequences: the cut is made from the first so many sequences of the data, and the loss is measured on the next.
        length: tokens per sequence.
        memory: of the device that will serve the model, in bytes; the report says how many sequences it holds.
        speed: whether to measure tokens per second on this machine, before and after.
        recovery: train the cut model on the data that follow those of the cut and of the loss, and on those of the cut,
            with the uncut one as teacher.
        state_bits: 8 to simulate states in 8 bits before and after; see `compressm.cutting.rounded_state`.
        command: the exact command line, for the card.

    Raises:
        CheckpointError: a checkpoint that cannot be read, or holds what cannot reach the output; or an output folder
            that is not empty.
        ConfigError: data that cannot be used.
        InvalidRankRuleError, UnsupportedModelError: as `compress`.
    """
    sizes: dict[str, Any] = {
        "states": states, "tolerance": tolerance, "fraction": fraction, "max_error": max_error,
        "total_states": total_states, "max_loss": max_loss,
    }  # fmt: skip
    largest = largest_reduction(max_reduction, size=(states, fraction, total_states) != (None, None, None))
    how_far: dict[str, Any] = {**_how_far(sizes, max_drop, data), "min_reduction": 0.0, "max_reduction": largest}
    rule = RankRule(**how_far, multiple_of=multiple_of, target=target)
    by_loss = gramians == "loss" or (gramians is None and max_loss is not None)
    check_data(by_loss, data)
    bits = asked(state_bits, data)
    check_rule(rule, balancing_of(gramians, "classification" if by_loss else None, data))
    folder, place = Path(checkpoint), None if output is None else Path(output)
    check_output(place)
    in_memory = max_drop is not None or recovery is not None
    opened = _opened(folder, build, data, rule, sequences, length, recovery, in_memory=in_memory)
    model, parameters = opened.read.model, parameters_in(opened.read.model)
    examination = Examination(opened.held_out, metric)
    loss = likelihood_of(model, opened.held_out) if by_loss else None
    with opened.read.at_work():
        bill = Bill(model, memory, speed)
        bits = None if bits is None else bits.plus("uncut", model, opened.unseen[0])
    report, before, after = _cut(opened, rule, loss, max_drop, examination)
    done = None
    if recovery is not None:
        done = recovery.run(opened.read, folder, build, opened.text, opened.unseen, place)
    written = after if recovery is None else examination.quality(model)
    with opened.read.at_work():
        serving = bill.after_the_cut()
        bits = None if bits is None else bits.plus("cut", model, opened.unseen[0])
        carried = Carried()
        if place is not None:
            facts = [serving.headline(), *_qualities(before, after), *(str(done).splitlines() if done else ())]
            facts += [] if command is None else [f"made by `{command}`"]
            tell = partial(with_card, report=report, facts=facts, measured=_measured(written, data), name=place.name)
            carried = _written(opened, place, tell)
            forget(place)
    if opened.read.mapped is not None:
        opened.read.mapped.pager.close()
    read_in = (len(opened.seen) * BATCH, opened.tokens)
    sizes_now = (parameters, parameters_in(model), *read_in, carried, serving, done, bits)
    if before is None or after is None:
        return Loss(report, None, None, *sizes_now)
    return Loss(report, before.loss, after.loss, *sizes_now, before.metric, before.score, after.score)


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that is about to be cut, and the data for it.

    Attributes:
        read, folder: the model, and where it came from.
        extra, contained: what the folder holds beside the model, see `carry`.
        seen, unseen: inputs to cut by, and to measure on.
        held_out: the latter with their labels.
        text: inputs to recover on.
        tokens: per sequence.
    """

    read: Checkpoint
    folder: Path
    extra: Mapping[str, Path]
    contained: set[bytes]
    seen: list[Any]
    unseen: list[Any]
    held_out: list[Any]
    text: list[Any]
    tokens: int


def _opened(
    folder: Path,
    build: str | None,
    data: str | os.PathLike[str] | None,
    rule: RankRule,
    sequences: int,
    length: int,
    recovery: Recover | None,
    *,
    in_memory: bool,
) -> _Opened:
    """Read a checkpoint and its data, and refuse what could not be done with them."""
    read = read_checkpoint(folder, build, in_memory=in_memory)
    model = read.model
    check_model_sizes(model, rule)
    extra = unloaded(model, folder, read.unexpected) if read.format == "transformers" else {}
    count = 2 * sequences + (0 if recovery is None else recovery.steps * BATCH)
    batches = [] if data is None else read_batches(model, read.tokenizer, Path(data), count, length, halves=2)
    half = min(len(batches) // 2, sequences // BATCH)
    if recovery is not None:
        recovery.check(model, batches[0][0])
    seen, unseen, rest = (
        [inputs for inputs, _ in part] for part in (batches[:half], batches[half : 2 * half], batches[2 * half :])
    )
    contained = contents(model) if read.mapped is None else set[bytes]()
    tokens = 0 if not batches else next(iter(batches[0][0].values())).shape[1]
    return _Opened(read, folder, extra, contained, seen, unseen, batches[half : 2 * half], [*seen, *rest], tokens)


def _cut(
    opened: _Opened, rule: RankRule, loss: Likelihood | None, max_drop: float | None, examination: Examination
) -> tuple[Report, Quality | None, Quality | None]:
    """Cut the model in place; the report, and the quality before and after."""
    model, passes = opened.read.model, 4 if loss is None else 7
    with opened.read.at_work("reading the data", passes * len(opened.seen)):
        before = examination.quality(model)
        search = None if max_drop is None else _search(model, rule, max_drop, examination)
        report = plan_on(model, rule, opened.seen or None, opened.unseen, loss, planned=search).apply(model)
        return report, before, examination.quality(model)


def _how_far(sizes: Mapping[str, Any], max_drop: float | None, data: object) -> Mapping[str, Any]:
    """The rule that was given; under ``max_drop`` the tolerance at which the search begins.

    Raises:
        InvalidRankRuleError: ``max_drop`` beside a rule, or below 0; neither of them.
        ConfigError: ``max_drop`` without data.
    """
    if max_drop is None and all(size is None for size in sizes.values()):
        raise InvalidRankRuleError(f"give exactly one of {', '.join(sizes)}, max_drop; got none")
    if max_drop is None:
        return sizes
    OPTIONS["max_drop"].check(max_drop)
    if given := [name for name, value in sizes.items() if value is not None]:
        raise InvalidRankRuleError(f"give either max_drop or {given[0]}, not both: each says how far to cut")
    if data is None:
        raise ConfigError("--max-drop measures a metric on data: give some with labels, or text, by --data")
    return {"tolerance": 0.0}


def _search(model: nn.Module, rule: RankRule, max_drop: float, examination: Examination) -> Any:
    """What plans the largest cut that costs at most ``max_drop`` of the metric."""
    if examination.metric is None:
        raise ConfigError("--max-drop measures a metric, and the data hold no labels: add y, shape (N,)")
    return partial(plan_within_drop, model, rule, max_drop, examination.score, better(examination.metric))


def _written(opened: _Opened, target: Path, tell: Callable[[Path, Carried], Carried]) -> Carried:
    """Write the smaller model with its card and all that the source holds beside it, and say what was carried.

    Args:
        tell: tells the card of the cut.
    """
    with new_folder(target) as new:
        return tell(new / "README.md", saved(opened.read, opened.folder, new, opened.extra, opened.contained))


def _qualities(before: Quality | None, after: Quality | None) -> list[str]:
    if before is None or after is None:
        return []
    losses = f"loss on held-out data {before.loss:.4f} → {after.loss:.4f} nats per prediction"
    return [losses, f"{before.metric} on held-out data {before.score:.4f} → {after.score:.4f}"]


def _measured(after: Quality | None, data: object) -> Measured | None:
    if after is None:
        return None
    return Measured(Path(str(data)).name, {"loss": after.loss, after.metric: after.score})


class Bill:
    """The serving report of a model that is about to be cut.

    Args:
        model: as it is before the cut.
        memory: see `Serving`.
        speed: whether to measure the speed of generation.
    """

    def __init__(self, model: nn.Module, memory: int | None, speed: bool) -> None:
        self._model, self._memory = model, memory
        self._attention = attention_of(model)
        self._before = Memory.of(model, self._attention)
        self._speed = decoding_speed(model) if speed else None

    def after_the_cut(self) -> Serving:
        """The report, when the model has been cut."""
        speeds = (self._speed, None if self._speed is None else decoding_speed(self._model))
        known = tuple(one for one in speeds if one is not None)
        return Serving(self._before, Memory.of(self._model, self._attention), self._memory, known)


def check_data(by_loss: bool, data: object) -> None:
    """Refuse to look at a loss without data.

    Raises:
        ConfigError: there are none.
    """
    if by_loss and data is None:
        raise ConfigError("--max-loss and --gramians loss look at the loss on data: give some by --data")


def parameters_in(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


__all__ = ["Bill", "Loss", "check_data", "compress_checkpoint", "parameters_in"]
