"""A layer's call as it is kept until the backward pass: what is in it, and a part of its batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressm.adapters import find_layers
from compressm.layers import LRU, Mamba
from compressm.observing import adjoints
from compressm.observing.calls import LinearCall, SelectiveCall, as_evidence, call_of_layer
from compressm.observing.masks import mask_gradients
from compressm.theory.evidence import Covariances
from compressm.theory.fisher import MaskFisher

PRESENT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
LENGTHS = torch.tensor([3, 4, 1])


class Padded(LRU):
    def forward(self, u: Tensor, lengths: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(u)


def call_of(layer: nn.Module, *args: Any, present: Tensor | None = None, **kwargs: Any) -> Any:
    return call_of_layer(layer, find_layers(layer)[""][1], args, kwargs, present)


def hidden(requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 4, generator=generator).requires_grad_(requires_grad)


def test_a_linear_layers_call_has_its_input_its_padding_and_its_lengths() -> None:
    layer, u = Padded(4, 4), hidden(True)
    by_name = ({"u": u, "lengths": LENGTHS}, {"lengths": LENGTHS, "u": u})
    named = [call_of(layer, **given, present=PRESENT) for given in by_name]
    for call in (call_of(layer, u, LENGTHS, present=PRESENT), *named):
        assert isinstance(call, LinearCall)
        assert call.layer is layer
        assert torch.equal(call.u, u)
        assert not call.u.requires_grad
        assert call.present is PRESENT
        assert call.lengths is LENGTHS
        assert call.system.n == 4
        two = call.first(2)
        assert (torch.equal(two.u, u[:2]), two.lengths.tolist(), two.present.tolist()) == (
            True,
            [3, 4],
            PRESENT[:2].tolist(),
        )
        assert two.system is call.system
        assert call.first(None).u.shape == u.shape
    plain = call_of(layer, u, [3, 4, 1])  # lengths that are no tensor are not the layer's
    assert plain.present is plain.lengths is None
    assert plain.first(1).lengths is plain.first(1).present is None
    assert plain.finite()
    assert not call_of(layer, torch.full((1, 2, 4), math.inf)).finite()


def test_calls_of_a_linear_layer_in_one_pass_add_tokens_and_no_sequences() -> None:
    layer, u = Padded(4, 4).double(), hidden().double()
    call, g = call_of(layer, u, LENGTHS, present=PRESENT), torch.randn(3, 4, 4, dtype=torch.float64)
    once = call.run(g, None)
    twice = call.run(g, once)
    assert isinstance(once, Covariances)
    assert (float(once.tokens), float(once.sequences)) == (8, 3)
    assert (float(twice.tokens), float(twice.sequences)) == (16, 3)
    torch.testing.assert_close(twice.states, 2 * once.states)
    assert as_evidence(once) is once


class Called(Mamba):
    def forward(self, u: Tensor, weight: Any = None, cache_params: Any = None, **_: Any) -> Tensor:  # type: ignore[override]
        return super().forward(u)


def test_a_selective_layers_call_has_all_arguments_but_caches() -> None:
    layer, u, weight = Called(4, 5), hidden(True), torch.ones(3, 2, requires_grad=True)
    call = call_of(
        layer, u, weight, cache_params="state", past_key_values=1, past_key_value=2, flag=True, present=PRESENT
    )
    assert isinstance(call, SelectiveCall)
    assert call.layer is layer
    assert call.adapter is find_layers(layer)[""][1]
    assert call.batch == 3
    assert call.kwargs == {"cache_params": None, "past_key_values": None, "past_key_value": None, "flag": True}
    assert all(torch.equal(a, b) for a, b in zip(call.args, (u, weight), strict=True))
    assert not any(value.requires_grad for value in call.args)
    assert call.present is PRESENT
    by_name = call_of(layer, cache_params=None, u=u)
    assert by_name.args == ()
    assert torch.equal(by_name.kwargs["u"], u)
    assert by_name.batch == 3


def test_a_part_of_a_batch_is_a_part_of_all_that_has_a_row_per_sequence() -> None:
    layer, u = Called(4, 5), hidden()
    scalar, other, table = torch.tensor(3.0), torch.ones(3, 2), torch.ones(5, 3)
    call = call_of(layer, u, other, scale=scalar, table=table, rows=other, name="a", present=PRESENT)
    part = call.first(2)
    assert part.batch == 2
    assert torch.equal(part.args[0], u[:2])
    assert part.args[1].shape == part.kwargs["rows"].shape == (2, 2)
    assert torch.equal(part.kwargs["scale"], scalar)
    assert torch.equal(part.kwargs["table"], table)
    assert part.kwargs["name"] == "a"
    assert torch.equal(part.present, PRESENT[:2])
    assert (part.layer, part.adapter, part.precision) == (call.layer, call.adapter, call.precision)
    for all_of_them in (None, 3, 4):
        assert call.first(all_of_them) is call
    assert call_of(layer, u).first(1).present is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_only_inputs_of_a_selective_layer_must_be_finite(bad: float) -> None:
    layer, u = Called(4, 5), hidden()
    whole, mask = torch.ones(3, 4, 4, dtype=torch.int64), torch.full((3, 4), bad)
    assert call_of(layer, u, whole, mask=mask, name="a").finite()
    assert not call_of(layer, u, torch.full((3, 4, 4), bad)).finite()
    assert not call_of(layer, u, other=torch.full((3, 4, 4), bad)).finite()
    assert not call_of(layer, torch.cat([u[:2], torch.full((1, 4, 4), bad)])).finite()


def test_gradients_of_calls_in_one_pass_add_up() -> None:
    layer, u = Mamba(4, 5).double(), hidden().double()
    adapter = find_layers(layer)[""][1]
    call, g = call_of(layer, u), torch.randn(3, 4, 4, dtype=torch.float64)
    once = call.run(g, None)
    expected = mask_gradients(layer, adapter, (u,), {}, g)
    assert once.shape == (3, 1, 5, 5)
    assert once.dtype == torch.float64
    torch.testing.assert_close(once, expected)
    torch.testing.assert_close(call.run(2 * g, once), 3 * once)
    torch.testing.assert_close(call.run(g, once[..., :4, :4]), once)  # from before a cut
    fisher = as_evidence(once)
    assert isinstance(fisher, MaskFisher)
    diagonal = once.diagonal(dim1=-2, dim2=-1).flatten(1)
    torch.testing.assert_close(fisher.products.flatten(2).flatten(0, 1), diagonal.mT @ diagonal)


def test_a_call_is_repeated_with_the_precision_that_it_had() -> None:
    layer, u = Mamba(4, 5), hidden()
    with torch.autocast("cpu", torch.bfloat16):
        half = call_of(layer, u)
    whole = call_of(layer, u)
    with half.precision():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), whole.precision():
        pass
    with whole.precision():
        assert not torch.is_autocast_enabled("cpu")
    g = torch.randn(3, 4, 4)
    assert half.run(g, None).dtype == torch.float64
    assert not torch.equal(half.run(g, None), whole.run(g, None))


@pytest.mark.parametrize(
    ("limit", "sizes"), [(1, [1] * 5), (79, [1] * 5), (80, [2, 2, 1]), (119, [2, 2, 1]), (200, [5])]
)
@pytest.mark.parametrize("padded", [False, True])
def test_sequences_are_read_a_few_at_a_time(
    limit: int, sizes: list[int], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # States of one sequence: 2 parts of 5 states at each of 4 tokens are 40 numbers.
    monkeypatch.setattr(adjoints, "_BLOCK", limit)
    u, g, present = torch.randn(5, 4, 3), torch.randn(5, 4, 2), torch.rand(5, 4) > 0.5
    reading = adjoints.Reading(u, g, torch.ones(2, 5), present if padded else None)
    blocks = list(adjoints._blocks(reading, 5))
    assert [len(block.u) for block in blocks] == sizes
    assert torch.equal(torch.cat([block.u for block in blocks]), u)
    assert torch.equal(torch.cat([block.g for block in blocks]), g)
    assert all(block.C is reading.C for block in blocks)
    if padded:
        assert torch.equal(torch.cat([block.present for block in blocks]), present)  # type: ignore[misc]
    else:
        assert all(block.present is None for block in blocks)
