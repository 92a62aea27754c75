"""The table of faults: what was tried, what came of it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Record, Training, outcome

from compressm import __version__


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Record:
    """``tried(fault, count, lost=[...])``: that a fault was made so many times, and how many steps were made again.

    Called after the checks, so that what is in the table was survived.
    """

    def record(fault: str, count: int = 1, lost: list[int] | None = None, stopped: bool = False) -> None:
        record_property("fault", {"fault": fault, "count": count, "lost": lost or [], "stopped": stopped})

    return record


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to: it has cuts that are kept and cuts that are rolled back."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run = Training(folder)
    assert run.end() == 0, run.said()
    kinds = {event["kind"] for event in json.loads((folder / "result.json").read_text())["history"]}
    assert {"cut", "kept", "rolled_back"} <= kinds
    return folder


@pytest.fixture(scope="session")
def truth(unbroken: Path) -> list[bytes]:
    """What every run must end with."""
    return outcome(unbroken)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STARTED] = time.time()


_STARTED = pytest.StashKey[float]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows: dict[str, dict[str, Any]] = {}
    broken = 0
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", None) != "call":
            continue
        broken += report.failed
        for name, value in report.user_properties:
            if name == "fault":
                row = rows.setdefault(value["fault"], {"fault": value["fault"], "tried": 0, "stopped": 0, "lost": []})
                row["tried"] += value["count"]
                row["stopped"] += value["count"] * value["stopped"]
                row["lost"] += value["lost"]
    if not rows:
        return
    write = terminalreporter.write_line
    write("")
    write(f"{'fault':58}{'tried':>7}{'went on':>9}{'stopped in':>12}{'steps made again':>18}")
    write(f"{'':58}{'':>7}{'':>9}{'one line':>12}{'mean (most)':>18}")
    for row in rows.values():
        lost = row["lost"]
        again = f"{sum(lost) / len(lost):.1f} ({max(lost)})" if lost else ""
        write(f"{row['fault']:58}{row['tried']:7}{row['tried'] - row['stopped']:9}{row['stopped']:12}{again:>18}")
    total = sum(row["tried"] for row in rows.values())
    write(f"{total} faults, {broken} tests failed, 0 corrupted results" if not broken else f"{broken} tests FAILED")
    if os.environ.get("FAULTS_JSON") and not broken:
        versions = {"compressm": __version__, "torch": torch.__version__, "python": platform.python_version()}
        content = {
            "command": f"make test-faults KILLS={os.environ.get('KILLS', '')}",
            "versions": versions,
            "seconds": round(time.time() - config.stash[_STARTED], 1),
            "corrupted_results": broken,
            "faults": list(rows.values()),
        }
        Path(os.environ["FAULTS_JSON"]).write_text(json.dumps(content, indent=1) + "\n")
