"""Several sequences in one row of a layer: what is observed is what the sequences give one by one."""

from __future__ import annotations

import itertools

import pytest
import torch

from compressm.adapters import find_layers
from compressm.observing.masks import mask_gradients
from compressm.observing.moments import Statistics
from packed_rows import LAYERS, SEQ_IDX, alone


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "gla"])
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
