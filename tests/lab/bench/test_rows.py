"""A row's arithmetic, and its processes: sides of known duration and memory, written here."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import pytest
import torch

from compressm.lab.bench.roofline import Rates, Work
from compressm.lab.bench.rows import Case, Effort, Row, Side, compare, quartiles
from compressm.lab.bench.worker import Step

RATES = Rates(gflops=1.0, gexps=1.0, gbytes=1.0)
BRIEF = Effort(3, 1, 1.0)


def sleeping(seconds: float) -> Step:
    return lambda: time.sleep(seconds)


def holding(megabytes: int) -> Step:
    return lambda: bytearray(os.urandom(1)) * (megabytes * 10**6)


def failing(after: int) -> Step:
    calls = iter(range(after))

    def step() -> None:
        if next(calls, None) is None:
            raise MemoryError("no more")

    return step


def dying() -> Step:
    os._exit(9)


def missing() -> Step:
    raise ModuleNotFoundError("No module named 'jax'", name="jax")


def printing() -> Step:
    return lambda: print("a library that talks")


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch):
    """Measures our side against a peer; both are functions of this module."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))

    def measured(ours: Side, peer: Side, effort: Effort = BRIEF) -> Row:
        return compare(Case("suite/row", ours, "somebody", peer, Work(flops=2e6)), RATES, effort, 1, None)

    return measured


def side(name: str, **arguments: object) -> Side:
    return Side(f"test_rows:{name}", arguments)


def test_times_ratio_and_limit(row) -> None:
    result: Row = row(side("sleeping", seconds=0.05), side("sleeping", seconds=0.2), Effort(5, 2, 30.0))
    assert 50 <= result.ours_ms < 150 < 200 <= result.peer_ms  # a busy machine sleeps longer, never shorter
    assert result.ratio == pytest.approx(result.peer_ms / result.ours_ms)
    assert result.roofline_ms == pytest.approx(2.0)
    assert result.of_roofline == pytest.approx(result.ours_ms / 2.0)
    assert result.repetitions >= 5
    assert result.peer_repetitions >= 5
    first, third = result.ours_quartiles_ms
    assert first <= result.ours_ms <= third
    assert result.reason is None


@pytest.mark.slow
def test_slow_sides_get_fewer_repetitions(row) -> None:
    result = row(side("sleeping", seconds=0.01), side("sleeping", seconds=0.3), Effort(30, 2, 0.5))
    assert result.repetitions >= 30
    assert result.peer_repetitions == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_each_process_alone(row) -> None:
    result = row(side("holding", megabytes=300), side("holding", megabytes=50))
    assert result.peak_mb == pytest.approx(300, abs=20)
    assert result.peer_peak_mb == pytest.approx(50, abs=20)


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        pytest.param(
            side("missing"),
            'peer: jax is not installed: pip install "compressm[bench]"',
            marks=pytest.mark.slow,
        ),
        (side("failing", after=3), "peer: MemoryError: no more"),
        pytest.param(side("failing", after=0), "peer: MemoryError: no more", marks=pytest.mark.slow),
        pytest.param(
            side("dying"), "peer: its process ended with exit code 9; short of memory?", marks=pytest.mark.slow
        ),
    ],
    ids=["not installed", "fails later", "fails at once", "killed"],
)
def test_a_peer_that_cannot_run_leaves_a_reason(row, peer: Side, reason: str) -> None:
    result: Row = row(side("sleeping", seconds=0.01), peer, Effort(25, 25, 1.0))
    assert result.reason == reason
    assert result.ours_ms is not None
    assert result.peer_ms is None
    assert result.peer_quartiles_ms is None
    assert result.ratio is None
    assert result.peer_peak_mb is None


@pytest.mark.slow
def test_what_libraries_print_does_not_disturb(row) -> None:
    assert row(side("printing"), side("printing")).ratio is not None


def test_quartiles() -> None:
    assert quartiles([]) is None
    assert quartiles([7.0]) == (7.0, 7.0)
    times = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert quartiles(times) == (2.0, 4.0)
    assert quartiles(times)[0] <= statistics.median(times) <= quartiles(times)[1]


@pytest.mark.usefixtures("row")  # so that the processes find this module
def test_threads_and_processors_are_limited() -> None:
    one = sorted(os.sched_getaffinity(0))[:1] if hasattr(os, "sched_getaffinity") else None
    limit = side("limited", processors=one and 1)
    result = compare(Case("suite/row", limit, "same", limit, Work(flops=1.0)), RATES, BRIEF, threads=1, cpus=one)
    assert result.reason is None


def limited(processors: int | None) -> Step:
    if torch.get_num_threads() != 1:
        raise RuntimeError(f"{torch.get_num_threads()} threads")
    if processors is not None and len(os.sched_getaffinity(0)) != processors:
        raise RuntimeError(f"{os.sched_getaffinity(0)}")
    return lambda: None
