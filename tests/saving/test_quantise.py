"""8-bit files against the model they were made from: the error of whole simulations stays where the user says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compressm
from compressm.cli import main
from compressm.errors import ExportError
from compressm.layers import LRU, SequenceClassifier
from compressm.saving.export import flatten_state, onnx_runner, to_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from compressm.saving.quantise import PRECISIONS, Quantised, quantise  # noqa: E402


class Simulator(nn.Module):
    """A slow system whose outputs are small differences of large numbers: 8 bits are too few for some of its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.ssm, self.decoder = nn.Linear(1, 6), LRU(6, 8, r_min=0.98, r_max=0.995), nn.Linear(6, 1)
        with torch.no_grad():
            self.decoder.weight.copy_(torch.tensor([[1.0, -1.0, 0.5, -0.5, 0.01, 0.02]]))
            self.encoder.weight[:4] = torch.tensor([[3.0], [3.0], [2.0], [2.0]])

    def forward(self, u: Tensor) -> Tensor:
        z = self.encoder(u)
        return self.decoder(z + 0.1 * self.ssm(z))

    def initial_state(self, batch: int) -> Tensor:
        return self.ssm.initial_state(batch)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(u)
        y, state = self.ssm.step(z, state)
        return self.decoder(z + 0.1 * y), state


LENGTH = 300


def sequences() -> Tensor:
    """Random walks about a level far from zero: nothing like the noise that is drawn where no data are given."""
    return 10 + 0.2 * torch.randn(2, LENGTH, 1, generator=torch.Generator().manual_seed(3)).cumsum(1)


def simulated(path: Path, u: Tensor) -> Tensor:
    run, state, outputs = onnx_runner(path), list(flatten_state(Simulator().initial_state(len(u))).values()), []
    for now in u.unbind(1):
        y, *state = run([now.contiguous(), *state])
        outputs.append(y)
    return torch.stack(outputs, 1)


def error_of(path: Path, u: Tensor | None = None) -> float:
    """By the definition, from the whole forward pass in double precision."""
    u = sequences() if u is None else u
    with torch.no_grad():
        expected = Simulator().double()(u.double())
    spread = (expected - expected.mean()).square().sum()
    return float(((simulated(path, u) - expected).square().sum() / spread) ** 0.5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "whole.onnx"
    report = to_onnx(Simulator(), path, step=True, example=sequences())
    assert report.calibrated
    assert report.relative_error < 1e-5
    return path


@pytest.fixture(scope="module")
def made(whole: Path) -> Callable[[float], tuple[Path, Quantised]]:
    def make(tolerance: float) -> tuple[Path, Quantised]:
        target = whole.with_name(f"{tolerance}.onnx")
        return target, quantise(whole, target, error_of, tolerance, {})

    return make


def test_everything_in_8_bits_is_badly_wrong_here(made: Callable[[float], tuple[Path, Quantised]]) -> None:
    path, result = made(1e9)
    assert set(result.precisions.values()) == {"int8"}
    assert error_of(path) > 0.08
    assert result.error == error_of(path)


@pytest.mark.parametrize("tolerance", [0.05, 0.02, 0.01])
def test_the_error_of_the_file_stays_below_what_was_allowed(
    tolerance: float, made: Callable[[float], tuple[Path, Quantised]], whole: Path
) -> None:
    path, result = made(tolerance)
    assert error_of(path) <= tolerance
    assert result.error == error_of(path)
    assert set(result.precisions) == set(result.costs)
    stored = {node.op_type for node in onnx.load(path).graph.node}
    kinds = set(result.precisions.values())
    assert kinds <= set(PRECISIONS)
    assert ("DynamicQuantizeLinear" in stored) == ("int8" in kinds)
    assert kinds != {"int8"}
    # The dearest layer is not the one that was left in 8 bits.
    dearest = max(result.costs, key=result.costs.__getitem__)
    assert result.precisions[dearest] != "int8"


def test_costs_are_those_of_each_layer_alone(
    made: Callable[[float], tuple[Path, Quantised]], whole: Path, tmp_path: Path
) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    _, result = made(0.05)
    names = {"encoder.weight": "node_linear", "decoder.weight": "node_linear_1"}
    assert set(names) <= set(result.costs)
    for layer, node in names.items():
        alone = tmp_path / "alone.onnx"
        nodes = [node, f"{node}_MatMul"]
        quantize_dynamic(whole, alone, weight_type=QuantType.QInt8, per_channel=True, nodes_to_quantize=nodes)
        assert result.costs[layer] == pytest.approx(error_of(alone), rel=1e-6)


def test_weights_alone_in_8_bits_are_rounded_to_the_nearest_of_their_channel(
    made: Callable[[float], tuple[Path, Quantised]], whole: Path
) -> None:
    path, result = made(0.01)
    assert "int8 weights" in result.precisions.values()
    before = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(whole).graph.initializer}
    graph = onnx.load(path).graph
    after = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    restored = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert restored
    for node in restored:
        axis = next(one.i for one in node.attribute if one.name == "axis")
        weight = before[node.input[0].partition("/")[0]]
        integers, scales = (after[name] for name in node.input)
        assert integers.dtype == np.int8
        assert node.input[0].partition("/")[0] not in after  # the float copy is gone
        scales = np.expand_dims(scales, 1 - axis)
        assert (np.abs(integers * scales - weight) <= scales / 2 * (1 + 1e-5)).all()


