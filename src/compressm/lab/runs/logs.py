"""What a run shows while it trains: a progress line on the terminal, and curves in TensorBoard or Weights & Biases."""

from __future__ import annotations

import io
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from compressm.errors import ConfigError, MissingExtraError
from compressm.lab.runs.tasks import Quality
from compressm.runtime.files import write_text
from compressm.training.history import Event


class Tracker(Protocol):
    """Something that draws numbers over the steps."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One number each."""
        ...

    def spectrum(self, layer: str, hsv: Sequence[float], kept: int | None, step: int) -> None:
        """A layer's Hankel singular values, decreasing, as histogram and picture; ``kept`` of them after a cut."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class TensorBoard:
    """Event files in a folder.

    Args:
        folder: where they go.
        start: step at which this process takes the run up; what was logged after it is dropped.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start or None)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def spectrum(self, layer: str, hsv: Sequence[float], kept: int | None, step: int) -> None:
        """See `Tracker`."""
        import torch

        self._writer.add_histogram(f"log10_hsv/{layer}", torch.tensor(_logarithms(hsv)), step)
        self._writer.add_figure(f"spectrum/{layer}", _picture(layer, hsv, kept, step), step)

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, named after the run's folder. A resumed run goes on in the same one.

    Args:
        project: its project.
        folder: the run's folder.
        config: what the run is made with.

    Raises:
        MissingExtraError: it is not installed.
        ConfigError: it cannot start, without a login for example.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
            from wandb.errors import Error
        except ImportError as error:
            raise MissingExtraError('run.wandb needs Weights & Biases: pip install "compressm[wandb]"') from error
        self._wandb: Any = wandb
        marker = folder / "wandb-id"
        identity = marker.read_text(encoding="utf-8") if marker.exists() else uuid.uuid4().hex
        write_text(marker, identity)
        try:
            self._run: Any = wandb.init(
                project=project, name=folder.name, dir=str(folder), id=identity, resume="allow", config=dict(config)
            )
        except Error as error:
            raise ConfigError(
                f"run.wandb = {project!r}: Weights & Biases does not start ({error}); log in with 'wandb login', or "
                "set WANDB_MODE=offline"
            ) from error
        self._run.define_metric("*", step_metric="step")  # its own steps cannot go back, as ours do in a roll-back

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log({**values, "step": step})

    def spectrum(self, layer: str, hsv: Sequence[float], kept: int | None, step: int) -> None:
        """See `Tracker`."""
        from PIL import Image

        file = io.BytesIO()
        _picture(layer, hsv, kept, step).savefig(file, format="png")
        histogram, picture = self._wandb.Histogram(_logarithms(hsv)), self._wandb.Image(Image.open(file))
        self._run.log({f"log10_hsv/{layer}": histogram, f"spectrum/{layer}": picture, "step": step})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


def _logarithms(hsv: Sequence[float]) -> list[float]:
    floor = 1e-12 * max(*hsv, 1e-300)
    return [math.log10(max(value, floor)) for value in hsv]


def _picture(layer: str, hsv: Sequence[float], kept: int | None, step: int) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.semilogy(range(1, len(hsv) + 1), [10**value for value in _logarithms(hsv)], ".", markersize=4)
    if kept is not None:
        axis.axvline(kept + 0.5, color="#d55e00", linewidth=1, linestyle=":")
    axis.set(title=f"{layer}, step {step:,}", xlabel="state", ylabel="Hankel singular value")
    return figure


class RunLog:
    """Progress on standard error, a bar on a terminal and plain lines elsewhere; the same numbers go to trackers.

    Args:
        steps: length of the run.
        trackers: who else is told.
        start: step at which this process takes the run up.
        quiet: nothing on the terminal.
    """

    def __init__(self, steps: int, trackers: Sequence[Tracker] = (), start: int = 0, quiet: bool = False) -> None:
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
        self._trackers = list(trackers)

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for tracker in self._trackers:
            tracker.close()

    def training(self, step: int, loss: float, rates: Mapping[str, float]) -> None:
        """The loss of a batch, and the learning rate of every group."""
        now = time.perf_counter()
        if step > self._since_step:
            self._numbers["speed"] = f"{(step - self._since_step) / (now - self._since):.1f} steps/s"
        self._since, self._since_step = now, step
        self._numbers["loss"] = f"loss {loss:.4f}"
        self._scalars(step, {"train/loss": loss, **{f"lr/{name}": rate for name, rate in rates.items()}})
        self._show(step)

    def evaluation(self, step: int, quality: Quality, state_dims: Mapping[str, int]) -> None:
        """Metric and loss on validation data, and the state dimensions."""
        self._numbers["quality"] = f"validation {quality}"
        self._numbers["states"] = f"states {_short(list(state_dims.values()))}"
        dims = {f"state_dim/{name}": float(states) for name, states in state_dims.items()}
        values = {f"validation/{quality.metric}": quality.score, "validation/loss": quality.loss}
        self._scalars(step, {**values, **dims})
        self._show(step)
        if self._progress.disable:
            self._console.print(f"step {step}: {self._line()}", markup=False)

    def compression(self, event: Event, state_dims: Mapping[str, int]) -> None:
        """What the compressor did, and the state dimensions now."""
        self.message(str(event))
        self._numbers["states"] = f"states {_short(list(state_dims.values()))}"
        dims = {f"state_dim/{name}": float(states) for name, states in state_dims.items()}
        self._scalars(event.step, {**event.metrics(), **dims})
        for layer in event.layers:
            kept = None
            if layer["outcome"] == "cut":  # a state of a real system has two values
                kept = layer["states_after"] * len(layer["hsv"]) // layer["states_before"]
            for tracker in self._trackers:
                tracker.spectrum(layer["name"], layer["hsv"], kept, event.step)
        self._show(event.step)

    def spectra(self, entry: Mapping[str, Any]) -> None:
        """An entry of `SpectrumLog`."""
        for name, layer in entry["layers"].items():
            for tracker in self._trackers:
                tracker.spectrum(name, layer["hsv"], None, entry["step"])

    def message(self, text: str) -> None:
        """A line of text."""
        self._console.print(text, markup=False)

    def _show(self, step: int) -> None:
        self._progress.update(self._task, completed=step, numbers=self._line())

    def _line(self) -> str:
        order = ("loss", "quality", "states", "speed")
        return ", ".join(self._numbers[key] for key in order if key in self._numbers)

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.scalars(values, step)


def _short(dims: Sequence[int]) -> str:
    return str(dims[0]) if len(set(dims)) == 1 else ",".join(map(str, dims))


__all__ = ["RunLog", "TensorBoard", "Tracker", "WeightsAndBiases"]
