from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compressm
from compressm.cli import main
from compressm.cutting import state_dims
from compressm.lab.one_shot import compress_checkpoint
from compressm.lab.prospects import analyze_checkpoint
from compressm.lab.state_bits import StateBits
from compressm.layers import LanguageModel, SequenceClassifier, SequenceRegressor

TEXT = "The quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def language_model(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model = LanguageModel(256, d_model=8, d_state=12, n_layers=2)
    compressm.save(model, folder)
    return model


def hugging_face(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {"vocab_size": 256, "hidden_size": 8, "state_size": 12, "num_hidden_layers": 2}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**options)).eval()
    model.save_pretrained(folder)
    return model


def byte_loss(logits: Callable[[torch.Tensor], torch.Tensor], first: int, count: int, length: int) -> float:
    data = torch.tensor(list(TEXT.encode()))
    x = data[first * length : (first + count) * length].view(count, length)
    with torch.no_grad():
        return float(F.cross_entropy(logits(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()))


def test_a_hugging_face_checkpoint_is_cut_and_stock_loadable(tmp_path: Path, text: Path) -> None:
    model = hugging_face(tmp_path / "big")
    result = tmp_path / "result.json"
    arguments = ["compress", str(tmp_path / "big"), "--states", "4", "--data", str(text)]
    arguments += ["--output", str(tmp_path / "small"), "--length", "64", "--sequences", "8", "--json", str(result)]
    assert main(arguments) == 0
    lost = json.loads(result.read_text(encoding="utf-8"))
    layers = lost["report"]["layers"]
    assert [(layer["states_before"], layer["states_after"]) for layer in layers] == [(12, 4)] * 2
    assert all(0 < layer["energy_kept"] < 1 for layer in layers)
    assert lost["parameters_after"] < lost["parameters_before"]
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert small.config.state_size == 4
    # The loss is measured on the 8 sequences that follow the 8 that the cut was made from.
    for key, m in (("loss_before", model), ("loss_after", small)):
        assert lost[key] == pytest.approx(byte_loss(lambda x, m=m: m(x).logits, 8, 8, 64), rel=1e-4)


def test_an_own_language_model_is_cut_and_loads(tmp_path: Path, text: Path) -> None:
    model = language_model(tmp_path / "big")
    lost = compress_checkpoint(tmp_path / "big", tmp_path / "small", text, fraction=0.5, sequences=4, length=32)
    small = compressm.load(tmp_path / "small")
    assert [layer.states_after for layer in lost.report.layers] == [6, 6]
    assert lost.loss_before == pytest.approx(byte_loss(model.eval(), 4, 4, 32), rel=1e-4)
    assert lost.loss_after == pytest.approx(byte_loss(small, 4, 4, 32), rel=1e-4)
    assert "12 → 6" in str(lost)


def test_a_classifier_is_cut_by_arrays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compressm.save(SequenceClassifier(2, 3, d_model=4, d_state=16), tmp_path / "big")
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=generator.normal(size=(9, 20, 2)), y=generator.integers(0, 3, 9))
    lost = compress_checkpoint(tmp_path / "big", tmp_path / "small", tmp_path / "data.npz", tolerance=0.1)
    assert lost.report.layers[0].states_after < 16
    assert (lost.report.layers[0].energy_kept or 0) >= 0.9 - 1e-12
    assert math.isfinite(lost.loss_after)
    assert (lost.sequences, lost.length) == (4, 20)


def test_max_drop_is_kept_on_the_data_that_it_was_measured_on(tmp_path: Path, text: Path) -> None:
    language_model(tmp_path / "big")
    options: dict[str, Any] = {"sequences": 4, "length": 32}
    lost = compress_checkpoint(tmp_path / "big", tmp_path / "small", text, max_drop=0.5, **options)
    assert lost.metric == "perplexity"
    assert lost.score_after == pytest.approx(math.exp(lost.loss_after or 0), rel=1e-6)
    assert lost.score_before == pytest.approx(math.exp(lost.loss_before or 0), rel=1e-6)
    assert (lost.score_after or 0) - (lost.score_before or 0) <= 0.5
    assert sum(layer.states_after for layer in lost.report.layers) < 24
    assert state_dims(compressm.load(tmp_path / "small")) == {
        layer.name: layer.states_after for layer in lost.report.layers
    }


