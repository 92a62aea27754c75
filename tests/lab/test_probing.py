"""`compressm probe` on numbers, on text, and on a model of the user's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressm.cli import main
from compressm.lab import probing
from compressm.lab.config import load_config
from compressm.training.probe import Task

SHORT = ["data.examples=200", "data.max_length=40"]
QUICK = ["run.steps=1000", "run.batch_size=8", "run.device=cpu", "--steps", "20", "--states", "8,2", "--seeds", "2"]


def answer(arguments: list[str], folder: Path) -> dict[str, Any]:
    assert main(["probe", *arguments, *QUICK, "--json", str(folder / "answer.json")]) == 0
    return json.loads((folder / "answer.json").read_text())


def test_forecasts_are_compared_by_the_squared_error_of_each_series(tmp_path: Path) -> None:
    found = answer(["forecast", "model.d_model=4", *SHORT, "--output", str(tmp_path / "parts")], tmp_path)
    assert (found["metric"], found["mode"]) == ("squared error", "min")
    assert all(run["metric"] < run["before"] for run in found["runs"]), "every size learns"
    assert found["learnt"] > 0
    part = json.loads(next((tmp_path / "parts").glob("states*.json")).read_text())
    assert len(part["scores"]) > 10
    assert np.mean(part["scores"]) == pytest.approx(part["metric"], rel=1e-5)


def test_texts_are_compared_by_the_nats_of_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog on the log. " * 200)
    small = ["model.d_model=8", "model.n_layers=1", "data.max_length=32"]
    found = answer(["byte-lm", "--data", str(tmp_path / "text.txt"), *small], tmp_path)
    assert (found["metric"], found["mode"]) == ("nats a token", "min")
    assert all(run["metric"] < run["before"] for run in found["runs"])


MODEL = """
from torch import nn
from compressm.layers import SequenceRegressor

def build(d_input, states):
    return SequenceRegressor(d_input, 1, d_model=4, d_state=states)

def fixed(d_input):
    return build(d_input, 8)
"""


def test_a_model_of_ones_own_is_built_in_several_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probed_model.py").write_text(MODEL)
    x = np.random.default_rng(0).standard_normal((60, 10, 1)).astype(np.float32)
    np.savez(tmp_path / "sums.npz", x=x, y=x.sum((1, 2)))
    found = answer(["--model", "probed_model:build", "--data", "sums.npz"], tmp_path)
    assert [size["states"] for size in found["sizes"]] == [8, 2]
    assert found["sizes"][0]["parameters"] > found["sizes"][1]["parameters"]
    capsys.readouterr()
    assert main(["probe", "--model", "probed_model:fixed", "--data", "sums.npz"]) == 2
    assert "probed_model:fixed: has no argument states, and a probe builds models" in capsys.readouterr().err
    assert main(["probe", "--model", "probed_model:build", "--data", "sums.npz"]) == 2
    assert "give --states, such as --states 64,16,4" in capsys.readouterr().err
    assert main(["probe", "--model", "probed_model:build"]) == 2
    assert "CONFIG: missing" in capsys.readouterr().err


@pytest.mark.parametrize("autocast", ["bfloat16", "null"])
def test_a_probe_trains_in_the_precision_of_the_configuration(autocast: str) -> None:
    changes = [f"run.autocast={autocast}", "run.batch_size=4", "run.device=cpu", "model.d_model=4"]
    settings = load_config("digits", changes)
    bench = probing._Bench(settings)
    model, seen = bench.build(4), set[torch.dtype]()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    bench.train(model, Task(steps=2, seed=0, rate=1.0, states=4))
    assert seen == {torch.bfloat16 if autocast == "bfloat16" else torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("share", ["nan", "-1", "0", "2"])
def test_shares_of_no_training_are_refused_in_one_line(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "forecast", "--share", share]) == 2
    assert "share of run.steps in (0, 1]" in capsys.readouterr().err
