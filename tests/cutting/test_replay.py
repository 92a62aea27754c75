"""The error of a cut on data, against the layer before and after run by hand on what it read."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from compressm.adapters.changes import write
from compressm.cutting import plan_reduction
from compressm.cutting.replay import errors_on_data, relative
from compressm.layers import LRU, Bidirectional, Mamba, SequenceClassifier
from compressm.observing.over_data import gather
from compressm.theory.rank_rule import RankRule


class Untold(nn.Module):
    """Hands its layer no lengths, so that whole rows are reversed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor) -> Tensor:
        return self.layer(u)


@torch.no_grad()
@pytest.mark.parametrize("told", [True, False])
def test_padding_is_left_out_in_the_order_in_which_each_layer_reads_it(told: bool) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(2, 4, 6, 8, 1, dropout=0.0, norm="layer", vocabulary=6)
    both = Bidirectional(LRU(6, 8), Mamba(6, 8))
    model.blocks[0].ssm = both if told else Untold(both)
    model.double().eval()
    tokens = torch.tensor([[1, 2, 3, 4, 5, 1, 2, 3], [3, 4, 5, 0, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0, 0]])
    present = (tokens != 0).double()
    plan = plan_reduction(model, RankRule(states=3), moments=gather(model, [tokens]))
    assert len(plan.changes) == 2
    found = errors_on_data(model, plan.changes, [tokens])
    read: dict[str, Tensor] = {}
    layers = {name: model.get_submodule(name) for name in plan.changes}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: read.__setitem__(name, args[0]))
    model(tokens)
    for name, layer in layers.items():
        smaller = copy.deepcopy(layer)
        write(smaller, plan.changes[name])
        u = read[name]
        y, other = layer(u), smaller(u)
        counts = present.flip(1) if name.endswith("backwards") and not told else present
        changed, power = ((x.square().sum(-1) * counts).sum() for x in (other - y, y))
        assert found[name].on_data == pytest.approx(float((changed / power).sqrt()), rel=1e-9)


class StateCache(list[int]):
    """A cache, into which a layer writes."""


class Caching(LRU):
    """Writes into the cache that it is given, and returns more than its output."""

    def forward(
        self, u: Tensor, cache: StateCache | None = None, more: StateCache | None = None, use_cache: bool = True
    ):  # type: ignore[override]
        for one in (cache, more):
            if one is not None:
                one.append(self.d_state)
        output = super().forward(u)
        return {"count": torch.tensor(3), "hidden": output, "wrote": use_cache}


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.caches = Caching(3, 8), (StateCache(), StateCache())

    def forward(self, u: Tensor) -> Tensor:
        return self.layer(u, self.caches[0], more=self.caches[1], use_cache=True)["hidden"]


@torch.no_grad()
def test_the_smaller_copy_does_not_get_the_caches_of_the_layer() -> None:
    torch.manual_seed(0)
    model, u = Around().double(), torch.randn(2, 9, 3, dtype=torch.float64)
    plan = plan_reduction(model, RankRule(states=3))
    (found,) = errors_on_data(model, plan.changes, [u]).values()
    assert [list(cache) for cache in model.caches] == [[8], [8]]  # by the model's own call
    y, smaller = model(u), copy.deepcopy(model)
    write(smaller.layer, plan.changes["layer"])
    assert found.on_data == pytest.approx(float((smaller(u) - y).norm() / y.norm()), rel=1e-9)
    assert found.held_out is None


@pytest.mark.parametrize(("changed", "before", "expected"), [(2.0, 8.0, 0.5), (0.0, 0.0, 0.0), (1.0, 0.0, math.inf)])
def test_an_error_is_relative_to_what_was_there(changed: float, before: float, expected: float) -> None:
    assert relative(changed, before) == expected
