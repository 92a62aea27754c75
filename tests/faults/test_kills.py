"""Processes that end at an instant of somebody else's choice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import SETTINGS, STEPS, Record, Training, finish, instants, outcome

KILLS = int(os.environ.get("KILLS", "4"))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(KILLS))
def test_killed_at_a_random_instant(index: int, tmp_path: Path, truth: list[bytes], tried: Record) -> None:
    folder, instant = tmp_path / "run", instants(KILLS, _seconds(truth, tmp_path))[index]
    run = Training(folder)
    run.wait_for(1)
    time.sleep(instant)
    run.process.kill()
    code, reached = run.end(), run.step
    assert code in (-signal.SIGKILL, 0)
    resumed = finish(folder)
    assert outcome(folder) == truth
    tried("SIGKILL at a random instant", lost=[max(0, reached - resumed)])


_TIMES: list[float] = []


def _seconds(truth: list[bytes], tmp_path: Path) -> float:
    """How long a run takes from its first step to its last, at present."""
    if not _TIMES:
        run = Training(tmp_path / "timed")
        run.wait_for(1)
        started = time.monotonic()
        run.wait_for(STEPS)
        _TIMES.append(time.monotonic() - started)
        assert run.end() == 0
        assert outcome(tmp_path / "timed") == truth
    return _TIMES[0]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_asked_to_end(number: int, code: int, tmp_path: Path, truth: list[bytes], tried: Record) -> None:
    folder = tmp_path / "run"
    run = Training(folder)
    run.wait_for(STEPS // 2)
    os.kill(run.process.pid, number)  # type: ignore[arg-type]
    assert run.end() == code, run.said()
    assert "Traceback" not in run.said()
    lost = run.step - finish(folder)
    assert outcome(folder) == truth
    tried("Ctrl-C and SIGTERM", lost=[lost])


@pytest.mark.slow
def test_a_worker_of_two_dies(tmp_path: Path, tried: Record) -> None:
    """The other does not wait for ever, and the pair goes on from its checkpoint."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**SETTINGS, "run": {**SETTINGS["run"], "log_every": 0}}))

    def launch(output: str) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        arguments = ["-m", "compressm.cli", "train", str(config), "--resume", "--output", str(tmp_path / output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*launcher, *arguments], stderr=subprocess.DEVNULL, env=environment)

    whole = launch("unbroken")
    assert whole.wait(200) == 0
    pair = launch("broken")
    while pair.poll() is None and not list(tmp_path.glob("broken/checkpoints/*/state.json")):
        time.sleep(0.01)
    children = Path(f"/proc/{pair.pid}/task/{pair.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert pair.wait(100) != 0
    resumed = launch("broken")
    assert resumed.wait(200) == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "unbroken")
    tried("a worker of two is killed (DDP)")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, truth: list[bytes]) -> None:
    again = Training(tmp_path / "again")
    assert again.end() == 0, again.said()
    assert outcome(tmp_path / "again") == truth
