"""Two real, short runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from compressm.lab.config import parse_config
from compressm.lab.runs.loop import train
from compressm.training.cushion import CushionWarning


def config(**compression: Any) -> Any:
    return parse_config(
        {
            "data": {"name": "digits"},
            "model": {"d_model": 6, "d_state": 16, "n_layers": 2, "r_min": 0.9, "max_phase": 0.6},
            "optimizer": {"lr": 0.03},
            "compression": compression or {"enabled": False},
            "run": {
                "steps": 90, "batch_size": 20, "eval_every": 30, "checkpoint_every": 0, "spectrum_every": 30,
                "device": "cpu", "tensorboard": False,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with cuts of which one is undone, and one without."""
    folder = tmp_path_factory.mktemp("report")
    cutting = config(states=1, cuts=2, start=60, window=0.2, max_drop=0.0, check_after=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CushionWarning)  # accuracies of so few digits cannot resolve a max_drop of 0
        result = train(cutting, output=folder / "cut", quiet=True, command="compressm train digits")
    assert {"cut", "rolled_back"} <= {event["kind"] for event in result.history}
    train(config(), output=folder / "big", quiet=True)
    return folder
