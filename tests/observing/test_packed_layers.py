"""Several sequences in one row of a layer: what is observed is what the sequences give one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compressm.adapters import find_layers
from compressm.layers import DeltaNet, LinearAttention, Mamba, Mamba2
from compressm.observing.masks import mask_gradients
from compressm.observing.moments import Statistics

LENGTHS = ((5, 1, 2, 12), (20,))
SEQ_IDX = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS])
LAYERS: dict[str, Callable[[], Any]] = {
    "mamba": lambda: Mamba(8, 4),
    "mamba2": lambda: Mamba2(8, 4, head_dim=4),
    "linear-attention": lambda: LinearAttention(8, 4, n_heads=2),
    "gated-delta-net": lambda: DeltaNet(8, 4, n_heads=2, gated=True),
}


def alone(rows: Tensor) -> list[list[Tensor]]:
    return [list(row[None].split(lengths, 1)) for row, lengths in zip(rows, LENGTHS, strict=True)]


@pytest.mark.parametrize("name", LAYERS)
def test_evidence_of_packed_sequences_is_that_of_the_sequences(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    u, grad = torch.randn(2, 2, 20, 8)
    packed, expected = (Statistics(layer, sequences=None, memory=1.0) for _ in "pe")
    packed.observe_next(training_only=False)
    layer(u, seq_idx=SEQ_IDX)
    packed.close()
    for piece in itertools.chain(*alone(u)):
        expected.observe_next(training_only=False)
        layer(piece)
    expected.close()
    for which, value in expected.moments()[""].tensors().items():
        torch.testing.assert_close(packed.moments()[""].tensors()[which], value, rtol=1e-4, atol=1e-5)

    adapter = find_layers(layer)[""][1]
    together = mask_gradients(layer, adapter, (u,), {"seq_idx": SEQ_IDX}, grad)
    for row, inputs, grads in zip(together, alone(u), alone(grad), strict=True):
        parts = [mask_gradients(layer, adapter, (a,), {}, b)[0] for a, b in zip(inputs, grads, strict=True)]
        torch.testing.assert_close(row, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-5)
