"""Several sequences in one row of a layer: outputs and gradients are those of the sequences one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compressm.layers.activations import causal_conv
from compressm.layers.packing import starts_of, steps_since
from packed_rows import LAYERS, SEQ_IDX, alone


def test_steps_since_the_start() -> None:
    expected = [[*range(5), 0, 0, 1, *range(12)], list(range(20))]
    starts = starts_of(SEQ_IDX)
    assert starts is not None
    assert steps_since(starts).tolist() == expected
    assert starts_of(None) is None


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("taps", [1, 4])
def test_the_convolution_does_not_reach_over_a_start(taps: int, compiled: bool, monkeypatch: Any) -> None:
    if not compiled:
        monkeypatch.setattr("compressm.layers.activations.takes", lambda *_: False)
    conv = nn.Conv1d(5, 5, taps, groups=5).double()
    u, weight = torch.randn(2, 2, 20, 5, dtype=torch.float64)
    leaves = (u.requires_grad_(), *conv.parameters())
    packed = causal_conv(conv, u, starts_of(SEQ_IDX))
    separate = torch.cat([torch.cat([causal_conv(conv, piece) for piece in row], 1) for row in alone(u)])
    torch.testing.assert_close(packed, separate)
    for a, b in zip(*(torch.autograd.grad(y, leaves, weight) for y in (packed, separate)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_packed_sequences_apart(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    u, weight = torch.randn(2, 2, 20, 8, dtype=torch.float64)
    leaves = (u.requires_grad_(), *layer.parameters())
    packed = layer(u, seq_idx=SEQ_IDX)
    separate = torch.cat([torch.cat([layer(piece) for piece in row], 1) for row in alone(u)])
    torch.testing.assert_close(packed, separate)
    for a, b in zip(*(torch.autograd.grad(y, leaves, weight) for y in (packed, separate)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(layer(u)[0, 5:], packed[0, 5:])
