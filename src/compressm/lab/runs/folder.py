"""A run's folder: whether a run may begin there, and its checkpoints."""

from __future__ import annotations

from pathlib import Path

from compressm.errors import ConfigError
from compressm.lab.config import Config
from compressm.lab.runs.checkpoints import Checkpoints
from compressm.lab.runs.result import RunResult
from compressm.lab.runs.same_settings import check_same


def prepare(folder: Path, config: Config, resume: bool) -> RunResult | None:
    """Create the folder of a run that is about to begin or to go on.

    Returns:
        the result, if the folder holds that of a finished run; otherwise None.

    Raises:
        ConfigError: the folder holds a run that is not to be resumed, or one with other settings, or it cannot be
            created.
        CheckpointError: a damaged result.
    """
    result = folder / "result.json"
    if not resume and (result.exists() or checkpoints_in(folder, config).steps()):
        raise ConfigError(
            f"run.output: {folder} already holds a run; resume it with --resume, or choose another --output"
        )
    if result.exists():
        content = RunResult.read(result)
        check_same(content.config, config, folder)
        return content
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.output: {folder} cannot be created ({error.strerror}); choose another folder with --output"
        ) from error
    return None


def checkpoints_in(folder: Path, config: Config) -> Checkpoints:
    """The checkpoints of the run in a folder."""
    return Checkpoints(folder / "checkpoints", config.run.keep_checkpoints)


__all__ = ["checkpoints_in", "prepare"]
