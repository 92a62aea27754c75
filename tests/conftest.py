from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parent / "adapters"),
    str(Path(__file__).parent / "faults"),
]  # tests share `helpers` and `suite`

# Derandomized: the same examples in every run. No deadline: the first example pays for imports and thread pools.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", default=None, help="write what tests/test_families.py measures to this JSON file")
