"""``layers=`` and ``exclude=``: the layers that are left out are not observed, not asked anything, and not changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressm
from compressm.adapters.registry import UnknownLayerWarning
from compressm.cutting import state_dims
from compressm.errors import InvalidRankRuleError, UnsupportedModelError
from compressm.lab.config import parse_config
from compressm.layers import LRU, Mamba


class Net(nn.Module):
    """A linear layer and three selective ones, of which the second is not called and the third is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = LRU(4, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), Mamba(4, 8)) for _ in range(3)])
        self.blocks[2].requires_grad_(False)

    def forward(self, u: Tensor) -> Tensor:
        u = self.blocks[0](self.first(u))
        return self.blocks[2](u)


NAMES = ["first", "blocks.0.1", "blocks.1.1", "blocks.2.1"]
CHOICES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a name": ({"exclude": "blocks.1.1"}, ["first", "blocks.0.1", "blocks.2.1"]),
    "a module around it": ({"exclude": ["blocks.1", "blocks.2"]}, ["first", "blocks.0.1"]),
    "a glob": ({"layers": "blocks.[02].*"}, ["blocks.0.1", "blocks.2.1"]),
    "names": ({"layers": ["first", "blocks.0.1"]}, ["first", "blocks.0.1"]),
    "a function": (
        {"exclude": lambda name, layer: not next(layer.parameters()).requires_grad or name == "blocks.1.1"},
        ["first", "blocks.0.1"],
    ),
    "both": ({"layers": "blocks.*", "exclude": ("blocks.1.1",)}, ["blocks.0.1", "blocks.2.1"]),
}


def trained(model: Net, steps: int = 4, **arguments: Any) -> compressm.Compressor:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    given = {"states": 3, "cuts": 1, "window": 3 / 40, **arguments}
    compressor = compressm.Compressor(model, optimizer, 40, **given)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step)).square().sum().backward()
        optimizer.step()
        compressor.step()
    return compressor


def batch(seed: int = 0) -> Tensor:
    return torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", CHOICES)
def test_only_the_chosen_layers_are_cut(how: str) -> None:
    choice, chosen = CHOICES[how]
    wanted = {name: 3 if name in chosen else 8 for name in NAMES}
    once = Net()
    before = copy.deepcopy(once.state_dict())
    report = compressm.compress(once, states=3, data=[batch()], **choice)
    assert [layer.name for layer in report.layers] == chosen
    assert state_dims(once) == wanted
    assert all(
        torch.equal(value, before[name]) or any(name.startswith(one) for one in chosen)
        for name, value in once.state_dict().items()
    )
    model = Net()
    compressor = trained(model, **choice)
    assert list(compressor.state_dims) == chosen
    assert state_dims(model) == wanted
    assert [layer.name for layer in compressm.analyze(Net(), data=[batch()], **choice)] == chosen


def test_without_a_choice_a_layer_that_is_not_called_stops_the_cut() -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.1"):
        compressm.compress(Net(), states=3, data=[batch()])


def test_nothing_is_asked_of_layers_that_are_left_out() -> None:
    model = Net()
    torch.nn.utils.parametrizations.spectral_norm(model.blocks[1][1].x_proj)  # type: ignore[union-attr, index]
    with pytest.raises(UnsupportedModelError, match="SpectralNorm"):
        compressm.Compressor(model, torch.optim.Adam(model.parameters()), 40, states=3)
    assert state_dims(model)["first"] == 8
    trained(model, exclude="blocks.1")
    assert state_dims(model) == {"first": 3, "blocks.0.1": 3, "blocks.1.1": 8, "blocks.2.1": 3}


def test_a_layer_without_an_adapter_that_is_left_out_is_not_warned_of() -> None:
    model = Net()
    model.blocks[1][1] = nn.Module()  # type: ignore[index]
    model.blocks[1][1].A_log = nn.Parameter(torch.zeros(2))  # type: ignore[union-attr, index]
    with pytest.warns(UnknownLayerWarning):
        compressm.analyze(model, data=[batch()])
    compressm.analyze(model, data=[batch()], exclude="blocks.1")  # warnings are errors here


