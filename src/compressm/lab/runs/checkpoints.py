"""The last checkpoints of a run, each in a folder of its own. If the newest is damaged, an older one is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from compressm.errors import CheckpointError
from compressm.saving.checkpoint import load_tree, save_tree


class Checkpoints:
    """``FOLDER/step-00001000`` and so on; the oldest go.

    Args:
        folder: created with the first checkpoint.
        keep: how many to keep, at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, damaged or not, ascending."""
        while True:
            listed = self._listed()
            # Ascending: the run that writes here deletes an old one only when a newer one is whole.
            steps = [step for step in listed if (self.path(step) / "state.json").exists()]
            if steps or listed == self._listed():
                return steps

    def _listed(self) -> list[int]:
        names = (path.name.removeprefix("step-") for path in self._folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self._folder / f"step-{step:08d}"

    def write(self, step: int, tree: Any) -> None:
        """Save a checkpoint. Then delete those that are too old, and those of steps that a roll-back has undone.

        Raises:
            CheckpointError: the folder cannot be written; what was there before is untouched.
        """
        save_tree(self.path(step), tree, metadata={"step": step})
        steps = self.steps()
        kept = [other for other in steps if other <= step][-self._keep :]
        for other in set(steps) - set(kept):
            (self.path(other) / "state.json").unlink(missing_ok=True)  # first: without it there is no checkpoint
            shutil.rmtree(self.path(other), ignore_errors=True)

    def read(self) -> tuple[Any, list[str]]:
        """The newest checkpoint that is whole, and a line for every newer one that is not.

        Raises:
            CheckpointError: none is whole.
        """
        damaged: dict[int, str] = {}
        while steps := [step for step in self.steps() if step not in damaged]:
            try:
                return load_tree(self.path(steps[-1])), list(damaged.values())
            except CheckpointError as error:
                if steps[-1] in self.steps():  # otherwise a run that is writing here has deleted it meanwhile
                    damaged[steps[-1]] = str(error)
        raise CheckpointError("; ".join(damaged.values()) or f"no checkpoint in {self._folder}")
