from __future__ import annotations

import gc
import random
import sys
import zlib
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from compressm.runtime import compiled_graphs

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parent / "adapters"),
    str(Path(__file__).parent / "faults"),
    str(Path(__file__).parent / "theory"),
    str(Path(__file__).parent / "cutting"),
]  # tests share `helpers` and `suite`

# Derandomized, so that every run has the same examples. No deadline, since the first example includes imports.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", default=None, help="write what tests/test_families.py measures to this JSON file")
    parser.addoption("--share", default=None, help="K/N: of the chosen tests, the K-th of N parts, from 0; by name")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one part of the tests. Which part a test is in depends on nothing but its name."""
    share = config.getoption("--share")
    if share is None:
        return
    part, parts = (int(number) for number in share.split("/"))
    if not 0 <= part < parts:
        raise pytest.UsageError(f"--share {share}: expected K/N with 0 <= K < N")
    kept = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts == part]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.fixture(autouse=True)
def _nothing_is_observed_any_more() -> Generator[None]:
    """Collect what still waits to observe a model, since compiled code runs eagerly as long as it does."""
    yield
    if compiled_graphs._paused:  # pyright: ignore[reportPrivateUsage]
        gc.collect()


@pytest.fixture(autouse=True)
def _same_draws_in_any_order() -> None:
    """Seed the global generators, so that random numbers of a test do not depend on the tests before it."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - users' code may draw from the global generator
    random.seed(0)
