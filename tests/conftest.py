from __future__ import annotations

import gc
import random
import sys
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

import shares  # noqa: E402

# Derandomized, so that every run has the same examples. No deadline, since the first example includes imports.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", default=None, help="write what tests/test_families.py measures to this JSON file")
    parser.addoption("--share", default=None, help="K/N: of the chosen tests, the K-th of N equally long parts, from 0")
    parser.addoption("--write-durations", action="store_true", help="store how long each file took, for --share")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--share"):
        config.pluginmanager.register(shares.Share(config.getoption("--share")))
    if config.getoption("--write-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(shares.Stopwatch())


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the garbage collector forget what importing the tests made, hundreds of thousands of objects that stay.

    Each of its later collections would search them all, and so would every `Compressor`, which looks among all objects
    for averaged copies of its model.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


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