def test_an_error_that_cannot_be_kept_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"int8_error = 1e-09: .*rounding a single layer changes the outputs by at least"
    ):
        quantise(whole, tmp_path / "none.onnx", error_of, 1e-9, {})
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ExportError, match="int8_error must be a positive number"):
            to_onnx(Simulator(), tmp_path / "none.onnx", step=True, int8=True, int8_error=bad)
    assert "none.onnx" not in [path.name for path in tmp_path.iterdir()]


class BesideLargeUnits(Simulator):
    """The simulation, after an output in large units that no rounding reaches, and about another level."""

    def forward(self, u: Tensor) -> Tensor:
        return torch.cat([300 * u, super().forward(u) + 50], -1)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = super().step(u, state)
        return torch.cat([300 * u, y + 50], -1), state


def test_an_output_in_small_units_counts_as_much_as_one_in_large_units(tmp_path: Path) -> None:
    u = sequences()
    report = to_onnx(BesideLargeUnits(), tmp_path / "two.onnx", step=True, int8=True, example=u, int8_error=0.02)
    with torch.no_grad():
        expected = BesideLargeUnits().double()(u.double()).flatten(0, 1)
    difference = simulated(tmp_path / "two.onnx", u).flatten(0, 1) - expected
    each = (difference.square().mean(0) / expected.var(0, correction=0)).sqrt()
    assert float(each[1]) < 0.02 * 2**0.5
    assert report.relative_error == pytest.approx(float(each.square().mean().sqrt()), rel=1e-3)


def test_the_report_says_what_was_kept_and_what_it_would_have_cost(tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    report = to_onnx(Simulator(), path, step=True, int8=True, example=sequences())
    assert report.relative_error == pytest.approx(error_of(path), rel=1e-3)
    assert report.relative_error <= 0.02
    kept = {name: how for name, how in report.precisions.items() if how != "int8"}
    assert kept
    for name, how in kept.items():
        assert f"{name}: {how}; int8 alone would cost {report.costs[name]:.2%}" in str(report)
    assert "of their standard deviation on the given sequences" in str(report)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.onnx"]


@pytest.mark.slow
def test_command_line_checks_with_the_users_sequences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    compressm.save(SequenceClassifier(1, 3, d_model=4, d_state=4), tmp_path / "saved")
    np.savez(tmp_path / "data.npz", x=sequences().numpy())
    arguments = ["export", str(tmp_path / "saved"), "--step", "--int8", "--data", str(tmp_path / "data.npz")]
    assert main([*arguments, "--int8-error", "0.2"]) == 0
    said = capsys.readouterr().out
    assert f"over {LENGTH} steps" in said
    assert "on the given sequences" in said
    for wrong, message in (
        (["--int8-error", "0"], "int8_error must be a positive number"),
        (["--data", "no.npz"], "no.npz"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
    np.savez(tmp_path / "y.npz", y=np.zeros(3))
    assert main([*arguments, "--data", str(tmp_path / "y.npz")]) == 2
    assert "y.npz" in capsys.readouterr().err
