"""Exported files, run by ONNX Runtime and by `torch.export`, against the models' own forward passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import compressm
from compressm.cli import main
from compressm.errors import ConfigError, ExportError
from compressm.lab.named import call_named
from compressm.layers import LRU, S4, LanguageModel, Mamba, SequenceClassifier
from compressm.layers.families import FAMILIES
from compressm.saving.export import flatten_state, onnx_runner, to_onnx, to_torch
from compressm.saving.tracing import example_of, trace

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

OWN = """
from torch import nn
from compressm.layers import S5


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.s5 = nn.Linear(2, 4), S5(4, 6)

    def forward(self, u):
        return self.s5(self.inp(u)).mean(1)


def build():
    return Mine()
"""

KINDS: dict[str, dict[str, Any]] = {
    "lru": {"d_state": [24, 24], "r_min": 0.9},
    "mamba": {"layer": "mamba", "d_state": [12, 12]},
    "mamba2": {"layer": "mamba2", "d_state": [12, 12], "head_dim": 8},
}


def classifier(kind: str = "lru") -> SequenceClassifier:
    torch.manual_seed(0)
    model = SequenceClassifier(3, 5, d_model=8, n_layers=2, **KINDS[kind])
    model(2 * torch.randn(4, 60, 3) + 1)  # moves the running statistics of batch norms away from 0 and 1
    return model.eval()


def streamed(path: Path, model: nn.Module, u: Tensor) -> Tensor:
    """Outputs of an exported step over sequences ``(batch, length, ...)``, from zero state."""
    run, outputs = onnx_runner(path), []
    state = [leaf.clone() for leaf in flatten_state(model.initial_state(len(u))).values()]  # type: ignore[operator]
    for now in u.unbind(1):
        y, *state = run([now.contiguous(), *state])
        outputs.append(y)
    return torch.stack(outputs, 1)


@pytest.mark.slow
def test_onnx_step_over_1000_steps_is_the_sequence(tmp_path: Path) -> None:
    model, path = classifier(), tmp_path / "step.onnx"
    report = to_onnx(model, path, step=True)
    u = torch.randn(3, 1000, 3)
    logits = streamed(path, model, u)
    for length in (1, 500, 1000):
        torch.testing.assert_close(logits[:, length - 1], model(u[:, :length]), atol=1e-4, rtol=0)
    assert report.bytes == path.stat().st_size
    assert report.max_error <= 1e-4
    assert list(report.inputs) == ["input", "state.blocks.0", "state.blocks.1", "state.mean", "state.steps"]
    assert report.inputs["state.blocks.0"] == ["batch", 2, 24]
    assert report.outputs[:2] == ("output", "next_state.blocks.0")
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_before_and_after_compression(kind: str, tmp_path: Path) -> None:
    model = classifier(kind)
    u = torch.randn(2, 1000, 3)
    sizes = []
    for _ in range(2):
        to_onnx(model, tmp_path / "model.onnx")
        to_onnx(model, tmp_path / "step.onnx", step=True)
        expected = model(u)
        torch.testing.assert_close(onnx_runner(tmp_path / "model.onnx")([u])[0], expected, atol=1e-4, rtol=0)
        short = u[:1, :7].contiguous()  # batch and length are free
        torch.testing.assert_close(onnx_runner(tmp_path / "model.onnx")([short])[0], model(short), atol=1e-4, rtol=0)
        torch.testing.assert_close(streamed(tmp_path / "step.onnx", model, u)[:, -1], expected, atol=1e-4, rtol=0)
        sizes.append((tmp_path / "step.onnx").stat().st_size)
        data = {} if kind == "lru" else {"data": [u]}
        assert compressm.compress(model, fraction=0.5, **data).cut
        model.eval()
    assert sizes[1] < sizes[0]


@pytest.mark.slow
def test_single_layers_and_language_models_leave_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (LRU(4, 6).eval(), Mamba(4, 3).eval())
    for layer in layers:
        to_onnx(layer, tmp_path / "layer.onnx", step=True)
        u = torch.randn(2, 50, 4)
        torch.testing.assert_close(streamed(tmp_path / "layer.onnx", layer, u), layer(u), atol=1e-4, rtol=0)
    language = LanguageModel(11, 8, 3).eval()
    to_onnx(language, tmp_path / "language.onnx", step=True)
    tokens = torch.randint(11, (2, 50))
    logits = streamed(tmp_path / "language.onnx", language, tokens)
    torch.testing.assert_close(logits, language(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("step", [False, True])
def test_torch_program_runs_without_the_model(step: bool, tmp_path: Path) -> None:
    model, path = classifier(), tmp_path / "model.pt2"
    u = torch.randn(3, 40, 3)
    report = to_torch(model, path, step=step, example=u)
    program = torch.export.load(path).module()
    if not step:
        torch.testing.assert_close(program(u), model(u), atol=1e-5, rtol=0)
        torch.testing.assert_close(program(u[:1, :5]), model(u[:1, :5]), atol=1e-5, rtol=0)
    else:
        state = list(flatten_state(model.initial_state(3)).values())
        for now in u.unbind(1):
            logits, *state = program(now, *state)
        torch.testing.assert_close(logits, model(u), atol=1e-5, rtol=0)
    assert report.checked_steps == 40


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("s5-both", "linear-attention", "gated")])
def test_the_tensors_of_a_traced_step_are_contiguous(family: str) -> None:
    """Compilers keep their strides: a program that was traced with a slice reads other tensors at wrong places."""
    program = trace(FAMILIES[family](32, 4), torch.randn(2, 5, 32), step=True, padded=False).program
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.name in inputs]
    assert len(values) > 1
    assert all(value.is_contiguous() for value in values)


@pytest.mark.slow
def test_the_sizes_of_a_loop_follow_from_the_numbers_that_it_is_given() -> None:
    """Inductor computes them so, and refuses a loop over sequences where it does not know the batch's size."""
    program = trace(LRU(2, 2), torch.randn(2, 5, 2), step=False, padded=False).program
    loops = [node for node in program.graph.nodes if node.target is torch.ops.higher_order.scan]
    assert loops
    for loop in loops:
        _, _, sequences, captured = loop.args
        numbers = [node.meta["val"] for node in captured if isinstance(node.meta["val"], torch.SymInt)]
        numbers.append(sequences[0].meta["val"].shape[0])
        known = {str(number) for number in numbers}
        sizes = [size for tensor in loop.meta["val"] for size in tensor.shape if isinstance(size, torch.SymInt)]
        assert {str(size) for size in sizes} <= known


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_program_compiled_ahead_of_time_is_the_model(tmp_path: Path) -> None:
    model = classifier("mamba2")
    to_torch(model, tmp_path / "model.pt2", example=torch.randn(2, 9, 3), lengths=True)
    program = torch.export.load(tmp_path / "model.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for batch, length in ((1, 1), (2, 70), (5, 13)):
        u, lengths = torch.randn(batch, length, 3), torch.randint(1, length + 1, (batch,))
        torch.testing.assert_close(compiled(u, lengths), model(u, lengths), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_int8_is_smaller_and_close(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(3, 5, d_model=32, d_state=64, r_min=0.9)
    whole = to_onnx(model, tmp_path / "whole.onnx", step=True)
    small = to_onnx(model, tmp_path / "small.onnx", step=True, int8=True)
    assert small.bytes < 0.6 * whole.bytes
    assert 0 < small.max_error < 0.05 * small.largest_output
    assert {entry.name for entry in tmp_path.iterdir()} == {"whole.onnx", "small.onnx"}


def test_exporting_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = classifier().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    to_torch(model, tmp_path / "model.pt2", example=torch.randn(1, 5, 3))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Tampered(nn.Module):
    """A model that computes something else whenever it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LRU(3, 4)

    def forward(self, u: Tensor) -> Tensor:
        return self.layer(u) + (1e-2 if torch.compiler.is_exporting() else 0.0)


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"differs from PyTorch by 1\.0e-02"):
        to_torch(Tampered(), tmp_path / "model.pt2", example=torch.randn(2, 5, 3))
    assert not list(tmp_path.iterdir())


class Untraceable(Tampered):
    def forward(self, u: Tensor) -> Tensor:
        return self.layer(u) if float(u.sum()) > 0 else u


def test_models_without_a_state_leave_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    report = to_torch(model, tmp_path / "model.pt2", example=torch.randn(2, 5, 3))
    assert report.max_error < 1e-6


def test_mistakes_are_named(tmp_path: Path) -> None:
    example = torch.randn(2, 5, 3)
    with pytest.raises(ExportError, match="pass example="):
        to_torch(Tampered(), tmp_path / "model.pt2")
    with pytest.raises(ExportError, match=r"has no step\(u, state\)"):
        to_torch(Tampered(), tmp_path / "model.pt2", step=True, example=example)
    with pytest.raises(ExportError, match=r"got shape \(2, 0, 3\)"):
        to_torch(classifier(), tmp_path / "model.pt2", example=example[:, :0])
    with pytest.raises(ExportError, match="cannot trace this Untraceable"):
        to_torch(Untraceable(), tmp_path / "model.pt2", example=example)
    with pytest.raises(ExportError, match="cannot be written"):
        to_torch(classifier(), tmp_path / "nowhere" / "model.pt2", example=example)


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compressm.save(classifier(), tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), "--step", "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["path"] == str(tmp_path / "saved" / "model-step.onnx")
    assert result["bytes"] == Path(result["path"]).stat().st_size
    assert result["max_error"] <= 1e-4
    assert result["checked_steps"] == 1000
    assert "model-step.onnx" in capsys.readouterr().out


def test_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "exported.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    model = call_named("exported:build", "--model").eval()
    compressm.save(model, "saved")
    save_file(model.state_dict(), "weights.safetensors")
    u = np.random.default_rng(0).normal(size=(3, 20, 2)).astype(np.float32)
    np.savez("data.npz", x=u, y=np.array(["a", "b", "a"]))
    for checkpoint in ("saved", "weights.safetensors"):
        command = ["export", checkpoint, "--model", "exported:build", "--format", "torch"]
        assert main([*command, "--data", "data.npz", "--output", "model.pt2"]) == 0
        program = torch.export.load("model.pt2").module()
        torch.testing.assert_close(program(torch.from_numpy(u)), model(torch.from_numpy(u)))
    assert main(command) == 2
    assert "give some sequences by --data" in capsys.readouterr().err


def test_command_line_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nothing")]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "torch", "--int8"]) == 2
    assert "--int8 is for --format onnx" in capsys.readouterr().err


@pytest.mark.slow
def test_lengths_are_a_second_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(2, 3, 8, 6, layer="s5", bidirectional=True).eval()
    u, lengths = torch.randn(3, 20, 2), torch.tensor([7, 20, 1])
    alone = torch.cat([model(u[i : i + 1, : int(n)]) for i, n in enumerate(lengths)])
    report = to_onnx(model, tmp_path / "model.onnx", lengths=True, example=u)
    assert report.inputs["lengths"] == ["batch"]
    found = onnx_runner(tmp_path / "model.onnx")([u, lengths])[0]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    to_torch(model, tmp_path / "model.pt2", lengths=True, example=u)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(u, lengths), alone, atol=1e-5, rtol=1e-5)


def test_lengths_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"LRU.forward does not take them: leave it out"):
        to_onnx(LRU(4, 6), tmp_path / "a.onnx", lengths=True)
    with pytest.raises(ExportError, match="a step reads one input at a time"):
        to_torch(classifier(), tmp_path / "a.pt2", step=True, lengths=True)


@pytest.mark.slow
def test_s4_leaves_for_sequences_of_every_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = S4(3, 5, max_length=40)
    to_torch(layer, tmp_path / "s4.pt2")  # its own example is no longer than max_length
    to_onnx(layer, tmp_path / "s4.onnx")
    program, run = torch.export.load(tmp_path / "s4.pt2").module(), onnx_runner(tmp_path / "s4.onnx")
    with torch.no_grad():
        response = layer.double().filter(40)  # the definition: a sum over all inputs before
        for batch, length in ((1, 1), (3, 2), (2, 40)):
            u = torch.randn(batch, length, 3)
            past = torch.arange(length)[:, None] - torch.arange(length)
            matrix = torch.where(past[..., None] >= 0, response[past.clamp_min(0)], 0.0)
            expected = torch.einsum("tsh,bsh->bth", matrix, u.double()) + layer.D * u
            for found in (program(u), run([u])[0]):
                torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [False, True])
def test_a_long_convolution_has_no_graph(step: bool, tmp_path: Path) -> None:
    model = LanguageModel(9, 8, 0, 2, layer="hyena", max_length=32)
    with pytest.raises(ExportError, match=r"blocks.0.ssm.filter is a LongConvolution.*call compressm.distil"):
        to_torch(model, tmp_path / "a.pt2", step=step)


def test_an_example_may_have_the_forms_of_data(tmp_path: Path) -> None:
    u = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0))
    model = classifier()
    for data in (u, u.double().numpy(), u.mT, (u, torch.zeros(4)), DataLoader(list(u), 4), {"u": u}):  # type: ignore[arg-type]
        assert torch.equal(example_of(model, data), u)
    with pytest.raises(ConfigError, match=r"takes numbers of shape \(batch, length, 3\)"):
        to_torch(model, tmp_path / "b.pt2", example=torch.zeros(2, 5, 7))
    assert not (tmp_path / "b.pt2").exists()


@pytest.mark.slow
def test_an_export_is_checked_with_the_example(tmp_path: Path) -> None:
    u, model = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0)), classifier()
    report = to_torch(model, tmp_path / "a.pt2", example=(u.numpy(), [0] * 4))
    assert report.checked_steps == 9
    largest = max(float(model(part).detach().abs().max()) for part in (u, u[:1, :1]))
    assert report.largest_output == pytest.approx(largest, rel=1e-5)
