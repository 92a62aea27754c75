"""The table of docs/situations.md: all of its rows were run, and a row that shows nothing is not green."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from situations import Row, Trial, all_rows  # noqa: E402
from situations.replicas import HOST as REPLICAS  # noqa: E402
from situations.trial import tried  # noqa: E402

from compressm import Compressor  # noqa: E402
from compressm.errors import InvalidRankRuleError  # noqa: E402

ROWS = all_rows()
STORED: list[dict[str, Any]] = json.loads((ROOT / "results" / "hosts.json").read_text(encoding="utf-8"))["rows"]
QUICK = ("AdamW", "compressor.step() after every accumulated batch", "averaged model that is not passed as a follower")


def _mark(index: int, row: Row) -> Any:
    """Some rows are run by default, every eighth with the slow tests, and the others on their own."""
    if row.situation in QUICK:
        return ()
    return pytest.mark.slow if index % 8 == 0 else pytest.mark.exhaustive


def test_every_row_was_run_and_works_or_is_refused() -> None:
    assert [(one["host"], one["situation"]) for one in STORED] == [(one.host, one.situation) for one in ROWS]
    assert len({(one["host"], one["situation"]) for one in STORED}) == len(STORED) >= 60
    for one in STORED:
        assert one["outcome"] in ("works", "refused"), one
        assert bool(one["because"]) is (one["outcome"] == "refused"), one
        assert one["outcome"] == "refused" or one["checks"] > 0, one


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(i, id=f"{one.host}: {one.situation}", marks=_mark(i, one))
        for i, one in enumerate(ROWS)
        if one.host != REPLICAS  # tests/training/test_replicas.py
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_row_ends_as_stored(index: int, tmp_path: Path) -> None:
    outcome, stored = tried(ROWS[index], tmp_path), STORED[index]
    assert (outcome.outcome, outcome.because) == (stored["outcome"], stored["because"])
    assert outcome.checks == stored["checks"]


def nothing(trial: Trial) -> None:
    """A row that trains, and checks nothing."""
    trial.loop(expect=False).history.clear()
    trial.checks = 0


def no_cut(trial: Trial) -> None:
    trial.check(True, "always")


def wrong(trial: Trial) -> None:
    trial.cut(trial.loop(), steps=(4, 5))


def late(trial: Trial) -> None:
    compressor: Compressor = trial.loop()
    trial.check(compressor.history, "no history")
    raise InvalidRankRuleError("too late")


@pytest.mark.parametrize(
    ("run", "because"),
    [
        (nothing, "the row shows nothing"),
        (no_cut, "1 checks and 0 cuts"),
        (wrong, r"AssertionError: cuts after steps [3, 6], expected [4, 5]"),
        (late, "late: too late"),
    ],
)
def test_a_row_that_shows_nothing_is_not_green(run: Any, because: str, tmp_path: Path) -> None:
    outcome = tried(Row("host", "situation", run), tmp_path)
    assert outcome.outcome == "failed"
    assert because in outcome.because
