"""``compressm train --from``: begin with the steps that the same run without compression has already made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from compressm.errors import ConfigError
from compressm.lab.config import Config
from compressm.lab.runs.folder import checkpoints_in
from compressm.lab.runs.same_settings import differences
from compressm.observing.moments import Statistics
from compressm.saving.checkpoint import load_tree
from compressm.training.compressor import Compressor
from compressm.training.schedule import first_look


def checkpoint_to_begin_with(
    origin: Path, config: Config, model: nn.Module, compressor: Compressor | None
) -> dict[str, Any]:
    """The last checkpoint of an uncompressed run from before our first cut, as if our own run had made it.

    Args:
        origin: the folder of that run.
        config, model, compressor: of the run that begins.

    Raises:
        ConfigError: the two runs differ in more than compression, or there is no such checkpoint.
        CheckpointError: a damaged checkpoint.
    """
    if compressor is None:
        raise ConfigError(f"--from {origin}: nothing would differ from that run without compression; enable it")
    selective = Statistics(model).layers
    reasons = {
        "compression.when = 'settled'": config.compression.when == "settled",
        "compression.gramians = 'loss'": config.compression.gramians == "loss",
        f"{selective[0] if selective else ''} is a selective layer": bool(selective),
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    if reason is not None:
        raise ConfigError(
            f"--from {origin}: {reason}, which is watched over the steps before a cut, and that run did not watch; "
            "train without --from"
        )
    first, judged = compressor.cut_steps[0], config.compression.max_drop is not None
    tree = _last_before(first_look(first, compressor.check_after) if judged else first, origin, config)
    if tree["compressor"] is not None:
        raise ConfigError(f"--from {origin}: that run was compressed itself; name one with compression.enabled=false")
    for key, value, before in differences(tree["config"], config):
        if not key.startswith("compression."):
            raise ConfigError(
                f"{key} = {value!r}: the run in {origin} was made with {before!r}; give that value to go on from "
                "it, or train without --from"
            )
    return {**tree, "compressor": {**compressor.state_dict(), "steps": tree["step"]}, "best": None}


def _last_before(step: int, origin: Path, config: Config) -> dict[str, Any]:
    """The last checkpoint from before a step, in which the first cut is made, or the metric measured for its sake."""
    checkpoints = checkpoints_in(origin, config)
    steps = [saved for saved in checkpoints.steps() if saved < step]
    if not steps:
        raise ConfigError(
            f"--from {origin}: it has no checkpoint from before step {step}, where the first cut is due, or the metric "
            "is measured for it; keep more of them there with run.keep_checkpoints, or train without --from"
        )
    return load_tree(checkpoints.path(steps[-1]))


__all__ = ["checkpoint_to_begin_with"]
