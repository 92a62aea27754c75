"""Who says what is padding: the batch, a model, or a part of it; and in which order a layer reads it."""

from __future__ import annotations

import torch
from torch import nn

from compressm.layers import LRU, Bidirectional, SequenceClassifier
from compressm.observing.layer_calls import reversed_layers
from compressm.observing.padding import Padding


class Model(nn.Module):
    """A classifier whose layer reads in both directions, the one of its halves in both directions once more."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = SequenceClassifier(1, 3, 4, 4, 1, vocabulary=9)
        inner = Bidirectional(LRU(4, 4), LRU(4, 4))
        self.classifier.blocks[0].ssm = Bidirectional(nn.Sequential(LRU(4, 4)), inner)  # type: ignore[union-attr]
        self.apart = LRU(4, 4)


def test_layers_inside_backwards_read_from_the_end_and_twice_reversed_ones_do_not() -> None:
    ssm = "classifier.blocks.0.ssm"
    assert reversed_layers(Model()) == {f"{ssm}.backwards", f"{ssm}.backwards.forwards"}
    assert reversed_layers(Bidirectional(LRU(4, 4), nn.Sequential(LRU(4, 4)))) == {"backwards", "backwards.0"}
    assert reversed_layers(LRU(4, 4)) == set()


def test_the_innermost_that_speaks_decides_until_its_call_is_over() -> None:
    model = Model()
    padding, ssm = Padding(model), "classifier.blocks.0.ssm"
    outer, both, inner = model.classifier, model.get_submodule(ssm), model.get_submodule(f"{ssm}.backwards")
    assert padding.tellers == [outer, both, inner]
    assert padding.of_layer("apart") is None
    batch = torch.tensor([[1, 1, 1, 0]])
    padding.begin(batch)
    assert padding.of_layer("apart") is batch

    tokens = torch.tensor([[3, 4, 0, 0]])
    padding.told(outer, {"u": tokens})
    present = padding.of_layer(f"{ssm}.forwards.0")
    assert present is not None
    assert present.tolist() == [[True, True, False, False]]
    # The layer is told no lengths, so it turns the whole row round, padding first.
    hidden = torch.zeros(1, 4, 4)
    padding.told(both, {"u": hidden})
    for name, expected in (
        (f"{ssm}.forwards.0", [[True, True, False, False]]),
        (f"{ssm}.backwards", [[False, False, True, True]]),
        (f"{ssm}.backwards.backwards", [[True, True, False, False]]),
    ):
        found = padding.of_layer(name)
        assert found is not None
        assert found.tolist() == expected
    # This one is, and turns each sequence within its length.
    padding.told(inner, {"u": hidden, "lengths": torch.tensor([3])})
    found = padding.of_layer(f"{ssm}.backwards.forwards")
    assert found is not None
    assert found.tolist() == [[True, True, True, False]]
    padding.over()
    padding.silent()  # a call that does not count changes nothing
    assert padding.of_layer(f"{ssm}.forwards.0") is present
    for _ in range(3):
        padding.over()
    assert padding.of_layer("apart") is batch
    padding.over()  # one too many, as after an error
    assert padding.of_layer("apart") is batch
    padding.begin()
    assert padding.of_layer("apart") is None
