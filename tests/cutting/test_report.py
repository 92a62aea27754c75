"""Reports of cuts: the table that is printed, and what is stored."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from compressm.cutting.report import LayerReport, Report
from compressm.theory.certificate import Certificate
from compressm.theory.recurrence import ErrorEstimate

CERTIFICATE = Certificate(
    states_before=64, states_after=16, bound=0.5, hinf_error=0.25, hinf_frequency=1.5, h2_error=0.02, h2_norm=2.0,
    spectral_radius=0.99, condition=3.0,
)  # fmt: skip
LINEAR = LayerReport(
    "blocks.0.ssm", 64, 16, "cut", "", CERTIFICATE, (3.0, 1.23456789, 1e-9), energy_kept=0.98, error_on_data=0.0125,
    poles_before=(0.123456 + 0.5j, -1j), poles_after=(0.99999,),
)  # fmt: skip
SELECTIVE = LayerReport(
    "blocks.1.ssm", 8, 5, "cut", "", ErrorEstimate(8, 5, 0.0625, 0.03125), (1.0,), 0.9, 0.1, 0.2
)  # fmt: skip
KEPT = LayerReport("head", 8, 8, "kept", "the rule keeps all 8 states", None, (1.0,))
REFUSED = LayerReport("other", 8, 8, "refused", "it is unstable", CERTIFICATE, (1.0,))


def test_the_table_has_a_row_per_layer_with_numbers_below_their_titles() -> None:
    title, *rows = str(Report((LINEAR, SELECTIVE, KEPT, REFUSED), 1.5)).split("\n")
    names = ["layer", "states", "on data", "held out", "expected", "H∞ error", "bound", "outcome"]
    ends = [title.index(name) + len(name) for name in names]
    assert [title[:end].endswith(name) for name, end in zip(names, ends, strict=True)] == [True] * 8

    def cells(row: str) -> list[str]:
        """The entries of the columns of numbers, right-aligned below their titles, and the outcome."""
        found = [row[:32].rstrip(), row[32 : ends[1]].strip()]
        found += [row[before:end].strip() for before, end in pairwise(ends[1:7])]
        return [*found, row[title.index("outcome") :]]

    assert [cells(row) for row in rows] == [
        ["blocks.0.ssm", "64 → 16", "1.25e-02", "", "1.00e-02", "2.500e-01", "5.000e-01", "cut"],
        ["blocks.1.ssm", "8 → 5", "1.00e-01", "2.00e-01", "6.25e-02", "", "", "cut"],
        ["head", "8 → 8", "", "", "", "", "", "kept: the rule keeps all 8 states"],
        ["other", "8 → 8", "", "", "1.00e-02", "2.500e-01", "5.000e-01", "refused: it is unstable"],
    ]


def test_a_report_says_what_the_model_is_now() -> None:
    report = Report((LINEAR, KEPT), 1.5)
    assert report.cut
    assert not Report((KEPT, REFUSED), 0.0).cut
    assert not Report((), 0.0).cut
    assert report.state_dims == {"blocks.0.ssm": 16, "head": 8}


def test_what_is_stored_is_plain_and_short() -> None:
    stored: dict[str, Any] = json.loads(json.dumps(Report((LINEAR, SELECTIVE, KEPT), 1.5).to_dict()))
    assert stored["seconds"] == 1.5
    linear, selective, kept = stored["layers"]
    assert linear["hsv"] == [3.0, 1.23457, 1e-9]
    assert linear["poles_before"] == [[0.1235, 0.5], [0.0, -1.0]]
    assert linear["poles_after"] == [[1.0, 0.0]]
    assert linear["certificate"] == {**CERTIFICATE.to_dict(), "failures": []}
    assert linear["certificate"]["relative_h2_error"] == pytest.approx(0.01)
    assert (linear["energy_kept"], linear["error_on_data"], linear["error_held_out"]) == (0.98, 0.0125, None)
    assert selective["certificate"]["least_error"] == 0.03125
    assert (selective["error_on_data"], selective["error_held_out"]) == (0.1, 0.2)
    assert kept["certificate"] is None
    assert (kept["outcome"], kept["states_before"], kept["states_after"]) == ("kept", 8, 8)
    names = {
        "name", "states_before", "states_after", "outcome", "reason", "certificate", "hsv", "energy_kept",
        "error_on_data", "error_held_out", "poles_before", "poles_after", "predicted_loss", "matched",
    }  # fmt: skip
    assert all(layer.keys() == names for layer in stored["layers"])