def test_max_error_bounds_every_layer_and_the_metric_is_shown(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compressm.save(SequenceClassifier(2, 3, d_model=4, d_state=16), tmp_path / "big")
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=draw.normal(size=(8, 20, 2)), y=draw.integers(0, 3, 8))
    lost = compress_checkpoint(tmp_path / "big", None, tmp_path / "data.npz", max_error=0.3, sequences=4)
    certificate = lost.report.layers[0].certificate
    assert certificate is not None
    assert certificate.bound <= 0.3
    assert lost.report.layers[0].states_after < 16
    assert lost.metric == "accuracy"
    assert f"accuracy {lost.score_before:.4f} → {lost.score_after:.4f}" in str(lost)


def test_the_loss_of_a_regressor_is_that_of_its_numbers(tmp_path: Path) -> None:
    """Half the mean square of what the cut changes: a normal distribution of unit variance."""
    torch.manual_seed(0)
    model = SequenceRegressor(1, 1, d_model=4, d_state=16).eval()
    compressm.save(model, tmp_path / "big")
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(32, 20, 1)).astype(np.float32), draw.normal(size=32).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    options: dict[str, Any] = {"gramians": "loss", "sequences": 16}
    lost = compress_checkpoint(tmp_path / "big", tmp_path / "small", tmp_path / "data.npz", states=2, **options)
    assert lost.report.state_dims == {"blocks.0.ssm": 2}
    with torch.no_grad():
        unseen = torch.from_numpy(x[16:])
        moved = compressm.load(tmp_path / "small").eval()(unseen) - model(unseen)
    assert lost.report.measured_loss == pytest.approx(float(moved.double().square().mean()) / 2, rel=1e-4)
    spectrum = analyze_checkpoint(tmp_path / "big", tmp_path / "data.npz", gramians="loss", sequences=16).spectrum
    rise = next(iter(spectrum)).rise
    assert rise is not None
    assert float(rise[0]) > 0  # what all states are worth


def test_states_in_few_bits_are_simulated_on_padded_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LanguageModel(30, d_model=8, d_state=8, layer="mamba2", head_dim=4)
    tokens, lengths = torch.randint(30, (4, 300)), torch.tensor([300, 20, 256, 7])
    bits = StateBits({}, 0).plus("uncut", model, {"tokens": tokens, "lengths": lengths})
    short = {"tokens": tokens[:, :256], "lengths": lengths.clamp_max(256)}
    assert bits.models["uncut"] == compressm.round_states(model, [short])
    assert bits.tokens == 256 + 20 + 256 + 7


def test_under_a_rule_of_quality_at_least_half_of_the_states_stay_unless_said(tmp_path: Path) -> None:
    """As in `compressm.compress`: the command line has the same rule and the same default."""
    torch.manual_seed(0)
    compressm.save(SequenceClassifier(2, 3, d_model=4, d_state=16), tmp_path / "big")
    by_default = compress_checkpoint(tmp_path / "big", None, tolerance=0.9).report.layers[0].states_after
    as_far_as_it_goes = compress_checkpoint(tmp_path / "big", None, tolerance=0.9, max_reduction=1.0).report.layers[0]
    in_python = compressm.compress(compressm.load(tmp_path / "big"), tolerance=0.9).layers[0].states_after
    assert by_default == in_python == 8
    assert as_far_as_it_goes.states_after < 8


@pytest.mark.parametrize("option", [["--max-drop", "0.1"], ["--max-error", "0.1"], ["--max-reduction", "0.5"]])
def test_sorting_refuses_what_is_about_a_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    assert main(["compress", str(tmp_path), "--sorted", "--output", str(tmp_path / "sorted"), *option]) == 2
    assert option[0] in capsys.readouterr().err


