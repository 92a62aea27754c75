"""A checkpoint that is sorted once and sliced to several sizes, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import compressm
from compressm.cli import main
from compressm.cutting import state_dims
from compressm.cutting.ordering import ORDER_FILE, StateOrder
from compressm.layers import LanguageModel


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return checkpoints.written(tmp_path)


def mamba2(folder: Path) -> Any:
    model = checkpoints.mamba2(folder, n_groups=2)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    return model


def test_sorted_then_sliced_to_several_sizes(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    model = mamba2(tmp_path / "big")
    whole, x = tmp_path / "sorted", torch.tensor(list(checkpoints.TEXT[:64].encode()))[None]
    base = ["compress", str(tmp_path / "big"), "--sorted", "--data", str(text), "--sequences", "4", "--length", "32"]
    assert main([*base, "--output", str(whole)]) == 0
    assert "the function is the same" in capsys.readouterr().out
    again: Any = AutoModelForCausalLM.from_pretrained(whole).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(again.backbone.layers[0].mixer.in_proj.weight, model.backbone.layers[0].mixer.in_proj.weight)
    for states, source in ((8, whole), (4, tmp_path / "8")):  # a slice of a slice too
        out = tmp_path / str(states)
        arguments = ["slice", str(source), "--states", str(states), "--output", str(out)]
        assert main([*arguments, "--json", f"{out}.json"]) == 0
        assert capsys.readouterr().out.startswith("state per sequence")
        small: Any = AutoModelForCausalLM.from_pretrained(out).eval()
        assert small.config.state_size == states
        assert set(state_dims(small).values()) == {states}
        rows = small.backbone.layers[0].mixer.conv1d.weight[32 : 32 + states]
        torch.testing.assert_close(rows, again.backbone.layers[0].mixer.conv1d.weight[32 : 32 + states])
        told = json.loads(Path(f"{out}.json").read_text())
        assert all(0 < layer["certificate"]["relative_error"] < 1 for layer in told["report"]["layers"])
        assert "## Compressed states" in (out / "README.md").read_text()
    # A cut by data changes what the order says, so it does not survive one.
    cut = ["compress", str(whole), "--states", "8", "--data", str(text), "--sequences", "4", "--length", "32"]
    assert main([*cut, "--output", str(tmp_path / "cut")]) == 0
    assert not (tmp_path / "cut" / ORDER_FILE).exists()


def test_sorted_by_the_loss_says_what_was_tried(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mamba2(tmp_path / "big")
    base = ["compress", str(tmp_path / "big"), "--sorted", "--data", str(text), "--sequences", "4", "--length", "32"]
    arguments = [*base, "--gramians", "loss", "--output", str(tmp_path / "sorted"), "--json", str(tmp_path / "it.json")]
    assert main(arguments) == 0
    printed, told = capsys.readouterr().out, json.loads((tmp_path / "it.json").read_text())
    assert set(told["rises"]) == {"moments", "fisher", "saliency", "powers"}
    assert told["selection"] == next(iter(told["rises"]))
    assert ", taken" in printed
    order = StateOrder.load(tmp_path / "sorted")
    assert order.selection == told["selection"]
    assert {way: list(rises) for way, rises in order.rises.items()} == told["rises"]


def test_our_own_checkpoint_is_sorted_and_sliced(tmp_path: Path, text: Path) -> None:
    torch.manual_seed(0)
    compressm.save(LanguageModel(256, 16, 12, layer="delta_net", n_heads=2), tmp_path / "big")
    base = ["compress", str(tmp_path / "big"), "--sorted", "--data", str(text), "--sequences", "4", "--length", "32"]
    assert main([*base, "--output", str(tmp_path / "sorted")]) == 0
    assert main(["slice", str(tmp_path / "sorted"), "--fraction", "0.5", "--output", str(tmp_path / "small")]) == 0
    assert set(state_dims(compressm.load(tmp_path / "small")).values()) == {6}


def test_mistakes_are_answered_in_one_line(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mamba2(tmp_path / "big")
    capsys.readouterr()
    big, out = str(tmp_path / "big"), ["--output", str(tmp_path / "new")]
    for arguments, message in (
        (["slice", big, "--states", "4", *out], "states are in no known order: sort them first"),
        (["slice", big, "--states", "4", "--output", big], "is not an empty folder"),
        (["compress", big, "--sorted", *out], "give some by --data"),
        (["compress", big, "--sorted", "--data", str(text), "--states", "4", *out], "--states is about a cut"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "new").exists()
