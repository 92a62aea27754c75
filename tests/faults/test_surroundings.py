"""Disks that are full, folders that cannot be written, memory that ends, clocks that jump."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from harness import STEPS, Record, Training, finish, outcome

from helpers import newest_checkpoint


@contextmanager
def small_disk(folder: Path, size: str = "3m") -> Generator[Path]:
    """A file system of its own in memory; only root may mount one."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a disk of its own needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk(tmp_path: Path, truth: list[bytes], tried: Record) -> None:
    with small_disk(tmp_path / "disk") as disk:
        folder, filler = disk / "run", disk / "filler"
        run = Training(folder)
        run.wait_for(STEPS // 2)
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:  # until there is no byte left
                file.write(bytes(4096))
        assert run.end() == 2, run.said()
        assert "cannot be written" in run.error() or "cannot write a checkpoint" in run.error()
        filler.unlink()
        lost = run.step - finish(folder)
        assert outcome(folder) == truth
    tried("full disk", lost=[lost], stopped=True)


@pytest.mark.slow
def test_file_size_limit(tmp_path: Path, truth: list[bytes], tried: Record) -> None:
    """A quota, as it shows to a process: writing fails beyond some size."""
    folder = tmp_path / "run"
    run = Training(folder, sabotage=_limit_files)
    assert run.end() == 2, run.said()
    assert "cannot write a checkpoint" in run.error()
    finish(folder)
    assert outcome(folder) == truth
    tried("quota", stopped=True)


def _limit_files() -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.slow
def test_folder_becomes_read_only(tmp_path: Path, truth: list[bytes], tried: Record) -> None:
    with small_disk(tmp_path / "disk", "20m") as disk:
        run = Training(disk / "run")
        run.wait_for(STEPS // 2)
        remount = ["mount", "-o", "remount,ro", str(disk)]
        while subprocess.run(remount, capture_output=True, check=False).returncode and run.process.is_alive():
            pass  # busy, as something is just being written
        assert run.end() == 2, run.said()
        assert "cannot write a checkpoint" in run.error()
        shutil.copytree(disk / "run", tmp_path / "run")
    lost = run.step - finish(tmp_path / "run")
    assert outcome(tmp_path / "run") == truth
    tried("folder becomes read-only", lost=[lost], stopped=True)


@pytest.mark.slow
def test_out_of_memory(tmp_path: Path, truth: list[bytes], tried: Record) -> None:
    folder = tmp_path / "run"
    run = Training(folder, sabotage=_limit_memory)
    assert run.end() == 2, run.said()
    assert "out of memory at step" in run.error()
    assert newest_checkpoint(folder).name == "step-00000040"
    lost = run.step - finish(folder)
    assert outcome(folder) == truth
    tried("out of memory", lost=[lost], stopped=True)


def _limit_memory() -> None:
    """At step 42 all memory that this process may have is taken."""
    from compressm.lab.runs import loop

    real = loop._Run._train_step

    def starved(run: loop._Run) -> None:
        if run.step == 41:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used, used))
            taken = []
            try:
                while True:
                    taken.append(bytearray(2**14))
            except MemoryError:
                real(run)
        real(run)

    loop._Run._train_step = starved  # type: ignore[method-assign]


@pytest.mark.slow
def test_clock_jumps(tmp_path: Path, truth: list[bytes], tried: Record) -> None:
    run = Training(tmp_path / "run", sabotage=_jumping_clock)
    assert run.end() == 0, run.said()
    assert outcome(tmp_path / "run") == truth
    tried("the clock jumps by years, back and forth")


def _jumping_clock() -> None:
    draw = random.Random(0)
    time.time = lambda: draw.uniform(0, 4e9)
    time.time_ns = lambda: int(draw.uniform(0, 4e18))
