"""codecarbon itself, offline, on this machine."""

from __future__ import annotations

import math
import time

import pytest

from compressm.errors import ConfigError
from compressm.training.energy import Energy

pytest.importorskip("codecarbon")


@pytest.mark.filterwarnings("ignore")  # codecarbon's own, about the machine's missing meters
def test_energy_of_some_work_is_estimated() -> None:
    with Energy("CHE") as energy:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            sum(range(10_000))
        used = energy.used(steps=3)
    assert used is not None
    assert used["kwh"] == pytest.approx(used["cpu_kwh"] + used["gpu_kwh"] + used["ram_kwh"])
    assert 0 < used["kwh"] < 1e-2  # less than 24 kW
    assert math.isfinite(used["co2_kg"])
    assert used["steps"] == 3


def test_nothing_is_watched_unasked() -> None:
    with Energy(None) as energy:
        assert energy.used(5) is None


def test_unknown_countries_are_named() -> None:
    with pytest.raises(ConfigError, match=r"run\.energy = 'XYZ'"):
        Energy("XYZ")
