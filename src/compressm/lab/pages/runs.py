"""What a page is made from: the results of runs, or the history in a saved model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressm.errors import CheckpointError, ConfigError
from compressm.lab.runs.result import RunResult

_LARGEST_FILE = 1 << 28  # bytes


@dataclass(frozen=True)
class Run:
    """One run, as far as its files tell.

    Attributes:
        name: what the page calls it.
        history: what the compressor did, as `Event.to_dict`.
        result: everything else; None where only a saved model was there.
    """

    name: str
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    result: RunResult | None = None

    @property
    def layers(self) -> list[str]:
        """Names of the layers that were looked at."""
        named = [layer["name"] for event in self.history for layer in event["layers"]]
        named += [name for entry in (self.result and self.result.spectra) or [] for name in entry["layers"]]
        named += [name for phase in (self.result.phases if self.result else []) for name in phase["state_dims"]]
        return list(dict.fromkeys(named))

    @property
    def cuts(self) -> list[dict[str, Any]]:
        """The events in which a layer was cut, later undone or not."""
        return [event for event in self.history if event["kind"] == "cut"]

    def was_undone(self, event: dict[str, Any]) -> bool:
        """Whether this event of the history is a cut that was undone later."""
        place = next(index for index, one in enumerate(self.history) if one is event)
        later = (one["kind"] for one in self.history[place + 1 :] if one["kind"] in ("cut", "kept", "rolled_back"))
        return event["kind"] == "cut" and next(later, "") == "rolled_back"


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs.

    Args:
        paths: folders of runs (with ``result.json``), of saved models (with ``compressm.json``), or of results (with
            other JSON files); or result files.

    Raises:
        ConfigError: there is nothing that a page could be made from.
        CheckpointError: a damaged file.
    """
    runs: list[Run] = []
    for path in paths:
        found = _load(path)
        if not found and (path / "compressm.json").is_file():
            raise ConfigError(
                f"{path}: a saved model without the history of its cuts; save it with compressm.save(model, folder, "
                "compressor), after the first cut"
            )
        if not found and any(path.glob("checkpoints/step-*")):
            raise ConfigError(f"{path}: a run that has not ended yet; go on with compressm train --resume, then report")
        if not found:
            raise ConfigError(
                f"{path}: neither a run's folder nor a result file; name a folder that compressm train or compressm "
                "reproduce wrote, or one of their JSON files"
            )
        runs += found
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else Run(f"{run.name} ({names[:index].count(run.name)})", *rest)
        for index, (run, rest) in enumerate(((run, (run.history, run.result)) for run in runs), 1)
    ]


def _load(path: Path) -> list[Run]:
    if path.is_file():
        return [_result(path, path.stem)]
    if (path / "result.json").is_file():
        return [_result(path / "result.json", path.name or path.resolve().name)]
    if (path / "compressm.json").is_file():
        history = _read(path / "compressm.json").get("history")
        return [Run(path.name or path.resolve().name, _history(history, path / "compressm.json"))] if history else []
    return [_result(file, file.stem) for file in sorted(path.glob("*.json"))]


def _result(path: Path, name: str) -> Run:
    _read(path)  # its size, and whether it is an object
    result = RunResult.read(path)
    try:
        return Run(name, _history(result.history, path), result)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the result of a run ({error!r})") from error


def _history(events: Any, path: Path) -> list[dict[str, Any]]:
    needed = {"kind", "step", "layers"}
    if not isinstance(events, list) or not all(isinstance(event, dict) and needed <= event.keys() for event in events):
        raise CheckpointError(f"{path}: its history is not that of a compressor; make the run again")
    return events


def _read(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > _LARGEST_FILE:
            raise CheckpointError(f"{path}: {size} bytes are too many for a result; check the path")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not the result of a run")
    return content


__all__ = ["Run", "load_runs"]
