"""What TensorBoard and Weights & Biases are told in real, short runs with cuts and a roll-back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compressm.errors import ConfigError, MissingExtraError
from compressm.lab.config import parse_config
from compressm.lab.runs.loop import train

# Accuracies of so few digits cannot resolve a max_drop of 0, and setbacks end the cutting.
pytestmark = pytest.mark.filterwarnings("ignore::compressm.training.cushion.CushionWarning")


def config(**run: Any) -> Any:
    return parse_config(
        {
            "data": {"name": "digits"},
            "model": {"d_model": 6, "d_state": 16, "r_min": 0.9, "max_phase": 0.6},  # learns within 90 steps
            "optimizer": {"lr": 0.01},
            "compression": {"states": 1, "cuts": 2, "start": 90, "window": 0.2, "max_drop": 0.0, "check_after": 3},
            "run": {
                "steps": 120, "batch_size": 20, "eval_every": 30, "checkpoint_every": 0, "spectrum_every": 30,
                "device": "cpu", "tensorboard": False, **run,
            },
        }
    )  # fmt: skip


def test_tensorboard_shows_the_spectrum_and_the_dimensions(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(config(tensorboard=True), output=tmp_path / "run", quiet=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    name = "blocks.0.ssm"
    cuts = [event["step"] for event in result.history if event["kind"] == "cut"]
    assert {"rolled_back", "cut"} <= {event["kind"] for event in result.history}
    looks = {0, 30, 60, 90, 120}
    assert {item.step for item in events.Histograms(f"log10_hsv/{name}")} >= looks | set(cuts)
    assert {item.step for item in events.Images(f"spectrum/{name}")} & looks
    assert {f"state_dim/{name}", "train/loss", "validation/accuracy", "compressm/cut_seconds"} <= set(tags["scalars"])
    dims = {item.step: item.value for item in events.Scalars(f"state_dim/{name}")}
    assert dims[120] == result.state_dims[0]
    first = next(item for item in events.Histograms(f"log10_hsv/{name}") if item.step == cuts[0])
    assert first.histogram_value.num == 32


def test_the_terminal_says_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(), output=tmp_path / "run")
    printed = capsys.readouterr().err
    assert "cut, states 16 → " in printed
    assert "cut undone, back to step " in printed


def wandb_records(content: bytes) -> Iterator[Any]:
    """The records of an offline run's file: LevelDB's log format, after 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    position, parts = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # no header fits into the rest of a block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.mark.slow
def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = train(config(wandb="test"), output=tmp_path / "run", quiet=True)
    wandb.teardown()
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    logged: dict[str, list[str]] = {}
    for record in wandb_records(file.read_bytes()):
        for item in record.history.item:
            logged.setdefault(item.key or item.nested_key[0], []).append(item.value_json)
    assert logged["state_dim/blocks.0.ssm"][-1] == f"{result.state_dims[0]}"
    assert any("histogram" in value for value in logged["log10_hsv/blocks.0.ssm"])
    assert any("image-file" in value for value in logged["spectrum/blocks.0.ssm"])
    assert "train/loss" in logged
    assert (tmp_path / "run/wandb-id").read_text().isalnum()


def test_without_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"compressm\[wandb\]"):
        train(config(wandb="test"), output=tmp_path / "run", quiet=True)


def test_a_project_needs_a_name() -> None:
    with pytest.raises(ConfigError, match=r"run\.wandb = ''"):
        config(wandb="")
