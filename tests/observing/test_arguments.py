"""Arguments of calls: their names, the sequences that are packed in them, and values that are not finite."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressm.observing.hooks import OwnHook
from compressm.observing.layer_calls import in_backward, named_arguments, not_finite, sequence_starts, unpacked


class Named(nn.Module):
    def forward(self, u: Tensor, /, lengths: Any = None, *rest: Any, scale: float = 1.0, **more: Any) -> Tensor:
        return u


class Builtin(nn.Module):
    forward = torch.relu  # type: ignore[assignment] # has no signature


def test_arguments_have_the_names_of_the_forward_or_their_places() -> None:
    layer = Named()
    assert named_arguments(layer, (1,), {}) == {"u": 1}
    assert named_arguments(layer, (1, 2), {"scale": 3}) == {"u": 1, "lengths": 2, "scale": 3}
    assert named_arguments(layer, (1, 2, 3, 4), {}) == {"u": 1, "lengths": 2, "argument 2": 3, "argument 3": 4}
    assert list(named_arguments(layer, (1,), {"mask": 5, "lengths": 6})) == ["u", "mask", "lengths"]
    assert named_arguments(Builtin(), (1, 2), {"a": 3}) == {"argument 0": 1, "argument 1": 2, "a": 3}


def test_packed_sequences_begin_where_their_number_changes_or_where_it_is_said() -> None:
    hidden = torch.zeros(2, 6, 3)
    numbers = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3]])
    starts = sequence_starts(hidden, {"seq_idx": numbers})
    assert starts is not None
    assert starts.tolist() == [[True, False, True, False, False, True], [True] + [False] * 5]
    places = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    row = sequence_starts(hidden[:1], {"cu_seqlens": places})
    assert row is not None
    assert row.tolist() == [starts[0].tolist()]
    for nothing in ({}, {"seq_idx": numbers[:, :5]}, {"seq_idx": [0]}, {"cu_seqlens": places}, {"cu_seqlens": [0, 6]}):
        assert sequence_starts(hidden, nothing) is None


def test_packed_sequences_are_put_one_below_the_other() -> None:
    packed = torch.arange(12.0).view(2, 6, 1) + 1
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[[0, 0, 0, 1], [0, 2, 5, 0]] = True
    assert unpacked(packed, starts)[..., 0].tolist() == [
        [1, 2, 0, 0, 0, 0],
        [3, 4, 5, 0, 0, 0],
        [6, 0, 0, 0, 0, 0],
        [7, 8, 9, 10, 11, 12],
    ]
    assert unpacked(packed[..., 0], starts).shape == (4, 6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_argument_that_is_not_finite_is_named_with_its_place(bad: float) -> None:
    good, one, two = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)
    one[1, 2] = bad
    two[0, 1] = two[1, 0] = bad
    whole = torch.tensor([1, 2])
    assert not_finite({"a": good, "b": whole, "c": "text", "d": None, "e": [good, {"f": good}]}) is None
    assert not_finite({"a": good, "x": one}) == "x has 1 entry that is not finite, the first at [1, 2]"
    assert not_finite({"x": two, "y": one}) == "x has 2 entries that are not finite, the first at [0, 1]"
    assert not_finite({"x": two * 1j}) is not None
    assert (
        not_finite({"batch": {"u": [good, one]}}) == "batch['u'][1] has 1 entry that is not finite, the first at [1, 2]"
    )
    assert not_finite({"pair": (good, two)}) == "pair[1] has 2 entries that are not finite, the first at [0, 1]"
    assert not_finite({"x": one.requires_grad_()}) is not None


def test_copies_of_a_model_have_no_hooks_of_the_observer() -> None:
    class Counting(OwnHook):
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, *_: Any) -> None:
            self.calls += 1

    layer, hook = nn.Linear(2, 2), Counting()
    layer.register_forward_pre_hook(hook)
    twin = copy.deepcopy(layer)
    x = torch.ones(1, 2)
    assert torch.equal(twin(x), layer(x))
    assert hook.calls == 1


def test_it_is_known_when_autograd_runs() -> None:
    seen: list[bool] = []
    x = torch.ones(1, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda _: seen.append(in_backward()))
    assert not in_backward()
    y.sum().backward()
    assert seen == [True]
    assert not in_backward()
