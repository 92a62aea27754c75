"""The cost of training steps at each size of the model, and what the cuts saved."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compressm.runtime.html import table
from compressm.training.step_cost import StepCost

_SAMPLE = 256  # times kept per phase: enough for a median, few enough for a checkpoint


@dataclass
class Phase:
    """The steps between two changes of the model's state dimensions.

    Attributes:
        state_dims: state dimension of every layer, by its name.
        steps: training steps done, including those that were undone later.
        wall: wall-clock seconds of steps, an even sample of at most 256 of them. A step lasts from the end of
            `Compressor.step` to its next call, so the time that the host spends between steps is included.
        cpu: CPU seconds of this process in the same steps, summed over all threads. Unlike ``wall`` they exclude the
            time taken by other programs.
        flops, kept_bytes: cost of one step; see `StepCost`. None where it was not measured.
        observed: how many of the steps had layers or gradients observed, for a cut to come. These take up to twice as
            long, which a training without cuts would not, so ``wall`` and ``cpu`` are of the other steps.
        observed_wall, observed_cpu: seconds of the observed steps, likewise.
    """

    state_dims: dict[str, int]
    steps: int = 0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    flops: int | None = None
    kept_bytes: int | None = None
    observed: int = 0
    observed_wall: list[float] = field(default_factory=list)
    observed_cpu: list[float] = field(default_factory=list)

    @property
    def step_seconds(self) -> float | None:
        """Median wall-clock time of a step, of an observed one where there are no others; None before the second."""
        return _median(self.wall or self.observed_wall)

    @property
    def step_cpu_seconds(self) -> float | None:
        """Median CPU time of a step, likewise."""
        return _median(self.cpu or self.observed_cpu)

    def add(self, wall: float, cpu: float, observed: bool = False) -> None:
        """Record the times of one step. When the sample is full, every second time is dropped."""
        count = self.observed if observed else self.steps - self.observed
        walls, cpus = (self.observed_wall, self.observed_cpu) if observed else (self.wall, self.cpu)
        stride = 1
        while count > stride * _SAMPLE:
            stride *= 2
        if len(walls) >= _SAMPLE:
            del walls[::2], cpus[::2]
        if count % stride == 0:
            walls.append(wall)
            cpus.append(cpu)

    def total(self, typical: float, cpu: bool) -> float:
        """Seconds of all steps, each taken as the median of its kind; as ``typical`` where none could be timed."""
        usual = (self.step_cpu_seconds if cpu else self.step_seconds) or typical
        watched = _median(self.observed_cpu if cpu else self.observed_wall) or usual
        return (self.steps - self.observed) * usual + self.observed * watched

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with medians in place of the samples."""
        return {
            "state_dims": dict(self.state_dims),
            "steps": self.steps,
            "step_seconds": self.step_seconds,
            "step_cpu_seconds": self.step_cpu_seconds,
            "flops": self.flops,
            "kept_bytes": self.kept_bytes,
            "observed": self.observed,
            "observed_step_seconds": _median(self.observed_wall),
            "observed_step_cpu_seconds": _median(self.observed_cpu),
        }