@pytest.mark.filterwarnings("ignore:.*no more cuts will be tried")
def test_sums_and_roll_backs_and_followers_know_the_choice() -> None:
    model = Net()
    average = torch.optim.swa_utils.AveragedModel(model)
    compressor = trained(
        model, 3, exclude=["blocks.1", "blocks.2"], states=None, fraction=0.5, followers=[average], max_drop=0.1,
        evaluate=lambda one: float(state_dims(one)["first"] == 8), check_after=2,
    )  # fmt: skip
    cut = {"first": 4, "blocks.0.1": 4, "blocks.1.1": 8, "blocks.2.1": 8}
    assert state_dims(model) == cut
    assert list(state_dims(average).values()) == list(cut.values())
    for step in range(2):
        model(batch(step)).square().sum().backward()
        compressor.optimizer.step()
        compressor.step()
    assert [event.kind for event in compressor.history] == ["cut", "rolled_back", "stopped", "fell_short"]
    assert set(state_dims(model).values()) == {8}
    assert set(state_dims(average).values()) == {8}


def test_a_resumed_compressor_chooses_the_same_layers() -> None:
    model = Net()
    compressor = trained(model, exclude="blocks.[12]")
    state = compressor.state_dict()
    assert list(state["state_dims"]) == ["first", "blocks.0.1"]
    again = Net()
    resumed = compressm.Compressor(
        again, torch.optim.Adam(again.parameters()), 40, states=3, cuts=1, window=3 / 40, exclude="blocks.[12]"
    )
    resumed.load_state_dict(state)
    assert state_dims(again) == state_dims(model)
    other = Net()
    with pytest.raises(compressm.errors.CheckpointError, match="layers"):
        compressm.Compressor(other, torch.optim.Adam(other.parameters()), 40, states=3).load_state_dict(state)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such name": (
        {"exclude": "block.1"},
        r"^exclude='block\.1' names no layer; expected .* first, blocks\.0",
    ),
    "one of several": ({"layers": ["first", "nine"]}, r"^layers='nine' names no layer"),
    "nothing left": ({"exclude": "*"}, r"leave no layer of first, blocks\.0\.1"),
    "none": ({"layers": []}, r"leave no layer of first"),
    "a number": ({"layers": 3}, r"^layers must be the name of a layer .*; got 3$"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_choice_that_says_nothing_is_refused(how: str) -> None:
    arguments, message = REFUSED[how]
    model = Net()
    for call in (
        lambda: compressm.compress(model, states=3, data=[batch()], **arguments),
        lambda: compressm.analyze(model, data=[batch()], **arguments),
        lambda: compressm.Compressor(model, torch.optim.Adam(model.parameters()), 40, states=3, **arguments),
    ):
        with pytest.raises(InvalidRankRuleError, match=message):
            call()


def test_layers_whose_config_holds_one_number_are_not_torn_apart() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "state_size": 8, "num_hidden_layers": 3, "vocab_size": 32, "time_step_rank": 2}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    data = [{"input_ids": torch.arange(24).view(2, 12)}]
    exclude = "backbone.layers.1"
    with pytest.raises(InvalidRankRuleError, match=r"leave out backbone\.layers\.1\.mixer, .*per_layer=True"):
        compressm.compress(model, states=3, data=data, exclude=exclude)
    assert len(compressm.analyze(model, data=data, exclude=exclude)) == 2
    compressm.compress(model, states=3, data=data, exclude=exclude, per_layer=True)
    assert list(state_dims(model).values()) == [3, 8, 3]
    assert model.config.state_size == 8


def test_the_choice_ends_with_the_call() -> None:
    model = Net()
    compressm.compress(model, states=3, data=[batch()], exclude="blocks.1")
    with pytest.raises(InvalidRankRuleError):
        compressm.compress(model, states=2, data=[batch()], exclude="nothing")
    assert list(state_dims(model)) == NAMES


def test_a_configuration_file_chooses_layers() -> None:
    whole = {"data": {"name": "digits"}, "model": {"d_model": 4, "d_state": 8}, "run": {"steps": 1000}}
    config = parse_config({**whole, "compression": {"states": 4, "exclude": ["blocks.0"]}})
    assert config.compression.exclude == ["blocks.0"]
