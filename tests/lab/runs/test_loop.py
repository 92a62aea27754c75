from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from compressm.cutting.optimizers import Together
from compressm.errors import CheckpointError, ConfigError
from compressm.lab.config import Config, parse_config
from compressm.lab.data.datasets import BatchOrder, load_data
from compressm.lab.runs.loop import train
from compressm.lab.runs.models import build_model, build_optimizer, build_scheduler, learning_rate_factor
from compressm.layers import SequenceClassifier
from compressm.saving.checkpoint import load, load_tree
from compressm.training.compressor import Compressor
from compressm.training.history import Event
from helpers import forkserver, newest_checkpoint

# Accuracies of so few digits cannot resolve a max_drop of 0, and setbacks end the cutting.
pytestmark = pytest.mark.filterwarnings("ignore::compressm.training.cushion.CushionWarning")

# 53 batches an epoch; cuts after steps 6 and 12; checkpoints after every 4 steps.
TINY: dict[str, Any] = {
    "data": {"name": "digits", "validation": 0.25},
    "model": {"d_model": 6, "d_state": 16},
    "optimizer": {"lr": 0.01, "ssm_lr_factor": 0.5, "max_grad_norm": 1.0},
    "schedule": {"name": "cosine"},
    "compression": {"tolerance": 0.2, "cuts": 2, "window": 0.5},
    "run": {
        "steps": 24,
        "batch_size": 20,
        "eval_every": 8,
        "checkpoint_every": 4,
        "device": "cpu",
        "tensorboard": False,
    },
}
# Cuts down to one state after steps 69 and 78, late enough to hurt, and nothing may be lost: every test that uses it
# checks that there was a roll-back.
SETBACK: dict[str, Any] = {
    "model": {"r_min": 0.9, "max_phase": 0.6},  # learns something within 60 steps
    "optimizer": {"lr": 0.03},
    "compression": {"states": 1, "cuts": 2, "start": 60, "window": 0.2, "max_drop": 0.0, "check_after": 3},
    "run": {"steps": 90, "checkpoint_every": 5},
}


