"""Tables that benchmarks write into pages are those of the stored results."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "rows"), [("cushion", "rows"), ("max_drop", "rows"), ("one_currency", "cuts"), ("tutorial", "runs")]
)
def test_a_page_has_the_stored_table(name: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module(name)
    stored = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))[rows]
    page = benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.with_table(page, stored) == page
