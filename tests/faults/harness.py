"""Real processes that really break: each runs the command line, with a sabotage inside or a blow from outside."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from helpers import forkserver, newest_checkpoint

# 53 batches an epoch. Four cuts; each is examined, and as nothing may be lost some are rolled back.
SETTINGS: dict[str, Any] = {
    "data": {"name": "digits", "validation": 0.25},
    "model": {"d_model": 6, "d_state": 24, "r_min": 0.9, "max_phase": 0.6},
    "optimizer": {"lr": 0.03, "ssm_lr_factor": 0.5, "max_grad_norm": 1.0},
    "schedule": {"name": "cosine"},
    "compression": {"states": 2, "cuts": 4, "start": 20, "window": 0.6, "max_drop": 0.0, "check_after": 7},
    "run": {
        "steps": 120, "batch_size": 20, "eval_every": 25, "checkpoint_every": 5, "log_every": 40, "device": "cpu",
        "tensorboard": False,
    },
}  # fmt: skip
STEPS: int = SETTINGS["run"]["steps"]

Sabotage = Callable[[], None]
Record = Callable[..., None]  # the fixture `tried`


class Training:
    """``compressm train --resume`` in a process of its own.

    Args:
        folder: the run's folder. Its configuration and what it said lie elsewhere.
        sabotage: is called in the process before it trains.
        settings: instead of `SETTINGS`.
    """

    def __init__(self, folder: Path, sabotage: Sabotage | None = None, settings: dict[str, Any] | None = None) -> None:
        beside = Path(tempfile.mkdtemp())
        self._path, config = beside / "log", beside / "config.json"  # JSON is YAML
        config.write_text(json.dumps(settings or SETTINGS))
        context = forkserver()
        self._step = context.Value("i", 0)
        arguments = ["train", str(config), "--output", str(folder), "--resume"]
        self.process: BaseProcess = context.Process(target=_run, args=(arguments, self._path, sabotage, self._step))
        self._path.write_text("")
        self.started = time.monotonic()
        self.process.start()

    @property
    def step(self) -> int:
        """The step that it is at, or was at when it ended."""
        return self._step.value  # type: ignore[attr-defined]

    def wait_for(self, step: int) -> None:
        """Until it is at a step, or has ended."""
        while self.process.is_alive() and self.step < step:
            time.sleep(0.001)

    def end(self) -> int:
        """Its exit code."""
        self.process.join(120)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode

    def said(self) -> str:
        """What it wrote on standard error."""
        return self._path.read_text()

    def error(self) -> str:
        """The one line with which it stopped."""
        said = self.said()
        assert "Traceback" not in said, said
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, said
        return lines[0]


def _run(arguments: list[str], log: Path, sabotage: Sabotage | None, step: Any) -> None:
    from compressm.cli import main
    from compressm.lab.runs.loop import _Run

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells have their background jobs ignore
    torch.set_num_threads(1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    real = _Run._advance

    def counted(run: Any, log: Any) -> None:
        step.value = run.step + 1
        real(run, log)

    _Run._advance = counted  # type: ignore[method-assign]
    if sabotage is not None:
        sabotage()
    sys.exit(main(arguments))


def finish(folder: Path, settings: dict[str, Any] | None = None) -> int:
    """Resume a run and let it end.

    Returns:
        the step that it went on from.
    """
    resumed = newest_checkpoint(folder) if list(folder.glob("checkpoints/step-*/state.json")) else None
    last = Training(folder, settings=settings)
    assert last.end() == 0, last.said()
    return 0 if resumed is None else int(resumed.name.removeprefix("step-"))


def outcome(folder: Path) -> list[bytes]:
    """Everything that training ended with: weights, optimizer, compressor, random state, and the saved model."""
    state = newest_checkpoint(folder)
    assert json.loads((state / "state.json").read_text())["metadata"]["step"] == STEPS
    # A kill between the last checkpoint's two renames leaves tensors under this name, which are read as they are.
    tensors = min(state.glob("state.safetensors*"), key=lambda path: len(path.name))
    return [tensors.read_bytes(), (folder / "model" / "model.safetensors").read_bytes()]


def instants(count: int, span: float) -> list[float]:
    """Instants all over a span of time, the same in every run of the tests."""
    return [random.Random(index).uniform(0, span) for index in range(count)]
