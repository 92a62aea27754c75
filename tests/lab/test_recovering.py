"""Recovery after a cut of a checkpoint on disk, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import checkpoints
import compressm
from compressm.cli import main
from compressm.lab import one_shot
from compressm.lab.recovering import Recover, beside
from compressm.layers import LanguageModel


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return checkpoints.written(tmp_path)


def mamba2(folder: Path) -> Any:
    return checkpoints.mamba2(folder, n_groups=1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")  # by peft
@pytest.mark.parametrize("rank", [None, "2"])
def test_a_checkpoint_is_cut_recovered_and_stock_loadable(tmp_path: Path, text: Path, rank: str | None) -> None:
    model, out = mamba2(tmp_path / "big"), tmp_path / "small"
    base = ["compress", str(tmp_path / "big"), "--states", "2", "--data", str(text), "--sequences", "4"]
    base += ["--length", "32", "--output", str(out), "--recover", "6", "--recover-rate", "0.01"]
    if rank is not None:
        pytest.importorskip("peft")
        base += ["--recover-lora", rank]
    assert main([*base, "--json", str(tmp_path / "a.json")]) == 0
    told = json.loads((tmp_path / "a.json").read_text())["recovery"]
    from transformers import AutoModelForCausalLM

    small: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    assert small.config.state_size == 2
    assert not beside(out).exists()
    # The second four windows are held out: trained on were the first four and those from the ninth on.
    x = torch.tensor(list(checkpoints.TEXT.encode()))[4 * 32 : 8 * 32].view(4, 32)
    for one, key in ((model, "perplexity_before"), (small, "perplexity_recovered")):
        with torch.no_grad():
            nats = F.cross_entropy(one(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        assert told[key] == pytest.approx(float(nats.exp()), rel=1e-4)
    assert told["steps"] == 6
    assert told["divergence_first"] > 0


def test_after_a_kill_the_same_command_goes_on(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    compressm.save(LanguageModel(256, 8, 8, layer="mamba2", head_dim=8), tmp_path / "big")
    base = ["compress", str(tmp_path / "big"), "--states", "2", "--data", str(text), "--sequences", "4"]
    base += ["--length", "32", "--recover", "4", "--recover-rate", "0.01"]
    assert main([*base, "--output", str(tmp_path / "whole")]) == 0

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the last step, before anything is written
        patch.setattr(one_shot, "_written", killed)
        assert main([*base, "--output", str(tmp_path / "small")]) == 130
    assert sorted(path.suffix for path in beside(tmp_path / "small").iterdir()) == [".json", ".safetensors"]
    assert not (tmp_path / "small").exists()
    assert main([*base, "--output", str(tmp_path / "small")]) == 0
    whole, small = (compressm.load(tmp_path / name).state_dict() for name in ("whole", "small"))
    torch.testing.assert_close(small, whole, rtol=0, atol=0)
    assert not beside(tmp_path / "small").exists()


def test_the_card_tells_of_the_weights_that_are_written(tmp_path: Path, text: Path) -> None:
    """Its metadata are those of the recovered model, under the name of the folder."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import ModelCard

    mamba2(tmp_path / "big")
    (tmp_path / "big" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    done = one_shot.compress_checkpoint(
        tmp_path / "big", tmp_path / "small", text, states=4, sequences=4, length=32, recovery=Recover(20, lr=0.01)
    )
    assert done.recovery is not None
    metadata: Any = ModelCard.load(tmp_path / "small" / "README.md").data
    told = {one.metric_type: one.metric_value for one in metadata.eval_results}
    assert told["perplexity"] == pytest.approx(done.recovery.perplexity_recovered, rel=1e-4)
    assert told["perplexity"] != pytest.approx(done.recovery.perplexity_cut, rel=1e-3)
    assert metadata.model_name == "small"


def test_mistakes_are_answered_before_the_cut(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    compressm.save(LanguageModel(256, 8, 8), tmp_path / "big")
    base = ["compress", str(tmp_path / "big"), "--states", "2", "--output", str(tmp_path / "new")]
    short = ["--sequences", "4", "--length", "32", "--data", str(text)]
    capsys.readouterr()
    for options, message in (
        (["--recover", "5"], "--recover trains on text"),
        ([*short, "--recover-lora", "4"], "give the steps too"),
        ([*short, "--recover", "0"], "at least 1 step"),
        ([*short, "--recover", "5", "--recover-lora", "0"], "lora_rank must be at least 1"),
    ):
        assert main([*base, *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "new").exists()


def test_states_in_8_bits_are_told_beside_the_cut(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mamba2(tmp_path / "big")
    short = ["--data", str(text), "--sequences", "4", "--length", "32", "--state-bits", "8"]
    out = ["--output", str(tmp_path / "small"), "--json", str(tmp_path / "a.json")]
    assert main(["compress", str(tmp_path / "big"), "--states", "4", *short, *out]) == 0
    assert "states rounded after every token, simulated on 128 tokens" in capsys.readouterr().out
    bits = json.loads((tmp_path / "a.json").read_text())["bits"]["models"]
    # Two layers of 4 heads of 8 channels: 16 or 4 states, and in 8 bits two bytes of scale for each channel.
    sizes = {model: {one["format"]: one["bytes"] for one in formats} for model, formats in bits.items()}
    assert sizes["uncut"] == {"bfloat16": 64 * 32, "int8": 64 * 18, "fp8": 64 * 18}
    assert sizes["cut"] == {"bfloat16": 64 * 8, "int8": 64 * 6, "fp8": 64 * 6}
    assert main(["analyze", str(tmp_path / "big"), *short]) == 0
    assert "uncut  int8" in capsys.readouterr().out
    assert main(["analyze", str(tmp_path / "big"), *short[:-1], "4"]) == 2
    assert "only 8 is simulated" in capsys.readouterr().err