def config(changes: dict[str, dict[str, Any]] | None = None) -> Config:
    """The tiny configuration with some keys changed; a compression section is replaced as a whole."""
    changes = changes or {}
    return parse_config(
        {s: changes[s] if s == "compression" and s in changes else {**v, **changes.get(s, {})} for s, v in TINY.items()}
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train(config(), output=folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def unbroken_setback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("setback")
    train(config(SETBACK), output=folder, quiet=True)
    return folder


def state_bytes(folder: Path) -> list[bytes]:
    """Model, optimizer, compressor and random state at the end, and the model that was the result."""
    paths = (newest_checkpoint(folder) / "state.safetensors", folder / "model" / "model.safetensors")
    return [path.read_bytes() for path in paths]


def assert_same_outcome(folder: Path, reference: Path) -> None:
    assert state_bytes(folder) == state_bytes(reference)
    ours, theirs = (json.loads((path / "result.json").read_text()) for path in (folder, reference))
    for result in (ours, theirs):
        for key in ("train_seconds", "reduction_seconds", "evaluation_seconds", "checkpoint_seconds"):
            assert result.pop(key) >= 0
        result.pop("savings")
        result["phases"] = [(phase["state_dims"], phase["steps"]) for phase in result["phases"]]
        for event in result["history"]:
            event.pop("seconds")
        for point in result["curve"]:
            point.pop("train_seconds")
    assert ours == theirs


def test_result_says_everything(unbroken: Path) -> None:
    result = json.loads((unbroken / "result.json").read_text())
    assert parse_config(result["config"]) == config()
    assert (result["data"], result["seed"], result["steps"], result["command"]) == ("digits", 0, 24, None)
    assert result["versions"]["torch"] == torch.__version__
    assert [point["step"] for point in result["curve"]] == [8, 16, 24]
    assert [event["step"] for event in result["history"]] == [6, 12]
    assert result["history"][0]["kind"] == "cut"
    assert result["history"][0]["layers"][0]["certificate"]["bound"] >= 0
    assert result["state_dims"][0] < 16
    assert result["curve"][-1]["validation_accuracy"] == result["validation_accuracy"]
    model, data = load(unbroken / "model"), load_data(config().data)
    assert isinstance(model, SequenceClassifier)
    assert model.config["d_state"] == result["state_dims"]
    with torch.no_grad():
        x, y = data.batch(data.test, torch.arange(len(data.test)))
        # Same arithmetic but for the batch size; a sequence on the edge between two classes may fall either way.
        assert math.isclose(float((model(x).argmax(-1) == y).float().mean()), result["test_accuracy"], abs_tol=2 / 359)


def test_same_seed_same_bits_other_seed_other_weights(tmp_path: Path, unbroken: Path) -> None:
    train(config(), output=tmp_path / "again", quiet=True)
    assert_same_outcome(tmp_path / "again", unbroken)
    train(config({"run": {"seed": 1}}), output=tmp_path / "other", quiet=True)
    assert state_bytes(tmp_path / "other") != state_bytes(unbroken)


def test_logging_and_evaluating_change_nothing(tmp_path: Path, unbroken: Path) -> None:
    """Cadence of logs, evaluations and checkpoints leaves the weights alone; so does TensorBoard."""
    train(
        config({"run": {"log_every": 1, "eval_every": 3, "checkpoint_every": 0, "tensorboard": True}}),
        output=tmp_path,
        quiet=True,
    )
    assert (tmp_path / "model/model.safetensors").read_bytes() == (unbroken / "model/model.safetensors").read_bytes()
    logs = list((tmp_path / "tensorboard").iterdir())
    assert len(logs) == 1

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Scalars("train/loss")) == 24
    cuts = [6, 12]
    assert [event.step for event in events.Scalars("state_dim/blocks.0.ssm")] == sorted([*range(3, 25, 3), *cuts])
    assert {"validation/accuracy", "lr/ssm", "lr/decay"} <= set(events.Tags()["scalars"])


# ---- killed and resumed -------------------------------------------------------------------------------------------

Point = tuple[str, str, int, str]  # module, attribute, number of the call, before or after it


def kill_at(point: Point) -> None:
    """Arrange that this process gets a SIGKILL before or after a certain call of a function."""
    module, attribute, number, when = point
    owner: Any = importlib.import_module(module)
    *path, name = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            die()
        result = real(*args, **kwargs)
        if calls == number:
            die()
        return result

    setattr(owner, name, deadly)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def run_in_child(settings: Config, folder: Path, point: Point | None) -> None:
    torch.set_num_threads(1)
    if point is not None:
        kill_at(point)
    train(settings, output=folder, resume=True, quiet=True)


def exit_code(settings: Config, folder: Path, point: Point | None) -> int | None:
    child = forkserver().Process(target=run_in_child, args=(settings, folder, point))
    child.start()
    child.join(120)
    return child.exitcode


STEP, REPLACE = ("compressm.training.compressor", "Compressor.step"), ("compressm.runtime.files", "os.replace")
POINTS: dict[str, Point] = {
    "before the first checkpoint": (*STEP, 2, "before"),
    "just before a cut": (*STEP, 6, "before"),
    "in a cut, written but not carried": ("compressm.cutting.plan", "write", 1, "after"),
    "in a cut, carried": ("compressm.cutting.plan", "tell_written", 1, "before"),
    "just after a cut": (*STEP, 6, "after"),
    "in the second cut": ("compressm.cutting.plan", "write", 2, "before"),
    "writing a checkpoint's tensors": ("compressm.runtime.files", "save_file", 3, "after"),
    "before a checkpoint counts": (*REPLACE, 5, "before"),
    "while a checkpoint is swapped": (*REPLACE, 5, "after"),
    "in an evaluation": ("compressm.lab.runs.loop", "_Run.quality", 2, "before"),
    "after the last checkpoint": ("compressm.lab.runs.loop", "_Run._finish", 1, "before"),
    "before the result is written": ("compressm.lab.runs.loop", "write_json", 1, "before"),
}
SETBACK_POINTS: dict[str, Point] = {
    "under observation": (*STEP, 71, "after"),
    "just before the examination": (*STEP, 72, "before"),
    "in a roll-back": ("compressm.training.snapshot", "Training.restore", 1, "before"),
    "after a roll-back": ("compressm.training.snapshot", "Training.restore", 1, "after"),
    "after the steps were made again": (*STEP, 76, "after"),
}

# A kill takes seconds. These, where most can go wrong, are tried whenever tests run, the others with the slow tests.
EVERY_TIME = {
    "in a cut, written but not carried",
    "in the second cut",
    "writing a checkpoint's tensors",
    "while a checkpoint is swapped",
    "before the result is written",
    "under observation",
    "in a roll-back",
}


def chosen(points: dict[str, Point]) -> list[Any]:
    return [pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.slow) for name in points]


