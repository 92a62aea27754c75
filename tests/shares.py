"""Parts of the tests that take about the same time, by the seconds that each file's slow tests took.

A file is a unit, since its tests share what takes longest to set up.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

STORED = Path(__file__).with_name("durations.json")


def stored() -> dict[str, int]:
    """Seconds of the slow tests of each file, by its path from the repository's root."""
    return json.loads(STORED.read_text(encoding="utf-8"))


def part_of(file: str, seconds: Mapping[str, float], parts: int) -> int:
    """The part that a file's tests belong to, from 0. It depends on the file's name and the stored seconds alone.

    Files are dealt out from the longest to the shortest, each to the part that is the shortest so far. A file without
    a duration goes where a checksum of its name says.
    """
    if file not in seconds:
        return zlib.crc32(file.encode()) % parts
    lengths = [0.0] * parts
    for name in sorted(seconds, key=lambda name: (-seconds[name], name)):
        shortest = lengths.index(min(lengths))
        if name == file:
            return shortest
        lengths[shortest] += seconds[name]
    raise AssertionError("unreachable")


class Share:
    """A plugin that keeps one part of the tests, given as ``K/N``: the K-th of N, from 0."""

    def __init__(self, share: str) -> None:
        part, parts = (int(number) for number in share.split("/"))
        if not 0 <= part < parts:
            raise pytest.UsageError(f"--share {share}: expected K/N with 0 <= K < N")
        seconds = stored()
        self._holds = cache(lambda file: part_of(file, seconds, parts) == part)

    def pytest_ignore_collect(self, collection_path: Path, config: pytest.Config) -> bool | None:
        """Files of other parts are not even imported."""
        if collection_path.suffix != ".py":
            return None
        return None if self._holds(collection_path.relative_to(config.rootpath).as_posix()) else True

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Files that were given by name are imported all the same."""
        others = [item for item in items if not self._holds(file_of(item.nodeid))]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


class Stopwatch:
    """A plugin that stores how long the tests of each file took, in place of what was stored for that file."""

    def __init__(self) -> None:
        self._seconds = defaultdict[str, float](float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        measured = {file: round(seconds) for file, seconds in self._seconds.items()}
        kept = {file: seconds for file, seconds in stored().items() if (STORED.parents[1] / file).exists()}
        content = dict(sorted({**kept, **measured}.items()))
        STORED.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]
