"""How often the cushion blames noise, and how often it misses damage: plays on stored trainings without cuts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS, CURVES = ROOT / "results" / "cushion.json", ROOT / "results" / "cushion_curves.npz"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import cushion
    finally:
        sys.path.pop(0)
    return cushion


def test_the_stored_plays_keep_what_is_promised(benchmark: Any) -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    nothing, damage = (benchmark.totals(rows, cut=kind) for kind in ("nothing", "damage"))
    assert nothing["runs"] == 40 * 2 * 2 * 3 * 3  # windows, ways to evaluate, samples, max_drop
    for samples in benchmark.SAMPLES:
        for drop in benchmark.DROPS:
            one = benchmark.totals(rows, cut="nothing", samples=samples, max_drop=drop)
            assert one["undone"] <= 0.05 * one["cuts"]
            assert one["gave_up"] == 0
    assert damage["damaged_undone"] >= 0.95 * damage["damaged"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("pairs", [False, True])
def test_plays_give_what_is_stored(benchmark: Any, pairs: bool) -> None:
    """All forty trainings at one number of samples and one max_drop; the others are in the stored table."""
    rows = benchmark.plays(CURVES, pairs=(pairs,), samples=(500,), drops=(0.01,), kinds=("nothing", "damage"))
    nothing, damage = (benchmark.totals(rows, cut=kind) for kind in ("nothing", "damage"))
    assert nothing["runs"] == damage["damaged"] == 80
    assert nothing["undone"] <= 0.05 * nothing["cuts"]
    assert nothing["gave_up"] == 0
    assert damage["damaged_undone"] >= 0.95 * damage["damaged"]


@pytest.mark.slow
def test_a_few_plays_on_real_trainings(benchmark: Any) -> None:
    rows = benchmark.plays(
        CURVES, ["fsdd-2", "smnist-4"], pairs=(True,), samples=(500,), drops=(0.02,), kinds=("nothing", "damage")
    )
    nothing, damage = (benchmark.totals(rows, cut=kind) for kind in ("nothing", "damage"))
    assert (nothing["cuts"], nothing["undone"]) == (16, 0)
    assert damage["damaged_undone"] == damage["damaged"] == 4
