"""What training steps cost at every size that the model had, and what the cuts saved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compressm.training.step_cost import StepCost

_SAMPLE = 256  # times kept per phase: enough for a median, few enough for a checkpoint


@dataclass
class Phase:
    """The steps between two changes of the model's state dimensions.

    Attributes:
        state_dims: state dimension of every layer, by its name.
        steps: training steps done, those that were undone later included.
        wall: seconds of steps, on the clock: an even sample of at most 256 of them, from the end of `Compressor.step`
            to its next call. What the host does between steps is in it.
        cpu: seconds that this process computed in the same steps, all threads together; unlike ``wall``, this does not
            count what other programs took.
        flops, kept_bytes: of one step; see `measure.StepCost`. None where it was not measured.
    """

    state_dims: dict[str, int]
    steps: int = 0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    flops: int | None = None
    kept_bytes: int | None = None

    @property
    def step_seconds(self) -> float | None:
        """Median time of a step on the clock; None before the second."""
        return statistics.median(self.wall) if self.wall else None

    @property
    def step_cpu_seconds(self) -> float | None:
        """Median computing time of a step; None before the second."""
        return statistics.median(self.cpu) if self.cpu else None

    def add(self, wall: float, cpu: float) -> None:
        """Take note of one step's times; when the sample is full, every second one goes, and so on."""
        stride = 1
        while self.steps > stride * _SAMPLE:
            stride *= 2
        if len(self.wall) >= _SAMPLE:
            del self.wall[::2], self.cpu[::2]
        if self.steps % stride == 0:
            self.wall.append(wall)
            self.cpu.append(cpu)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: the medians for the sample."""
        return {
            "state_dims": dict(self.state_dims),
            "steps": self.steps,
            "step_seconds": self.step_seconds,
            "step_cpu_seconds": self.step_cpu_seconds,
            "flops": self.flops,
            "kept_bytes": self.kept_bytes,
        }


class StepClock:
    """Times the steps of a training by the size that the model has in them.

    Call `begin` when a step may begin, `end` when it is over, and `resize` when the model has changed. On a GPU the
    host runs ahead of the device and waits for it now and then, so that a median of many steps is right and a single
    time is not.

    Args:
        state_dims: state dimension of every layer, by its name.
    """

    def __init__(self, state_dims: Mapping[str, int]) -> None:
        self.phases = [Phase(dict(state_dims))]
        self._began: tuple[float, float] | None = None

    def resize(self, state_dims: Mapping[str, int]) -> None:
        """The model has these state dimensions from now on."""
        if state_dims != self.phases[-1].state_dims:
            self.phases.append(Phase(dict(state_dims)))

    def measured(self, cost: StepCost) -> None:
        """What a step of the present size takes."""
        self.phases[-1].flops, self.phases[-1].kept_bytes = cost.flops, cost.kept_bytes

    def begin(self) -> None:
        """What comes now belongs to the next step."""
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """The step is over."""
        phase = self.phases[-1]
        phase.steps += 1
        if self._began is not None:
            phase.add(time.perf_counter() - self._began[0], time.process_time() - self._began[1])
        self._began = None

    def state_dict(self) -> list[dict[str, Any]]:
        """The phases, for a checkpoint."""
        return [{**vars(phase), "wall": list(phase.wall), "cpu": list(phase.cpu)} for phase in self.phases]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on from `state_dict`; the time between is nobody's."""
        self.phases = [Phase(**phase) for phase in state]
        self._began = None


@dataclass(frozen=True)
class Savings:
    """What a training took, against an estimate of what it would have taken had the model stayed as big as at first.

    The estimate is the median time of the first phase's steps times the number of steps: no second training was run.

    Attributes:
        steps: training steps done.
        seconds: of all steps, each at the median of its phase, and of the cuts.
        seconds_if_big: the estimate for the same steps at the first phase's median.
        cut_seconds: of the cuts alone.
        step_speedup: a step's time in the first phase over that in the last.
        flops: operations of all steps; None where they were not measured.
        flops_if_big: the same had the model stayed as big.
        cpu: whether the medians are of computing time and not of the clock.
    """

    steps: int
    seconds: float
    seconds_if_big: float
    cut_seconds: float
    step_speedup: float
    flops: int | None = None
    flops_if_big: int | None = None
    cpu: bool = False

    @property
    def speedup(self) -> float:
        """``seconds_if_big / seconds``."""
        return self.seconds_if_big / self.seconds

    def __str__(self) -> str:
        spared = ""
        if self.flops is not None and self.flops_if_big is not None:
            spared = f", {1 - self.flops / self.flops_if_big:.0%} of the operations were spared"
        return (
            f"{self.steps} steps and their cuts took {self.seconds:.0f} s; without cuts an estimated "
            f"{self.seconds_if_big:.0f} s ({self.speedup:.1f} times); a step is {self.step_speedup:.1f} times faster"
            f"{spared}"
        )


def savings(
    phases: Sequence[Phase], cut_seconds: float, cpu: bool = False, net_steps: int | None = None
) -> Savings | None:
    """What the cuts saved; None before there are times on both sides of a cut.

    Args:
        phases: from a `StepClock`.
        cut_seconds: what the cuts took.
        cpu: by computing time instead of the clock, for machines with other work.
        net_steps: steps that were not undone by a roll-back, if fewer: without cuts no others would have been made.
    """
    medians = [phase.step_cpu_seconds if cpu else phase.step_seconds for phase in phases]
    first, last = medians[0], medians[-1]
    if first is None or last is None or len(phases) < 2:
        return None
    # A phase too short to be timed counts as the first one's: at least it is not flattered.
    seconds = sum(phase.steps * (median or first) for phase, median in zip(phases, medians, strict=True)) + cut_seconds
    steps = sum(phase.steps for phase in phases)
    net = steps if net_steps is None else net_steps
    counts = [phase.flops for phase in phases]
    flops = flops_if_big = None
    if counts[0] is not None:
        known = [(phase.steps, count) for phase, count in zip(phases, counts, strict=True) if count is not None]
        if len(known) == len(phases):
            flops, flops_if_big = sum(number * count for number, count in known), net * counts[0]
    return Savings(steps, seconds, net * first, cut_seconds, first / last, flops, flops_if_big, cpu)


__all__ = ["Phase", "Savings", "StepClock", "savings"]
