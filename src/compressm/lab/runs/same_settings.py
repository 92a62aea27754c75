"""Whether a run is made with the settings and data of another one: needed to resume it, and to go on from it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from compressm.errors import ConfigError
from compressm.lab.config import Config, present_form
from compressm.lab.data.sequences import SequenceData

# These keys do not change a run's result, so they may differ between a checkpoint and the run that resumes it.
FREE_KEYS = {"data.root"} | {
    f"run.{key}"
    for key in (
        "output", "checkpoint_every", "keep_checkpoints", "log_every", "eval_batch_size", "threads", "device",
        "tensorboard", "wandb", "energy",
    )
}  # fmt: skip


def differences(saved: Mapping[str, Any], config: Config) -> Generator[tuple[str, Any, Any]]:
    """The settings that decide about a run's result and have changed: the key, its value now and the one before.

    Args:
        saved: a configuration as plain values, written by this version or an earlier one.
        config: the one now.
    """
    saved = present_form(saved)
    for section, values in present_form(config.model_dump(mode="json")).items():
        for name, value in values.items():
            key, before = f"{section}.{name}", saved.get(section, {}).get(name)
            if key not in FREE_KEYS and before != value:
                yield key, value, before


def check_same(saved: Mapping[str, Any], config: Config, folder: Path) -> None:
    """Refuse to resume the run of a folder with other settings.

    Raises:
        ConfigError: a setting differs; the message names it.
    """
    for key, value, before in differences(saved, config):
        raise ConfigError(
            f"{key} = {value!r}: the run in {folder} was started with {before!r}; give that value to resume "
            "it, or choose another --output"
        )


def check_same_data(tree: Mapping[str, Any], config: Config, data: SequenceData, folder: Path) -> None:
    """Refuse to go on from a checkpoint with other data than it was made with: a file may have been replaced, and the
    paths in the settings are the same then.

    Args:
        tree: the checkpoint. Those of earlier versions do not say what their data were.
        config, data: of the run now.
        folder: of the checkpoint's run.

    Raises:
        ConfigError: the data differ.
    """
    # Computed sequences may differ in their last digits on another machine, where a run may well be resumed.
    if config.data.name == "mackey-glass" or tree.get("data") in (None, data.fingerprint):
        return
    key = next((key for key in ("source", "root") if getattr(config.data, key)), "name")
    raise ConfigError(
        f"data.{key} = {getattr(config.data, key)!r}: these are not the data that the run in {folder} was made with "
        "(their SHA-256 differs): put those back, or start anew in another --output"
    )


__all__ = ["FREE_KEYS", "check_same", "check_same_data", "differences"]
