"""Scores in the numbers that tables show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from compressm.lab.reproduce.scale import scale


@pytest.mark.parametrize(("metric", "score"), [("accuracy", 0.875), ("r2", 0.875), ("fit", 87.5)])
def test_shares_are_shown_in_percent(metric: str, score: float) -> None:
    run: Any = SimpleNamespace(metric=metric)
    of = scale([run])
    assert (of.unit, of.shown(score), of.worth(score)) == (" %", 87.5, 87.5)
