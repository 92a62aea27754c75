"""What a run tells while it goes: a progress line on the terminal, and TensorBoard's logs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunLog:
    """Progress on standard error, a bar on a terminal and plain lines elsewhere, and TensorBoard's event files.

    Args:
        steps: length of the run.
        folder: where TensorBoard's files go; None for no such files.
        start: step at which this process takes the run up; TensorBoard drops what was logged after it.
        quiet: nothing on the terminal.
    """

    def __init__(self, steps: int, folder: Path | None, start: int = 0, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=steps, completed=start, numbers="")
        self._numbers: dict[str, str] = {}
        self._since, self._since_step = time.perf_counter(), start
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=start or None)

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def training(self, step: int, loss: float, rates: Mapping[str, float]) -> None:
        """The loss of a batch, and the learning rate of every group."""
        now = time.perf_counter()
        if step > self._since_step:
            self._numbers["speed"] = f"{(step - self._since_step) / (now - self._since):.1f} steps/s"
        self._since, self._since_step = now, step
        self._numbers["loss"] = f"loss {loss:.4f}"
        self._scalars(step, {"train/loss": loss, **{f"lr/{name}": rate for name, rate in rates.items()}})
        self._show(step)

    def evaluation(self, step: int, accuracy: float, state_dims: Mapping[str, int]) -> None:
        """The accuracy on validation data, and the state dimensions."""
        self._numbers["accuracy"] = f"validation {accuracy:.4f}"
        self._numbers["states"] = f"states {_short(list(state_dims.values()))}"
        dims = {f"state_dim/{name}": float(states) for name, states in state_dims.items()}
        self._scalars(step, {"validation/accuracy": accuracy, **dims})
        self._show(step)
        if self._progress.disable:
            self._console.print(f"step {step}: {self._line()}", markup=False)

    def message(self, text: str) -> None:
        """A line of text."""
        self._console.print(text, markup=False)

    def _show(self, step: int) -> None:
        self._progress.update(self._task, completed=step, numbers=self._line())

    def _line(self) -> str:
        order = ("loss", "accuracy", "states", "speed")
        return ", ".join(self._numbers[key] for key in order if key in self._numbers)

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)


def _short(dims: Sequence[int]) -> str:
    return str(dims[0]) if len(set(dims)) == 1 else ",".join(map(str, dims))


__all__ = ["RunLog"]