def _median(seconds: Sequence[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


class StepClock:
    """Times training steps, separately for each size of the model.

    Call `begin` when a step may begin, `end` when it is over, and `resize` when the model has changed. On a GPU the
    host runs ahead of the device and waits for it only now and then. The time of a single step is therefore unreliable,
    and the median of many steps is used.

    Args:
        state_dims: state dimension of every layer, by its name.
    """

    def __init__(self, state_dims: Mapping[str, int]) -> None:
        self.phases = [Phase(dict(state_dims))]
        self._began: tuple[float, float] | None = None

    def resize(self, state_dims: Mapping[str, int]) -> None:
        """Start a new phase if the state dimensions have changed."""
        if state_dims != self.phases[-1].state_dims:
            self.phases.append(Phase(dict(state_dims)))

    def measured(self, cost: StepCost) -> None:
        """Record the measured cost of a step at the present size."""
        self.phases[-1].flops, self.phases[-1].kept_bytes = cost.flops, cost.kept_bytes

    def begin(self) -> None:
        """Start timing the next step."""
        self._began = time.perf_counter(), time.process_time()

    def end(self, observed: bool = False) -> None:
        """Count a step, and record its times if `begin` was called.

        Args:
            observed: whether layers or gradients were observed in it.
        """
        phase = self.phases[-1]
        phase.steps += 1
        phase.observed += observed
        if self._began is not None:
            phase.add(time.perf_counter() - self._began[0], time.process_time() - self._began[1], observed)
        self._began = None

    def state_dict(self) -> list[dict[str, Any]]:
        """The phases, for a checkpoint."""
        return copy.deepcopy([vars(phase) for phase in self.phases])

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on from `state_dict`. The time between saving and loading is not counted."""
        self.phases = [Phase(**phase) for phase in state]
        self._began = None


_OBSERVED = (
    "All steps before the first cut were observed, which takes longer, so the time without cuts and what was saved are "
    "at most this"
)


@dataclass(frozen=True)
class Savings:
    """The cost of a training, and an estimate of its cost without cuts.

    The estimate is the number of steps times the median time of a step in the first phase. No second training is run.

    Attributes:
        steps: training steps done.
        seconds: time of all steps, each taken as the median of its phase, and of the cuts.
        seconds_if_big: estimated time of the steps at the median of the first phase.
        cut_seconds: time of the cuts alone.
        step_speedup: time of a step in the first phase, divided by that in the last phase; 1 if both have the same
            state dimensions.
        flops: operations of all steps; None where they were not measured.
        flops_if_big: operations of the steps at the first phase's size.
        cpu: whether the medians are CPU times instead of wall-clock times.
        at_most: whether all steps before the first cut were observed, which takes longer. The time without cuts, and
            the speedups, are then at most these.
    """

    steps: int
    seconds: float
    seconds_if_big: float
    cut_seconds: float
    step_speedup: float
    flops: int | None = None
    flops_if_big: int | None = None
    cpu: bool = False
    at_most: bool = False

    @property
    def speedup(self) -> float:
        """``seconds_if_big / seconds``."""
        return self.seconds_if_big / self.seconds

    def _repr_html_(self) -> str:
        rows: list[list[object]] = [["seconds", self.seconds, self.seconds_if_big, self.speedup]]
        if self.flops is not None and self.flops_if_big is not None:
            rows.append(["operations", float(self.flops), float(self.flops_if_big), self.flops_if_big / self.flops])
        title = f"{self.steps:,} steps and their cuts; the cost without cuts is an estimate"
        step = self._step()
        notes = [f"{step[0].upper()}{step[1:]}.", *([f"{_OBSERVED}."] if self.at_most else [])]
        return table(title, ["", "with cuts", "without", "times"], rows, notes)

    def _step(self) -> str:
        """What became of a step, in words."""
        if 0.95 < self.step_speedup < 1.05:
            return "a step takes as long as before"
        if self.step_speedup < 1:
            return (
                f"a step takes {1 / self.step_speedup:.1f} times as long, which other work on the machine may explain"
            )
        return f"a step is {self.step_speedup:.1f} times faster"

    def __str__(self) -> str:
        spared = ""
        if self.flops is not None and self.flops_if_big is not None:
            spared = f", {100 * (1 - self.flops / self.flops_if_big):.3g}% of the operations were spared"
        return (
            f"{self.steps} steps and their cuts took {self.seconds:.0f} s; without cuts an estimated "
            f"{self.seconds_if_big:.0f} s ({self.speedup:.1f} times); {self._step()}"
            f"{spared}{f'. {_OBSERVED}' if self.at_most else ''}"
        )


def savings(
    phases: Sequence[Phase], cut_seconds: float, cpu: bool = False, net_steps: int | None = None
) -> Savings | None:
    """Estimate what the cuts saved. None until steps before and after a cut have been timed.

    Args:
        phases: from a `StepClock`.
        cut_seconds: time of the cuts.
        cpu: use CPU time instead of wall-clock time, for machines that run other programs.
        net_steps: number of steps without those that a roll-back undid; by default the number of all steps. A training
            without cuts would not have made the undone steps.
    """
    medians = [phase.step_cpu_seconds if cpu else phase.step_seconds for phase in phases]
    first, last = medians[0], medians[-1]
    if first is None or last is None or len(phases) < 2:
        return None
    if phases[-1].state_dims == phases[0].state_dims:  # after cuts that were all undone only other work differs
        last = first
    # A phase too short to be timed is given the median of the first phase, so that it does not count as a saving.
    seconds = sum(phase.total(first, cpu) for phase in phases) + cut_seconds
    steps = sum(phase.steps for phase in phases)
    net = steps if net_steps is None else net_steps
    counts = [phase.flops for phase in phases]
    flops = flops_if_big = None
    if counts[0] is not None:
        known = [(phase.steps, count) for phase, count in zip(phases, counts, strict=True) if count is not None]
        if len(known) == len(phases):
            flops, flops_if_big = sum(number * count for number, count in known), net * counts[0]
    at_most = not phases[0].wall
    return Savings(steps, seconds, net * first, cut_seconds, first / last, flops, flops_if_big, cpu, at_most)


__all__ = ["Phase", "Savings", "StepClock", "savings"]