def test_mistakes_are_answered_in_one_line(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    language_model(tmp_path / "own")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "compressm.json").write_text("{", encoding="utf-8")
    own, new = str(tmp_path / "own"), str(tmp_path / "new")
    for checkpoint, data, output, options, message in (
        (str(tmp_path), str(text), new, ["--states", "4"], "is no checkpoint: expected a folder with config.json"),
        (str(tmp_path / "broken"), str(text), new, ["--states", "4"], "compressm.json"),
        (own, str(text), str(tmp_path / "full"), ["--states", "4"], "is not an empty folder: choose another"),
        (own, str(text), new, [], "give exactly one of"),
        (own, str(text), new, ["--states", "0"], "states must be a whole number of at least 1"),
        (own, str(tmp_path / "none.txt"), new, ["--states", "4"], "none.txt cannot be read"),
        (own, str(text), new, ["--states", "4", "--length", "100000"], "give more data, or a smaller length"),
        (own, str(text), new, ["--states", "4", "--length", "1"], "length at least 2"),
    ):
        assert main(["compress", checkpoint, "--data", data, "--output", output, *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert not Path(new).exists()


@pytest.mark.parametrize("make", [hugging_face, language_model])
def test_a_checkpoint_is_analysed(
    make: Callable[[Path], Any], tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(tmp_path / "big")
    out = tmp_path / "spectra.json"
    arguments = ["analyze", str(tmp_path / "big"), "--data", str(text), "--sequences", "8", "--length", "32"]
    assert main([*arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    layers = json.loads(out.read_text())["layers"]
    assert len(layers) == 2
    assert all(name in printed for name in layers)
    windows = torch.tensor(list(TEXT.encode()))[: 8 * 32].view(2, 4, 32)
    expected = compressm.analyze(model.eval(), data=list(windows))
    for layer in expected:
        torch.testing.assert_close(torch.tensor(layers[layer.name]["hsv"]).double(), layer.hsv, rtol=1e-3, atol=1e-6)


def test_an_analysis_says_what_a_cut_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(2, 3, d_model=4, d_state=16, n_layers=2)
    compressm.save(model, tmp_path / "model")
    assert main(["analyze", str(tmp_path / "model"), "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    cuts = json.loads((tmp_path / "a.json").read_text())["cuts"]
    for cut in cuts:
        report = compressm.compress(copy.deepcopy(model), tolerance=cut["tolerance"], min_reduction=0.0)
        assert cut["states"] == report.state_dims
        smaller = copy.deepcopy(model)
        compressm.compress(smaller, tolerance=cut["tolerance"], min_reduction=0.0)
        assert cut["parameters"] == sum(parameter.numel() for parameter in smaller.parameters())
        assert f"{cut['parameters']:,}" in printed
    assert cuts[0]["parameters"] < cuts[1]["parameters"] <= cuts[2]["parameters"]


def test_a_layer_that_would_refuse_is_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    compressm.save(SequenceClassifier(2, 3, d_model=4, d_state=16), tmp_path / "model")
    monkeypatch.setattr(
        "compressm.theory.certificate.MAX_CONDITION", 1.0
    )  # no real basis of eigenvectors is orthogonal
    assert main(["analyze", str(tmp_path / "model"), "--json", str(tmp_path / "a.json")]) == 0
    printed, cut = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())["cuts"][0]
    assert cut["states"] == {"blocks.0.ssm": 16}
    assert "condition" in cut["refused"]["blocks.0.ssm"]
    assert f"blocks.0.ssm refuses τ = 0.1: {cut['refused']['blocks.0.ssm']}" in printed


@pytest.mark.parametrize("name", ["a.html", "a.png", "a.svg"])
def test_an_analysis_can_be_drawn(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compressm.save(SequenceClassifier(2, 3, d_model=4, d_state=16), tmp_path / "model")
    assert main(["analyze", str(tmp_path / "model"), "--plot", str(tmp_path / name)]) == 0
    assert (tmp_path / name).stat().st_size > 5000
    assert main(["analyze", str(tmp_path / "model"), "--plot", str(tmp_path / "a.docx")]) == 2
    assert "--plot" in capsys.readouterr().err


def test_linear_layers_need_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compressm.save(SequenceClassifier(2, 3, d_model=4, d_state=16), tmp_path / "lru")
    assert main(["analyze", str(tmp_path / "lru")]) == 0
    assert "blocks.0.ssm" in capsys.readouterr().out
    language_model(tmp_path / "mamba")
    assert main(["analyze", str(tmp_path / "mamba")]) == 2
    assert "depends on the data" in capsys.readouterr().err


def test_arrays_that_are_not_finite_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compressm.save(SequenceClassifier(2, 3, d_model=4, d_state=8, layer="mamba"), tmp_path / "model")
    x = np.random.default_rng(0).normal(size=(16, 12, 2)).astype(np.float32)
    x[5, 3, 1] = np.nan
    np.savez(tmp_path / "data.npz", x=x, y=np.zeros(16, dtype=np.int64))
    arguments = [str(tmp_path / "model"), "--data", str(tmp_path / "data.npz")]
    for command in (
        ["analyze", *arguments],
        ["compress", *arguments, "--output", str(tmp_path / "out"), "--states", "4"],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "data.npz holds nan at [5, 3, 1]: data must be finite" in said
        assert "learning rate" not in said
