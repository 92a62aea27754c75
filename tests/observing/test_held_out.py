"""Moments of the two halves of the data: which sequence is in which, and what they add up to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressm.errors import UnsupportedModelError
from compressm.layers import LRU, Mamba, SequenceClassifier
from compressm.observing.held_out import Dealer, HalvedStatistics, gather_halves, halved, joined, twice_readable
from compressm.observing.over_data import gather
from compressm.theory.recurrence import Moments


def model() -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(1, 3, 4, 4, 2, dropout=0.0, norm="layer", layer="mamba").eval()


def data(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 7, 1, generator=torch.Generator().manual_seed(seed))


def same(found: dict[str, Moments], expected: dict[str, Moments]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        for key, truth in value.tensors().items():
            torch.testing.assert_close(found[name].tensors()[key], truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[6], [3, 1, 2], [1, 1, 1, 1, 1, 1]])
def test_every_other_sequence_of_the_data_is_in_the_first_half(sizes: list[int]) -> None:
    net, whole = model(), data(6)
    halves = gather_halves(net, list(whole.split(sizes)))
    for which in (0, 1):
        same(halves[which], gather(net, whole[which::2]))
    same(joined(halves), gather(net, whole))
    assert all(halved(halves, name) for name in ("blocks.0.ssm", "blocks.1.ssm"))
    assert not torch.allclose(halves[0]["blocks.0.ssm"].P, halves[1]["blocks.0.ssm"].P)


def test_one_sequence_has_no_second_half() -> None:
    net, whole = model(), data(1)
    first, second = gather_halves(net, whole)
    same(first, gather(net, whole))
    for name, value in second.items():
        assert not halved((first, second), name)
        assert all(not bool(tensor.any()) for tensor in value.tensors().values())
        assert [t.shape for t in value.tensors().values()] == [t.shape for t in first[name].tensors().values()]


def test_layers_are_dealt_to_one_by_one() -> None:
    dealer = Dealer()
    assert dealer.halves("a", 3).tolist() == [0, 1, 0]
    assert dealer.halves("b", 2).tolist() == [0, 1]
    assert dealer.halves("a", 3).tolist() == [1, 0, 1]
    assert dealer.halves("a", 1).tolist() == [0]
    assert dealer.halves("b", 1).tolist() == [0]


def test_a_layer_that_no_data_reach_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = Mamba(4, 4), Mamba(4, 4)

        def forward(self, u: Tensor) -> Tensor:
            return self.used(u)

    with pytest.raises(UnsupportedModelError, match="'idle' is a selective layer, and what its states carry"):
        gather_halves(Idle(), torch.randn(2, 5, 4))
    statistics = HalvedStatistics(Idle())
    assert statistics.unseen == ["used", "idle"]


def test_models_without_selective_layers_have_no_moments() -> None:
    assert gather_halves(LRU(4, 4), "never read") == ({}, {})


def test_data_that_would_come_in_another_order_are_kept() -> None:
    whole, plain = data(6), LRU(1, 4)
    for given in (whole, whole.numpy(), [whole[:2], whole[2:]], (whole, torch.zeros(6)), {"u": whole}):
        assert twice_readable(model(), given) is given
        assert twice_readable(plain, given) is given
    loader = DataLoader(TensorDataset(whole), 2, shuffle=True)
    kept = twice_readable(model(), loader)
    assert isinstance(kept, list)
    assert len(kept) == 3
    assert torch.equal(torch.cat([batch[0] for batch in kept]).sort(0).values, whole.sort(0).values)
    assert twice_readable(plain, loader) is loader  # in any order it is the same for a layer that needs no data
    for net in (model(), plain):
        once = twice_readable(net, iter(whole.split(2)))  # cannot be read a second time
        assert isinstance(once, list)
        assert torch.equal(torch.cat(once), whole)
    assert twice_readable(model(), 3) == 3  # refused later, where data are read
    assert twice_readable(model(), "data.npz") == "data.npz"
