"""Writing of a cut checkpoint: in the format that it came in, with its card and all that the source holds beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from compressm.cutting import Report
from compressm.errors import CheckpointError
from compressm.lab.one_shot_inputs import Checkpoint
from compressm.runtime.files import read_pair
from compressm.saving import mamba_ssm_format
from compressm.saving.card import Measured, extend_card, loading, model_card
from compressm.saving.checkpoint import save_with_history
from compressm.saving.mapped import save_mapped
from compressm.saving.source_folder import Carried, carry, copy_files
from compressm.training.history import Event


def check_output(place: Path | None) -> None:
    """Refuse a folder that holds something.

    Raises:
        CheckpointError: it does.
    """
    if place is not None and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise CheckpointError(f"output {place} exists and is not an empty folder: choose another")


def saved(read: Checkpoint, source: Path, target: Path, extra: Mapping[str, Path], contained: set[bytes]) -> Carried:
    """Write the model in the format that it came in, and say what was carried beside it."""
    if read.mapped is not None:
        return save_mapped(read.mapped, source, target)
    if read.format == "mamba_ssm":
        return Carried((), *copy_files(source, target, mamba_ssm_format.save(read.model, source, target)))
    if read.format == "compressm":
        return _resave(read.model, source, target)
    cast("Any", read.model).save_pretrained(target)
    return carry(source, target, read.model, extra, contained)


def with_card(
    card: Path, carried: Carried, report: Report, facts: Sequence[str], measured: Measured | None, name: str
) -> Carried:
    """What was carried, after the card was told of the cut; ``name`` is the model's, where the card tells none."""
    if not card.is_file():
        return carried
    try:
        extend_card(card, report, facts, measured, name)
    except CheckpointError as error:
        return replace(carried, unextended=str(error))
    return replace(carried, files=tuple(one for one in carried.files if one != card.name), extended=(card.name,))


def _resave(model: nn.Module, source: Path, target: Path) -> Carried:
    """Save as `save` does, with the history and the other files of the source."""
    names = ("model.safetensors", "compressm.json")
    if not (source / names[1]).is_file():  # the weights of a model of the user's
        alone = save_with_history(model, target, [])
        (target / "README.md").write_text(model_card(model, load=loading(model, "FOLDER", alone)), encoding="utf-8")
        return Carried()
    history = read_pair(source, *names)[0].get("history")
    events = history if isinstance(history, list) else []
    alone = save_with_history(model, target, events)
    card = source / "README.md"
    ours = not card.is_file() or "\nlibrary_name: compressm\n" in card.read_text(encoding="utf-8", errors="replace")
    if ours:  # our own card, which says the sizes from before the cut
        text = model_card(model, [Event.from_dict(event) for event in events], load=loading(model, "FOLDER", alone))
        (target / card.name).write_text(text, encoding="utf-8")
    files, left = copy_files(source, target, [source / name for name in (*names, *([card.name] * ours))])
    return Carried((), files, left)


__all__ = ["check_output", "saved", "with_card"]
