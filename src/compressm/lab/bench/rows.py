"""Measures rows. The two sides of a row take turns, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from compressm.lab.bench.roofline import Rates, Work


@dataclass(frozen=True)
class Side:
    """What one process builds and then runs step by step.

    Attributes:
        build: ``"module:function"``; the function returns the step.
        arguments: of that function; plain values.
    """

    build: str
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Case:
    """A row to be measured.

    Attributes:
        name: ``suite/what``.
        ours: our side.
        peer: what it is compared with, in words.
        peer_side: the other side.
        work: operations and bytes that our side needs at the least.
        brief: whether a quick run measures it too.
    """

    name: str
    ours: Side
    peer: str
    peer_side: Side
    work: Work
    brief: bool = True


@dataclass(frozen=True)
class Row:
    """A comparison: times in milliseconds of one step, medians; quartiles as the spread; memory in megabytes.

    What could not be measured is None, and ``reason`` says why.

    Attributes:
        ratio: the peer's time over ours.
        roofline_ms: the least time that this machine could need; see `roofline`.
        of_roofline: our time over that.
        traffic_mb: the least that a step reads and writes; see `roofline`.
    """

    name: str
    ours_ms: float | None
    ours_quartiles_ms: tuple[float, float] | None
    repetitions: int
    peer: str
    peer_ms: float | None
    peer_quartiles_ms: tuple[float, float] | None
    peer_repetitions: int
    ratio: float | None
    roofline_ms: float
    of_roofline: float | None
    peak_mb: float | None
    peer_peak_mb: float | None
    reason: str | None = None
    traffic_mb: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; four digits."""
        return {key: _rounded(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Effort:
    """How long a row is measured: until each side has run ``repetitions`` steps, or, once it has run ``fewest``, for
    ``seconds`` in all."""

    repetitions: int = 20
    fewest: int = 2
    seconds: float = 8.0


QUICK = Effort(repetitions=3, fewest=1, seconds=3.0)

_TURN_SECONDS, _TURN_STEPS = 0.5, 10


def compare(case: Case, rates: Rates, effort: Effort, threads: int, cpus: Sequence[int] | None) -> Row:
    """Measure one row.

    Args:
        case: what to measure.
        rates: of this machine.
        effort: for how long.
        threads: of PyTorch, in both processes.
        cpus: the processors that both processes may use, which limits JAX's threads too; None to leave them alone.
    """
    with Process(case.ours, threads, cpus) as ours, Process(case.peer_side, threads, cpus) as peer:
        while unfinished := [side for side in (ours, peer) if not _finished(side, effort)]:
            for side in unfinished:
                side.turn()
        return make_row(case, rates, ours, peer)


def make_row(case: Case, rates: Rates, ours: Process, peer: Process) -> Row:
    """The row of two sides that have been measured."""
    ours_ms, peer_ms = median(ours.times_ms), median(peer.times_ms)
    roofline_ms = rates.limit_ms(case.work)
    reasons = [f"ours: {ours.unavailable}"] if ours.unavailable else []
    reasons += [f"peer: {peer.unavailable}"] if peer.unavailable else []
    return Row(
        name=case.name,
        ours_ms=ours_ms,
        ours_quartiles_ms=quartiles(ours.times_ms),
        repetitions=len(ours.times_ms),
        peer=case.peer,
        peer_ms=peer_ms,
        peer_quartiles_ms=quartiles(peer.times_ms),
        peer_repetitions=len(peer.times_ms),
        ratio=None if ours_ms is None or peer_ms is None else peer_ms / ours_ms,
        roofline_ms=roofline_ms,
        of_roofline=None if ours_ms is None else ours_ms / roofline_ms,
        peak_mb=ours.peak_mb(),
        peer_peak_mb=peer.peak_mb(),
        reason="; ".join(reasons) or None,
        traffic_mb=case.work.bytes / 1e6,
    )


class Process:
    """A running side. Use it in a ``with`` statement: the process ends with it.

    Attributes:
        times_ms: what its steps took.
        unavailable: why it cannot run; None if it can.
    """

    def __init__(self, side: Side, threads: int, cpus: Sequence[int] | None) -> None:
        self.times_ms: list[float] = []
        self.unavailable: str | None = None
        self._side = side
        self._process = subprocess.Popen(
            [sys.executable, "-m", "compressm.lab.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        order = {"build": side.build, "arguments": side.arguments, "threads": threads, "cpus": cpus and list(cpus)}
        self._ask(json.dumps(order))

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if kind is not None:
            self._process.terminate()
        self._process.wait()

    def turn(self) -> None:
        """A few steps one after the other, as in training; or one, if steps are slow.

        The first of several is not counted. After the other side's turn the caches are cold and the processor's threads
        asleep, which in a training happens at the first step only.
        """
        spent, fast = 0.0, bool(self.times_ms) and self.times_ms[-1] < 1e3 * _TURN_SECONDS
        for index in range(_TURN_STEPS):
            answer = self._ask("step")
            if self.unavailable is not None:
                return
            if fast and index == 0:
                continue
            self.times_ms.append(float(answer["ms"]))
            spent += self.times_ms[-1] / 1e3
            if spent >= _TURN_SECONDS:
                return

    def peak_mb(self) -> float | None:
        """The memory that its steps needed."""
        return self._ask("peak").get("peak_mb") if self.unavailable is None else None

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline() or "{}")
        except BrokenPipeError:
            answer = {}
        if not answer:
            answer = {"unavailable": f"its process ended with exit code {self._process.wait()}; short of memory?"}
        self.unavailable = answer.get("unavailable")
        if self.unavailable is not None:
            self.times_ms.clear()  # a side that fails half-way has no time
            self._process.wait()  # it is still busy clearing up, on the processors that the other side needs
        return answer


def _finished(side: Process, effort: Effort) -> bool:
    steps = len(side.times_ms)
    if side.unavailable is not None or steps >= effort.repetitions:
        return True
    return steps >= effort.fewest and sum(side.times_ms) >= 1e3 * effort.seconds


def median(times: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(times) if times else None


def quartiles(times: Sequence[float]) -> tuple[float, float] | None:
    """First and third quartile; None of nothing."""
    if not times:
        return None
    if len(times) == 1:
        return times[0], times[0]
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return first, third


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, tuple):
        return [_rounded(item) for item in value]
    return value