@pytest.mark.parametrize("name", chosen(POINTS))
def test_killed_and_resumed(name: str, tmp_path: Path, unbroken: Path) -> None:
    assert exit_code(config(), tmp_path, POINTS[name]) == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    assert exit_code(config(), tmp_path, None) == 0
    assert_same_outcome(tmp_path, unbroken)


@pytest.mark.parametrize("name", chosen(SETBACK_POINTS))
def test_killed_and_resumed_around_a_setback(name: str, tmp_path: Path, unbroken_setback: Path) -> None:
    history = json.loads((unbroken_setback / "result.json").read_text())["history"]
    assert "rolled_back" in [event["kind"] for event in history]
    assert exit_code(config(SETBACK), tmp_path, SETBACK_POINTS[name]) == -signal.SIGKILL
    assert exit_code(config(SETBACK), tmp_path, None) == 0
    assert_same_outcome(tmp_path, unbroken_setback)


def test_beside_a_twin_a_cut_that_is_undone_leaves_no_trace(tmp_path: Path) -> None:
    cut = {**SETBACK["compression"], "cuts": 1, "window": 0.1, "control": "twin", "on_setback": "stop"}
    result = train(config({**SETBACK, "compression": cut}), output=tmp_path / "cut", quiet=True)
    (undone,) = (event for event in result.history if event["kind"] == "rolled_back")
    assert undone["restored_step"] == undone["step"] > 69
    assert undone["seconds"] > 0
    train(config({**SETBACK, "compression": {"enabled": False}}), output=tmp_path / "whole", quiet=True)
    weights = ((tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("cut", "whole"))
    assert len(set(weights)) == 1


def test_after_a_setback_curve_and_spectra_are_those_of_the_restored_model(tmp_path: Path) -> None:
    # The cut comes at step 72, where an evaluation is due too: it sees the cut model, and is undone with it.
    compression = {"states": 1, "cuts": 1, "start": 63, "window": 0.1, "max_drop": 0.0, "check_after": 3}
    changes = {**SETBACK, "compression": compression}
    changes["run"] = {**SETBACK["run"], "spectrum_every": 24}
    result = train(config(changes), output=tmp_path, quiet=True)
    assert [(event["kind"], event["restored_step"]) for event in result.history][-4:] == [
        ("rolled_back", 72), ("stopped", None), ("fell_short", None), ("ended", None),
    ]  # fmt: skip
    points = {point["step"]: point for point in result.curve}
    assert [point["step"] for point in result.curve] == [*range(8, 90, 8), 90]
    assert points[72]["state_dims"] == [16]
    assert abs(points[72]["validation_accuracy"] - points[64]["validation_accuracy"]) < 0.3
    assert [entry["step"] for entry in result.spectra or ()] == [0, 24, 48, 72]
    assert (result.spectra or ())[-1]["layers"]["blocks.0.ssm"]["states"] == 16


def test_killed_again_and_again(tmp_path: Path, unbroken: Path) -> None:
    kills = 0
    while exit_code(config(), tmp_path, (*STEP, 5, "after")) == -signal.SIGKILL:
        kills += 1
    assert kills == 5  # each attempt makes 4 steps that last, and 24 are needed
    assert_same_outcome(tmp_path, unbroken)


@pytest.mark.filterwarnings("ignore")
def test_energy_of_a_resumed_run_is_that_of_all_its_steps(tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    settings = config({"run": {"energy": "CHE"}})
    assert exit_code(settings, tmp_path, (*STEP, 15, "after")) == -signal.SIGKILL
    before = load_tree(newest_checkpoint(tmp_path))["energy"]
    assert before["steps"] == 12
    assert exit_code(settings, tmp_path, None) == 0
    energy = json.loads((tmp_path / "result.json").read_text())["energy"]
    assert energy["steps"] == 24
    assert 0 < before["kwh"] < energy["kwh"]


MAMBA: dict[str, Any] = {
    "model": {"layer": "mamba", "d_model": 4, "d_state": 8},
    "compression": {"states": 3, "cuts": 2, "window": 0.5},
}


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_selective_layers_are_observed_cut_and_resumed(layer: str, tmp_path: Path) -> None:
    options = {"layer": layer, **({"head_dim": 4, "n_groups": 2} if layer == "mamba2" else {})}
    settings = config({**MAMBA, "model": {**MAMBA["model"], **options}})
    result = train(settings, output=tmp_path / "unbroken", quiet=True)
    assert result.state_dims == [3]
    assert [event["kind"] for event in result.history] == ["cut", "cut"]
    assert 0 < result.history[0]["layers"][0]["certificate"]["relative_error"] < 1
    rebuilt = load(tmp_path / "unbroken" / "model")
    assert isinstance(rebuilt, SequenceClassifier)
    assert rebuilt.config["d_state"] == [3]
    # Between the cuts, with moments observed and not yet used.
    assert exit_code(settings, tmp_path / "killed", (*STEP, 10, "after")) == -signal.SIGKILL
    assert exit_code(settings, tmp_path / "killed", None) == 0
    assert_same_outcome(tmp_path / "killed", tmp_path / "unbroken")


def test_two_optimizers_are_cut_rolled_back_and_resumed(tmp_path: Path) -> None:
    settings = config({**SETBACK, "optimizer": {"name": "muon", "lr": 0.03}})
    result = train(settings, output=tmp_path / "unbroken", quiet=True)
    assert "rolled_back" in [event["kind"] for event in result.history]
    assert exit_code(settings, tmp_path / "killed", (*STEP, 71, "after")) == -signal.SIGKILL  # a cut is under watch
    assert exit_code(settings, tmp_path / "killed", None) == 0
    assert_same_outcome(tmp_path / "killed", tmp_path / "unbroken")


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = train(config(), output=tmp_path, quiet=True)
    before = (tmp_path / "result.json").stat().st_mtime_ns
    assert train(config(), output=tmp_path, resume=True, quiet=True) == first
    assert (tmp_path / "result.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"already holds a run; resume it with --resume, or choose another --output"):
        train(config(), output=tmp_path, quiet=True)
    with pytest.raises(ConfigError, match=r"optimizer.lr = 0.5: the run in .* was started with 0.01"):
        train(config({"optimizer": {"lr": 0.5}}), output=tmp_path, resume=True, quiet=True)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"result.json: damaged .* move the file away, and go on with --resume"):
        train(config(), output=tmp_path, resume=True, quiet=True)
    (tmp_path / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"model.dropout = 0.3: the run in .* was started with 0.1"):
        train(config({"model": {"dropout": 0.3}}), output=tmp_path, resume=True, quiet=True)
    assert train(config({"run": {"log_every": 7}}), output=tmp_path, resume=True, quiet=True).steps == 24
    (tmp_path / "result.json").unlink()
    for path in (tmp_path / "checkpoints").glob("*/state.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"SHA-256 differs.*SHA-256 differs"):
        train(config(), output=tmp_path, resume=True, quiet=True)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_other_data_in_the_place_of_a_runs_are_refused(split: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name in ("train", "val", "test"):
        arrays |= {f"x_{name}": generator.normal(size=(40, 12, 1)), f"y_{name}": np.arange(40) % 2}
    file, folder = tmp_path / "data.npz", tmp_path / "run"
    np.savez(file, **arrays)
    settings = config({"data": {"name": None, "source": str(file)}, "run": {"steps": 8, "eval_every": 4}})
    result = train(settings, output=folder, quiet=True)
    (folder / "result.json").unlink()
    arrays[f"y_{split}"][7] ^= 1
    np.savez(file, **arrays)
    with pytest.raises(ConfigError, match=r"data.source = .*data.npz': these are not the data that the run in .*run"):
        train(settings, output=folder, resume=True, quiet=True)
    arrays[f"y_{split}"][7] ^= 1
    np.savez(file, **arrays)
    assert train(settings, output=folder, resume=True, quiet=True).test_loss == result.test_loss


@pytest.mark.parametrize("rule", [{}, {"max_drop": 0.9, "check_after": 3}], ids=["sized", "judged"])
def test_a_run_can_begin_with_the_steps_of_the_same_run_without_compression(
    rule: dict[str, Any], tmp_path: Path
) -> None:
    # The first cut comes at step 18, after the checkpoint of step 16, and is judged by measurements from step 15 on.
    late = {**TINY["compression"], "start": 12, "window": 0.25, "cuts": 1, **rule}
    train(config({"compression": late}), output=tmp_path / "alone", quiet=True)
    off = {**late, "enabled": False}
    train(config({"compression": off, "run": {"keep_checkpoints": 6}}), output=tmp_path / "full", quiet=True)
    train(config({"compression": late}), output=tmp_path / "ours", origin=tmp_path / "full", quiet=True)
    assert_same_outcome(tmp_path / "ours", tmp_path / "alone")


def test_a_run_that_does_not_fit_is_no_beginning(tmp_path: Path) -> None:
    def begin(origin: str, changes: dict[str, dict[str, Any]] | None = None) -> None:
        train(config(changes), output=tmp_path / "ours", origin=tmp_path / origin, quiet=True)

    off = {**TINY["compression"], "enabled": False}
    train(config({"compression": off}), output=tmp_path / "full", quiet=True)
    train(config(), output=tmp_path / "cut", quiet=True)
    with pytest.raises(ConfigError, match=r"--from .*full: it has no checkpoint from before step \d+"):
        begin("full")
    with pytest.raises(ConfigError, match=r"--from .*full: nothing would differ"):
        begin("full", {"compression": off})
    late = {"compression": {**TINY["compression"], "start": 20, "window": 0.1, "cuts": 1}}
    with pytest.raises(ConfigError, match=r"optimizer.lr = 0.5: the run in .*full was made with 0.01"):
        begin("full", {**late, "optimizer": {"lr": 0.5}})
    with pytest.raises(ConfigError, match=r"--from .*cut: that run was compressed itself"):
        begin("cut", late)
    settled = {"compression": {**late["compression"], "when": "settled"}}
    with pytest.raises(ConfigError, match=r"--from .*full: compression.when = 'settled', which is watched over"):
        begin("full", settled)
    by_loss = {"compression": {**late["compression"], "gramians": "loss"}}
    with pytest.raises(ConfigError, match=r"--from .*full: compression.gramians = 'loss', which is watched over"):
        begin("full", by_loss)
    with pytest.raises(ConfigError, match=r"--from .*full: blocks.0.ssm is a selective layer, which is watched over"):
        begin("full", {**late, "model": {"layer": "mamba", "d_model": 6, "d_state": 16}})


def test_the_last_checkpoints_are_kept_and_an_older_one_serves(
    tmp_path: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config({"run": {"keep_checkpoints": 3}})
    train(settings, output=tmp_path, quiet=True)
    steps = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert steps == ["step-00000016", "step-00000020", "step-00000024"]
    newest = newest_checkpoint(tmp_path) / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    (tmp_path / "result.json").unlink()
    train(settings, output=tmp_path, resume=True)
    said = capsys.readouterr().err
    assert "state.safetensors is not the file that was saved" in said
    assert "resumed at step 20" in said
    assert state_bytes(tmp_path) == state_bytes(unbroken)


# ---- choices -------------------------------------------------------------------------------------------------------


def test_best_weights_are_chosen_after_the_last_cut(tmp_path: Path) -> None:
    result = train(
        config({"run": {"select": "best", "eval_every": 2}, "optimizer": {"lr": 0.05}}), output=tmp_path, quiet=True
    )
    last_cut = max(event["step"] for event in result.history if event["kind"] == "cut")
    after = [p for p in result.curve if p["step"] >= last_cut]  # a step's evaluation comes after its cut
    assert result.validation_accuracy == max(p["validation_accuracy"] for p in after)
    assert result.state_dims == after[-1]["state_dims"]
    assert list(load(tmp_path / "model").state_dict()) == list(load(tmp_path / "best").state_dict())


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_adam_learns(tmp_path: Path, optimizer: str) -> None:
    changes = {
        "optimizer": {"name": optimizer, "lr": 0.02, "weight_decay": 1e-4},
        "schedule": {"name": "constant"},
        "compression": {"enabled": False},
        "run": {"steps": 120, "eval_every": 0, "checkpoint_every": 0},
    }
    result = train(config(changes), output=tmp_path, quiet=True)
    assert result.validation_accuracy > 0.2  # chance is 0.1
    assert (result.history, result.state_dims) == ([], [16])


def test_one_step_of_gradient_descent_is_what_it_should_be(tmp_path: Path) -> None:
    settings = config(
        {
            "model": {"dropout": 0.0},
            "optimizer": {"name": "sgd", "lr": 0.1, "max_grad_norm": None},
            "schedule": {"name": "constant"},
            "compression": {"enabled": False},
            "run": {"steps": 1, "seed": 5},
        }
    )
    train(settings, output=tmp_path, quiet=True)
    trained = load(tmp_path / "model").state_dict()
    data = load_data(settings.data)
    torch.manual_seed(5)
    model = build_model(settings, data.channels, data.n_classes)
    u, y = data.batch(data.train, BatchOrder(len(data.train), 20, seed=5).indices(0))
    torch.nn.functional.cross_entropy(model(u), y).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        rate = 0.05 if name.split(".")[-1] in ("nu_log", "theta_log", "gamma_log", "B_re", "B_im") else 0.1
        torch.testing.assert_close(trained[name], (parameter - rate * parameter.grad).detach())


def test_half_precision_trains_with_the_gradient_of_autocast(tmp_path: Path) -> None:
    changes = {
        "model": {"dropout": 0.0},
        "optimizer": {"name": "sgd", "lr": 0.1, "ssm_lr_factor": 1.0, "max_grad_norm": None},
        "schedule": {"name": "constant"},
        "compression": {"enabled": False},
    }
    settings = config({**changes, "run": {"steps": 1, "seed": 5, "autocast": "bfloat16"}})
    train(settings, output=tmp_path, quiet=True)
    trained = load(tmp_path / "model").state_dict()
    data = load_data(settings.data)
    u, y = data.batch(data.train, BatchOrder(len(data.train), 20, seed=5).indices(0))
    steps = {}
    for half in (True, False):
        torch.manual_seed(5)
        model = build_model(settings, data.channels, data.n_classes)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.nn.functional.cross_entropy(model(u), y).backward()
        steps[half] = {name: one.detach() - 0.1 * one.grad for name, one in model.named_parameters()}

    def away(half: bool) -> float:
        return sum(float((trained[name] - value).double().square().sum()) for name, value in steps[half].items()) ** 0.5

    # A fused step may round once less.
    assert away(True) < 1e-4 * away(False)


def test_two_optimizers_follow_one_schedule() -> None:
    settings = config({"optimizer": {"name": "muon", "lr": 0.01}, "run": {"steps": 10}})
    optimizer = build_optimizer(settings.optimizer, build_model(settings, 1, 10))
    scheduler = build_scheduler(settings, optimizer)
    factor = learning_rate_factor(settings)
    for step in range(10):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {
            "ssm": pytest.approx(0.005 * factor(step)),
            "no_decay": pytest.approx(0.01 * factor(step)),
            "decay": pytest.approx(0.01 * factor(step)),
        }
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("layer", ["lru", "s4d", "mamba", "mamba2", "gated_linear_attention", "delta_net", "rg_lru"])
def test_muon_trains_every_weight_matrix_and_adamw_all_else(layer: str) -> None:
    sizes = {"head_dim": 4} if layer == "mamba2" else {}
    short = {"d_conv": 3} if layer in ("gated_linear_attention", "delta_net") else {}
    settings = config(
        {"optimizer": {"name": "muon", "lr": 0.01}, "model": {"layer": layer, "d_model": 8, **sizes, **short}}
    )
    model = build_model(settings, 1, 10)
    optimizer = build_optimizer(settings.optimizer, model)
    assert isinstance(optimizer, Together)
    adamw, muon = optimizer.members
    assert [type(one) for one in (adamw, muon)] == [torch.optim.AdamW, torch.optim.Muon]
    trained = [{id(one) for group in member.param_groups for one in group["params"]} for member in (adamw, muon)]
    recurrent = {id(one) for group in adamw.param_groups if group["name"] == "ssm" for one in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and id(parameter) not in recurrent
        assert [id(parameter) in one for one in trained] == [not matrix, matrix], name
        parameter.grad = torch.ones_like(parameter)
    names = [group["name"] for group in optimizer.param_groups]
    assert len(names) == len(set(names))  # rates are logged by name
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_muon_without_a_matrix_is_refused() -> None:
    settings = config({"optimizer": {"name": "muon"}})
    with pytest.raises(ConfigError, match=r"optimizer.name = 'muon': the model has no weight matrix"):
        build_optimizer(settings.optimizer, torch.nn.BatchNorm1d(3))


def test_schedule_follows_its_formula() -> None:
    settings = config(
        {"run": {"steps": 1000}, "optimizer": {"lr": 0.01}, "schedule": {"name": "cosine", "lr_min": 1e-4}}
    )
    factor = learning_rate_factor(settings)
    assert factor(0) == 0.01
    assert factor(99) == 1.0
    assert math.isclose(factor(550), 0.5 * (1 + 0.01), rel_tol=1e-12)
    assert math.isclose(factor(1000), 0.01, rel_tol=1e-12)
    assert learning_rate_factor(config({"schedule": {"name": "constant"}}))(500) == 1.0


def test_recurrence_has_its_own_rate_and_no_decay() -> None:
    settings = config({"optimizer": {"name": "adamw", "weight_decay": 0.1}})
    model = build_model(settings, 1, 10)
    groups = {group["name"]: group for group in build_optimizer(settings.optimizer, model).param_groups}
    assert (groups["ssm"]["lr"], groups["ssm"]["weight_decay"]) == (0.005, 0.0)
    assert (groups["decay"]["lr"], groups["decay"]["weight_decay"]) == (0.01, 0.1)
    assert all(group["fused"] for group in groups.values())


def test_divergence_is_reported(tmp_path: Path) -> None:
    changes = {"optimizer": {"name": "sgd", "lr": 1e30}, "run": {"log_every": 1}}
    with pytest.raises(ConfigError, match=r"optimizer.lr = 1e\+30: training diverged, the loss is (nan|inf) at step"):
        train(config(changes), output=tmp_path, quiet=True)


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_a_checkpoint_of_a_diverged_run_is_never_written(what: str, tmp_path: Path) -> None:
    """Neither NaN as a loss nor as a weight, which the next loss would show, replaces the last good checkpoint."""
    real = Compressor.step

    def poisoned(compressor: Compressor, *batch: Any) -> Event | None:
        event = real(compressor, *batch)
        if compressor._steps == 20:
            parameter = next(compressor.model.parameters())
            if what == "weights":
                parameter.data[0] = math.nan
        return event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compressor, "step", poisoned)
        if what == "loss":
            patch.setattr("compressm.lab.runs.tasks.F.cross_entropy", _nan_at(20))
        with pytest.raises(ConfigError, match=r"training diverged, .* at step 20; the checkpoint of step 16 is from"):
            train(config({"run": {"log_every": 0, "eval_every": 0}}), output=tmp_path, quiet=True)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000012", "step-00000016"]
    train(config({"run": {"log_every": 0, "eval_every": 0}}), output=tmp_path, resume=True, quiet=True)


def _nan_at(step: int) -> Callable[..., torch.Tensor]:
    real, calls = torch.nn.functional.cross_entropy, 0

    def loss(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return real(*args, **options) * (math.nan if calls == step + 1 else 1)  # the first call measures a step

    return loss


def test_unfit_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.batch_size = 5000: more than the 1079 training sequences"):
        train(config({"run": {"batch_size": 5000}}), output=tmp_path, quiet=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.output: .* cannot be created"):
        train(config(), output=tmp_path / "file" / "run", quiet=True)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"run.device = 'cuda': torch sees no CUDA device"):
            train(config({"run": {"device": "cuda"}}), output=tmp_path, quiet=True)


def test_threads_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    result = train(config({"run": {"threads": before + 1, "steps": 16}}), output=tmp_path, quiet=True)
    assert result.threads == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_two_processes_cut_alike_and_resume(tmp_path: Path) -> None:
    """Data parallel on two CPU processes: the batch is shared, cuts are the same, a killed pair goes on bit for bit."""
    path = tmp_path / "config.json"  # JSON is YAML
    path.write_text(json.dumps({**TINY, "run": {**TINY["run"], "steps": 60}}))

    def launch(output: str, *more: str) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        arguments = ["-m", "compressm.cli", "train", str(path), "--output", str(tmp_path / output), *more]
        return subprocess.Popen([*launcher, *arguments], stderr=subprocess.DEVNULL, start_new_session=True)

    assert launch("unbroken").wait(200) == 0
    result = json.loads((tmp_path / "unbroken" / "result.json").read_text())
    assert result["processes"] == 2
    assert result["state_dims"][0] < 16
    pair = launch("killed")
    while pair.poll() is None and not list(tmp_path.glob("killed/checkpoints/*/state.json")):
        time.sleep(0.01)
    os.killpg(pair.pid, signal.SIGKILL)
    assert pair.wait() == -signal.SIGKILL
    assert launch("killed", "--resume").wait(200) == 0
    assert state_bytes(tmp_path / "killed") == state_bytes(tmp_path / "unbroken")
