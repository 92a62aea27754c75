"""A classifier that reads tokens: padding does not count, and step by step comes to the same."""

from __future__ import annotations

import pytest
import torch

from compressm.layers import SequenceClassifier


@pytest.mark.parametrize("layer", ["lru", "mamba", "linear_attention"])
def test_padding_does_not_count(layer: str) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, d_model=8, d_state=4, n_layers=2, layer=layer, vocabulary=20).eval()
    tokens = torch.randint(1, 20, (4, 12))
    padded = torch.cat([tokens, torch.zeros(4, 5, dtype=torch.int64)], 1)
    torch.testing.assert_close(model(padded), model(tokens), rtol=1e-5, atol=1e-5)
    state, logits = model.initial_state(4), torch.empty(0)
    for token in tokens.unbind(1):
        logits, state = model.step(token, state)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-4)


def test_it_can_be_made_again_from_its_configuration() -> None:
    model = SequenceClassifier(1, 3, d_model=8, d_state=4, vocabulary=20)
    again = SequenceClassifier(**model.config)
    again.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 20, (2, 9))
    torch.testing.assert_close(again.eval()(tokens), model.eval()(tokens))
