"""codecarbon itself, offline, on this machine."""

from __future__ import annotations

import math
import time

import pytest

from compressm.errors import ConfigError
from compressm.lab.runs.energy import Energy

pytest.importorskip("codecarbon")


@pytest.mark.filterwarnings("ignore")  # codecarbon's own, about the machine's missing meters
def test_energy_of_some_work_is_estimated() -> None:
    with Energy("CHE") as energy:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            sum(range(10_000))
        part = energy.used(1)
        used = energy.used(3)
    assert part is not None
    assert used is not None
    assert used["kwh"] == pytest.approx(used["cpu_kwh"] + used["gpu_kwh"] + used["ram_kwh"])
    assert 0 < part["kwh"] <= used["kwh"] < 1e-2  # less than 24 kW
    assert math.isfinite(used["co2_kg"])
    assert used["steps"] == 3


@pytest.mark.filterwarnings("ignore")
def test_energy_of_a_resumed_run_is_that_of_all_its_processes() -> None:
    before = {"kwh": 1.0, "cpu_kwh": 0.5, "gpu_kwh": 0.25, "ram_kwh": 0.25, "co2_kg": 0.125, "steps": 3}
    energy = Energy("CHE")
    energy.resume(before, 3)
    with energy:
        time.sleep(0.3)
        used = energy.used(5)
    assert used is not None
    assert used["steps"] == 5
    assert all(used[name] >= value for name, value in before.items())
    assert 1 < used["kwh"] < 1.01
    unwatched = Energy(None)
    unwatched.resume(before, 3)
    assert unwatched.used(5) == before


def test_nothing_is_watched_unasked() -> None:
    with Energy(None) as energy:
        assert energy.used(5) is None


def test_unknown_countries_are_named() -> None:
    with pytest.raises(ConfigError, match=r"run\.energy = 'XYZ'"):
        Energy("XYZ")
