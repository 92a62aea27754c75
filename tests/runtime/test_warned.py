"""Warnings show the user's line, also where functions of PyTorch or of the user lie between those of the package."""

from __future__ import annotations

import linecache
import warnings

import pytest
import torch
from torch import nn

import compressm
from compressm.cutting import state_dims
from compressm.layers import SequenceClassifier
from compressm.training.cushion import CushionWarning
from compressm.training.goal import GoalWarning


def line(caught: warnings.WarningMessage) -> str:
    assert caught.filename == __file__
    return linecache.getline(caught.filename, caught.lineno).strip()


def built(**options: object) -> tuple[nn.Module, torch.optim.Optimizer, compressm.Compressor]:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 2, 4, 16, r_min=0.9)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    return model, optimizer, compressm.Compressor(model, optimizer, 40, window=0.5, **options)  # type: ignore[arg-type]


def test_a_size_that_the_model_has() -> None:
    with pytest.warns(GoalWarning, match="states=16 cuts nothing: there are 16 states a layer already") as caught:
        built(states=16)
    assert line(caught[0]).startswith("return model, optimizer, compressm.Compressor(")


def test_no_more_cuts() -> None:
    def evaluate(model: nn.Module) -> float:
        return 1.0 if state_dims(model)["blocks.0.ssm"] == 16 else 0.0

    model, optimizer, compressor = built(states=4, evaluate=evaluate, max_drop=0.01, rewind=False)

    def train() -> None:
        for _ in range(40):
            model(torch.randn(2, 8, 1)).sum().backward()
            optimizer.step()
            compressor.step()

    with pytest.warns(CushionWarning, match="no more cuts") as caught:
        train()
    assert line(caught[0]) == "compressor.step()"
