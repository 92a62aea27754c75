"""What is minimised, in real runs on the embedded data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressm.adapters import find_layers
from compressm.adapters.base import Adapter
from compressm.adapters.changes import layer_values
from compressm.errors import ConfigError
from compressm.lab.config import Config, parse_config
from compressm.lab.runs.loop import train
from compressm.saving.checkpoint import load
from compressm.theory import balancing


def config(layer: str = "lru", **loss: Any) -> Config:
    return parse_config(
        {
            "data": {"name": "digits"},
            "model": {"d_model": 6, "d_state": 12, "layer": layer},
            "optimizer": {"lr": 0.01},
            "loss": loss,
            "compression": {"enabled": False},
            "run": {"steps": 20, "eval_every": 10, "checkpoint_every": 10, "device": "cpu", "tensorboard": False},
        }
    )


def hankel_norm(folder: Path) -> float:
    ((layer, adapter),) = find_layers(load(folder / "model")).values()
    assert isinstance(adapter, Adapter)
    return float(balancing.balance(adapter.read(layer_values(layer)), "complex").hsv.sum())


def test_the_hankel_norm_is_pressed_down_also_by_rare_steps(tmp_path: Path) -> None:
    for name, loss in {
        "plain": {},
        "each": {"hankel_norm": 0.1},
        "rare": {"hankel_norm": 0.1, "hankel_every": 4},
    }.items():
        train(config(**loss), output=tmp_path / name, quiet=True)
    plain, each, rare = (hankel_norm(tmp_path / name) for name in ("plain", "each", "rare"))
    assert each < 0.9 * plain
    assert rare < 0.9 * plain


def test_a_teacher_of_another_kind_of_data(tmp_path: Path) -> None:
    from compressm.layers import SequenceClassifier
    from compressm.saving.checkpoint import save

    torch.manual_seed(0)
    save(SequenceClassifier(1, 7, d_model=4, d_state=4), tmp_path / "teacher")
    with pytest.raises(ConfigError, match=r"loss.teacher = .*gives 7 logits, the model 10"):
        train(config(teacher=str(tmp_path / "teacher")), output=tmp_path / "run", quiet=True)


def test_no_teacher_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss.teacher = .*no model there"):
        train(config(teacher=str(tmp_path / "none")), output=tmp_path / "run", quiet=True)


def test_the_hankel_norm_is_one_of_linear_systems() -> None:
    with pytest.raises(ConfigError, match=r"loss.hankel_norm = 0.1: is for layer lru, not mamba"):
        config("mamba", hankel_norm=0.1)
