"""One checkpoint, many sizes: sorted once, on data, and sliced to any size later; behind ``compressm slice``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compressm.cutting import Report
from compressm.cutting.order_by_loss import SHARES
from compressm.cutting.ordering import ORDER_FILE, StateOrder, sort_states
from compressm.cutting.report import PICK_NAMES
from compressm.cutting.serving import Serving
from compressm.errors import ConfigError
from compressm.lab.one_shot import Bill
from compressm.lab.one_shot_inputs import BATCH, read_batches, read_checkpoint
from compressm.lab.one_shot_outputs import check_output, saved
from compressm.lab.quality import likelihood_of
from compressm.observing.loss_evidence import Gramians
from compressm.saving.card import extend_card
from compressm.saving.source_folder import Carried, contents, new_folder, unloaded
from compressm.theory.targets import Target

_PASSES = 3 + 4 * len(SHARES)  # over the data, to sort by the loss: moments, its gradients, and all slices


@dataclass(frozen=True)
class Sorted:
    """What became of a checkpoint whose states were sorted.

    Attributes:
        order: of the states.
        sequences, length: what they were sorted by.
        carried: what the new checkpoint got from its source as it was, and what it did not get.
    """

    order: StateOrder
    sequences: int
    length: int
    carried: Carried

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        layers = {name: {"states": one.states, "expected": one.expected} for name, one in self.order.layers.items()}
        return {
            "sequences": self.sequences, "length": self.length, "selection": self.order.selection,
            "rises": dict(self.order.rises), "layers": layers, "carried": vars(self.carried),
        }  # fmt: skip

    def __str__(self) -> str:
        width = max(map(len, self.order.layers))
        lines = [f"states in order of worth on {self.sequences} sequences of {self.length}; the function is the same"]
        if self.order.rises:
            lines.append("nats that slices to 1/2, 1/4 and 1/8 cost on these data, in the order of each criterion:")
        for way, rises in self.order.rises.items():
            taken = ", taken" if way == self.order.selection else ""
            lines.append(f"  {PICK_NAMES[way]}: {', '.join(f'{rise:.3g}' for rise in rises)}{taken}")
        lines.append(f"{'layer':{width}}  states  error of the recurrence to expect from slices")
        for name, one in self.order.layers.items():
            sizes = [max(1, one.states // share) for share in SHARES]
            errors = ", ".join(f"{size}: {one.expected[size]:.1%}" for size in dict.fromkeys(sizes))
            lines.append(f"{name:{width}}  {one.states:6}  {errors}")
        return "\n".join([*lines, str(self.carried)]).rstrip()


@dataclass(frozen=True)
class Sliced:
    """What became of a checkpoint that was sliced.

    Attributes:
        report: of the cut, with the errors that were expected when the states were sorted.
        serving: what serving the model costs before and after.
        carried: what the new checkpoint got from its source as it was, and what it did not get.
    """

    report: Report
    serving: Serving
    carried: Carried = field(default_factory=Carried)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "report": self.report.to_dict(), "serving": self.serving.to_dict(), "carried": vars(self.carried),
        }  # fmt: skip

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.report.layers)
        rows = [*self.serving.lines(), f"{'layer':{width}}  {'states':>10}  error of the recurrence to expect"]
        for layer in self.report.layers:
            error = "" if layer.certificate is None else f"{layer.certificate.errors()[0]:.2%}"
            rows.append(f"{layer.name:{width}}  {f'{layer.states_before} → {layer.states_after}':>10}  {error}")
        return "\n".join([*rows, str(self.carried)]).rstrip()


def sort_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    data: str | os.PathLike[str] | None,
    *,
    build: str | None = None,
    gramians: Gramians | None = None,
    sequences: int = 32,
    length: int = 512,
) -> Sorted:
    """Write a checkpoint of the same size and function whose states are in order of worth, with the order beside it.

    Args:
        checkpoint, build: as `compressm.lab.one_shot.compress_checkpoint`.
        output: folder to write, new or empty.
        data: what the worth is measured on.
        gramians: ``"loss"``: several orders are tried, and the one whose slices raise the loss least is taken.
        sequences, length: how much of it.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: as `compress_checkpoint` and `sort_states`.
    """
    if data is None:
        raise ConfigError("--sorted measures what states are worth on data: give some by --data")
    folder, place = Path(checkpoint), Path(output)
    check_output(place)
    read = read_checkpoint(folder, build)
    pairs = read_batches(read.model, read.tokenizer, Path(data), sequences, length, labelled=False)
    batches = [inputs for inputs, _ in pairs]
    extra = unloaded(read.model, folder, read.unexpected) if read.format == "transformers" else {}
    contained = contents(read.model) if read.mapped is None else set[bytes]()
    loss = likelihood_of(read.model, pairs) if gramians == "loss" else None
    with read.at_work("reading the data", len(batches) * (1 if loss is None else _PASSES)):
        order = sort_states(read.model, batches, loss=loss)
    with read.at_work(), new_folder(place) as new:
        carried = saved(read, folder, new, extra, contained)
        order.save(new)
    if read.mapped is not None:
        read.mapped.pager.close()
    rows = next(iter(batches[0].values())).shape[1]
    return Sorted(order, len(batches) * BATCH, rows, _without_order(carried))


def slice_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    build: str | None = None,
    states: int | None = None,
    fraction: float | None = None,
    multiple_of: int = 1,
    target: Target | None = None,
    memory: int | None = None,
    speed: bool = False,
) -> Sliced:
    """Cut a sorted checkpoint to the first states of every layer, without data.

    Args:
        checkpoint: written by `sort_checkpoint`, or saved with `StateOrder.save` beside it.
        output: folder to write, new or empty.
        build: as `compressm.lab.one_shot.compress_checkpoint`.
        states, fraction, multiple_of, target: how far; see `RankRule`.
        memory, speed: as `compressm.lab.one_shot.compress_checkpoint`.

    Raises:
        CheckpointError, InvalidRankRuleError, UnsupportedModelError: as `compress_checkpoint` and `StateOrder.slice`.
    """
    folder, place = Path(checkpoint), Path(output)
    check_output(place)
    order = StateOrder.load(folder)
    read = read_checkpoint(folder, build)
    model = read.model
    extra = unloaded(model, folder, read.unexpected) if read.format == "transformers" else {}
    contained = contents(model) if read.mapped is None else set[bytes]()
    with read.at_work():
        bill = Bill(model, memory, speed)
        report = order.slice(model, states=states, fraction=fraction, multiple_of=multiple_of, target=target)
        serving = bill.after_the_cut()
        with new_folder(place) as new:
            carried = _without_order(saved(read, folder, new, extra, contained))
            order.of(model).save(new)
            if read.format != "compressm" and "README.md" in carried.files:
                extend_card(new / "README.md", report, [serving.headline()], name=place.name)
    if read.mapped is not None:
        read.mapped.pager.close()
    return Sliced(replace(report, serving=serving), serving, carried)


def _without_order(carried: Carried) -> Carried:
    """What was carried, without the order of the states, which is written anew."""
    return replace(carried, left={name: why for name, why in (carried.left or {}).items() if name != ORDER_FILE})


__all__ = ["Sliced", "Sorted", "slice_checkpoint", "sort_checkpoint"]
