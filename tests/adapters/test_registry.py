"""Which adapter a layer gets, and what is said of layers that have none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressm.adapters import (
    LayerAdapter,
    LRUAdapter,
    MambaAdapter,
    find_layers,
    layers_that_need_data,
    register,
    registry,
)
from compressm.adapters.registry import UnknownLayerWarning, tell_written
from compressm.errors import UnsupportedModelError
from compressm.layers import LRU, Mamba
from compressm.theory.recurrence import Signals


class Mine(LRU):
    pass


class Below(Mine):
    pass


class MineAdapter(LRUAdapter):
    def __init__(self, kind: Any) -> None:
        self.layer_type = kind
        self.told: list[nn.Module] = []

    def written(self, model: nn.Module) -> None:
        self.told.append(model)


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def adapter_of(layer: nn.Module) -> LayerAdapter:
    return find_layers(layer)[""][1]


def test_the_nearest_class_decides_and_the_last_adapter_for_it() -> None:
    assert type(adapter_of(Below(4, 4))) is LRUAdapter  # of the class above
    by_name = MineAdapter(f"{__name__}.Mine")
    register(by_name)
    assert adapter_of(Mine(4, 4)) is adapter_of(Below(4, 4)) is by_name
    assert type(adapter_of(LRU(4, 4))) is LRUAdapter
    later = MineAdapter(f"{__name__}.Mine")
    register(later)
    assert adapter_of(Mine(4, 4)) is later
    by_class = MineAdapter(Mine)
    register(by_class)
    assert adapter_of(Below(4, 4)) is by_class  # the class itself comes before its name


def test_layers_are_found_by_name_and_those_that_need_data_apart() -> None:
    model = nn.ModuleDict({"a": LRU(4, 4), "b": nn.Sequential(nn.Linear(4, 4), Mamba(4, 4))})
    found = find_layers(model)
    assert list(found) == ["a", "b.1"]
    assert found["a"][0] is model["a"]
    assert type(found["b.1"][1]) is MambaAdapter
    assert list(layers_that_need_data(model)) == ["b.1"]


def test_adapters_are_told_once_that_layers_were_written() -> None:
    one, other = MineAdapter(Mine), MineAdapter(LRU)
    register(one)
    register(other)
    model = nn.Sequential(Mine(4, 4), LRU(4, 4), Mine(4, 4))
    tell_written(model)
    assert one.told == other.told == [model]


class Lookalike(nn.Module):
    def __init__(self, name: str = "A_log") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(2)))


@pytest.mark.parametrize("name", ["A_log", "log_A_real", "Lambda_re", "nu_log"])
def test_layers_that_look_like_state_space_layers_are_named(name: str) -> None:
    model = nn.Sequential(LRU(4, 4), Lookalike(name), nn.Linear(1, 1))
    with pytest.warns(UnknownLayerWarning, match=r"^no adapter is known for 1 \(Lookalike\), which look like") as seen:
        assert list(find_layers(model)) == ["0"]
    assert len(seen) == 1
    assert seen[0].filename == __file__  # the caller's line
    with pytest.raises(UnsupportedModelError, match=r"^no adapter is known for the model itself \(Lookalike\), which"):
        find_layers(Lookalike(name))


def test_of_many_three_are_named_and_the_others_counted() -> None:
    text = r"for 0 \(Lookalike\), 1 \(Lookalike\), 2 \(Lookalike\)"
    for count, more in ((3, ", which"), (4, " and 1 more, which"), (6, " and 3 more, which")):
        with pytest.raises(UnsupportedModelError, match=text + more):
            find_layers(nn.Sequential(*(Lookalike() for _ in range(count))))


def test_a_model_without_such_layers_is_told_what_is_known() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        find_layers(nn.Sequential(nn.Linear(2, 2)))
    text = str(caught.value)
    assert text.startswith("Sequential has no state space layer (known: ")
    known = text.partition("(known: ")[2].partition(")")[0].split(", ")
    assert known == sorted(known)
    assert {"LRU", "S5", "Mamba", "MambaMixer", "DeltaNet"} <= set(known)  # without their packages


class Held:
    """A cache that says how much it holds."""

    def __init__(self, length: int, **attributes: Any) -> None:
        self.length = length
        self.__dict__.update(attributes)

    def get_seq_length(self) -> int:
        return self.length


class Bare:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Selective(MambaAdapter):
    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        raise AssertionError

    def plan(self, values: Mapping[str, Tensor], reduction: Any) -> Any:
        raise AssertionError


CARRIERS = ("cache_params", "past_key_values", "past_key_value", "inference_params", "initial_state", "initial_states")


@pytest.mark.parametrize("name", CARRIERS)
def test_calls_that_go_on_from_a_state_are_refused_and_fresh_caches_are_not(name: str) -> None:
    adapter, layer = Selective(), Mamba(4, 4)
    assert adapter.carried(layer, {"hidden_states": torch.zeros(1)}) is None
    for fresh in (None, Held(0), [], {}, Bare(seqlen_offset=0)):
        assert adapter.carried(layer, {name: fresh}) is None
    for used in (Held(3), [1], {"a": 1}, Bare(seqlen_offset=2), Bare(), torch.zeros(2), torch.zeros(0)):
        with pytest.raises(
            UnsupportedModelError, match=f"goes on from the state in {name}, which .* for Mamba; gather"
        ):
            adapter.carried(layer, {name: used})
    with pytest.raises(NotImplementedError, match=r"Selective\.carried reads states"):
        adapter.signals_after(layer, torch.zeros(1, 2, 4), object())


def test_what_an_adapter_does_unless_it_says_otherwise() -> None:
    class Plain(Selective):
        folds_into, folds_out, rotates = True, False, True

    layer = Mamba(4, 4)
    assert Plain().maps(layer) == (True, False, True)
    assert Plain().system(layer) is None
    assert (Plain.needs_data, Plain.uniform, LRUAdapter.needs_data, LRUAdapter.uniform) == (True, False, False, False)
    u = torch.randn(1, 3, 4)
    assert torch.equal(Plain().run(layer, u), layer(u))

    Plain().written(layer)  # nothing to update
    with pytest.raises(UnsupportedModelError, match="Mamba is balanced with moments of data, and there are none"):
        Plain().balance(layer)
