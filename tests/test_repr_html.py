"""What notebooks and `print` show of spectra, reports, plans, savings and compressors."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch
from torch import nn

import compressm
from compressm.cutting import plan_reduction
from compressm.layers import SequenceClassifier
from compressm.runtime.html import table
from compressm.theory.rank_rule import RankRule
from compressm.training.clock import Savings
from compressm.training.history import history_line


def cells(shown: Any) -> list[list[str]]:
    """The rows of the table in a notebook's cell, which must be well-formed."""
    tree = ET.fromstring(f"<root>{shown._repr_html_()}</root>")
    return [[cell.text or "" for cell in row] for row in tree.iter("tr")]


def classifier() -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(1, 3, d_model=4, d_state=8)


def test_spectrum_report_and_plan() -> None:
    model = classifier()
    spectrum = compressm.analyze(model)
    (layer,) = spectrum
    counts = [str(layer.states_for(tolerance)) for tolerance in (0.1, 0.01, 0.001)]
    assert cells(spectrum)[1] == ["blocks.0.ssm", "8", *counts]
    plan = plan_reduction(model, RankRule(states=3))
    assert "nothing is written" in plan._repr_html_()
    report = plan.apply(model)
    assert cells(plan) == cells(report)
    row = cells(report)[1]
    assert row[:2] == ["blocks.0.ssm", "8 → 3"]
    assert float(row[5]) == pytest.approx(report.layers[0].certificate.hinf_error, rel=1e-2)  # type: ignore[union-attr]
    assert row[-1] == "cut"


def test_compressor_and_savings() -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compressor = compressm.Compressor(model, optimizer, total_steps=4, states=3, cuts=1, window=0.25)
    assert "No cut yet." in compressor._repr_html_()
    nn.functional.cross_entropy(model(torch.randn(4, 9, 1)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    compressor.step()
    assert cells(compressor)[1][0] == "1"
    assert "Compressor after 1 steps: blocks.0.ssm 3" in compressor._repr_html_()
    made = Savings(10, 2.0, 5.0, 0.1, 3.0, flops=100, flops_if_big=400)
    assert cells(made)[1:] == [["seconds", "2", "5", "2.5"], ["operations", "100", "400", "4"]]


def test_nothing_in_a_name_becomes_markup() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    shown = table(hostile, [hostile], [[hostile]], [hostile])
    assert "<img" not in shown
    assert shown.count("&lt;img") == 4


def test_a_compressor_says_where_it_is() -> None:
    """`print(compressor)` in a training loop: the step, the cuts that are due, the states of the layers in order."""
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, d_model=4, d_state=8, n_layers=3)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    compressor = compressm.Compressor(model, optimizer, 1000, states=3, cuts=2, window=0.004)
    assert repr(compressor) == "Compressor(step 0 of 1,000; cuts due at 2, 4; 3 layers of 8 states)"
    for _ in range(2):
        model(torch.randn(2, 5, 1)).sum().backward()
        optimizer.step()
        compressor.step()
    (first,) = set(compressor.state_dims.values())
    assert repr(compressor) == f"Compressor(step 2 of 1,000; cuts due at 4; 3 layers of {first} states)"
    for _ in range(2):
        model(torch.randn(2, 5, 1)).sum().backward()
        optimizer.step()
        compressor.step()
    assert repr(compressor) == "Compressor(step 4 of 1,000; no cut due; 3 layers of 3 states)"
    assert history_line(0, 9, (), {"a": 4, "b": 4, "c": 2, "d": 4}) == (
        "step 0 of 9; no cut due; 2 layers of 4 states, 1 layer of 2 states, 1 layer of 4 states"
    )
