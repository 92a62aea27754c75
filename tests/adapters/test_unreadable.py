"""Layers whose values are not there, or packed, and wrappers that run copies: refused before anything begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressm
from compressm.errors import UnsupportedModelError
from compressm.layers import LRU, Mamba

DATA = [torch.randn(2, 6, 4)]


def calls(model: nn.Module) -> Iterator[Callable[[], Any]]:
    """Every way to begin."""
    trained = [one for one in model.parameters() if one.requires_grad]
    yield lambda: compressm.Compressor(model, torch.optim.Adam(trained), 40, states=3)
    yield lambda: compressm.compress(model, states=3, data=DATA)
    yield lambda: compressm.analyze(model, data=DATA)


class Int8Linear(nn.Module):
    """A linear map with its weight in eight bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1) / 127
        self.weight = nn.Parameter((weight / self.scale[:, None]).round().to(torch.int8), requires_grad=False)

    def forward(self, u: Tensor) -> Tensor:
        return u @ (self.weight * self.scale[:, None]).T


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(Mamba(4, 8))


def offloaded() -> nn.Module:
    return pytest.importorskip("accelerate").cpu_offload(nn.Sequential(Mamba(4, 8)), torch.device("cpu"))


def int8() -> nn.Module:
    model = nn.Sequential(Mamba(4, 8))
    model[0].x_proj = Int8Linear(model[0].x_proj)  # type: ignore[assignment, arg-type]
    model(DATA[0])
    return model


def packed_by_torch() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(Mamba(4, 8)), {nn.Linear}, dtype=torch.qint8)


def of_bitsandbytes() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(Mamba(64, 8))
    old: Any = model[0].in_proj
    new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
    new.load_state_dict(old.state_dict())
    model[0].in_proj = new
    return model.to("cpu")


def of_torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(Mamba(64, 8))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (on_meta, r"^0\.A_log is on the meta device .*to_empty"),
    "offloaded": (offloaded, r"^0\.A_log is offloaded by accelerate .*device_map=None"),
    "int8": (int8, r"^0\.x_proj\.weight is quantised \(Parameter of torch\.int8\).*quantise the smaller one.*exclude="),
    "packed by torch": (packed_by_torch, r"^0\.in_proj is quantised \(Linear\).*quantise the smaller one"),
    "bitsandbytes": (of_bitsandbytes, r"^0\.in_proj\.weight is quantised \(Params4bit.*modules_to_not_convert"),
    "torchao": (of_torchao, r"^0\.in_proj\.weight is quantised \(.*quantise the smaller one"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation:UserWarning")  # of torch
@pytest.mark.parametrize("how", MODELS)
def test_layers_without_readable_values_are_refused_with_the_remedy(how: str) -> None:
    make, message = MODELS[how]
    model = make()
    for call in calls(model):
        with pytest.raises(UnsupportedModelError, match=message):
            call()


def test_a_quantised_layer_that_is_left_out_stops_nothing() -> None:
    quantised = int8()
    model = nn.Sequential(quantised[0], Mamba(4, 8))  # type: ignore[index]
    report = compressm.compress(model, states=3, data=DATA, exclude="0")
    assert [layer.outcome for layer in report.layers] == ["cut"]


def test_data_parallel_is_refused_where_layers_are_observed() -> None:
    model = nn.DataParallel(nn.Sequential(Mamba(4, 8)))
    for call in calls(model):
        with pytest.raises(UnsupportedModelError, match=r"DataParallel.*pass its \.module.*DistributedDataParallel"):
            call()
    linear = nn.Sequential(nn.DataParallel(LRU(4, 8)))
    with pytest.raises(UnsupportedModelError, match=r"^0 is a torch\.nn\.DataParallel"):
        next(calls(linear))()
    assert len(compressm.analyze(linear)) == 1  # reads parameters only
    assert compressm.compress(linear, states=3).layers[0].states_after == 3


def test_a_model_on_devices_that_accelerate_named_is_cut() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(nn.Sequential(Mamba(4, 8)), {"": "cpu"}, force_hooks=True)
    report = compressm.compress(model, states=3, data=DATA)
    assert report.layers[0].states_after == 3
    model(DATA[0])
