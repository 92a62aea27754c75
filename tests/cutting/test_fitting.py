from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from compressm import compress
from compressm.cutting import state_dims
from compressm.cutting.fitting import fit, fit_any_size
from compressm.errors import CheckpointError, UnsupportedModelError
from compressm.layers import SequenceClassifier

OPTIONS = {"lru": {"r_min": 0.9}, "mamba": {}, "mamba2": {"head_dim": 4, "n_groups": 2}}


def classifier(d_state: int = 16, d_model: int = 4, layer: str = "lru") -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(1, 3, d_model, d_state, n_layers=2, norm="layer", layer=layer, **OPTIONS[layer]).eval()


@pytest.mark.parametrize("layer", OPTIONS)
def test_weights_from_before_and_after_a_cut_load_into_the_same_model(layer: str) -> None:
    model, u = fit_any_size(classifier(layer=layer)), torch.randn(2, 12, 1)
    before, y_before = copy.deepcopy(model.state_dict()), model(u)
    compress(model, states=5, data=[u])
    after, y_after = copy.deepcopy(model.state_dict()), model(u)
    for weights, y in ((before, y_before), (after, y_after), (before, y_before)):
        model.load_state_dict(weights)
        torch.testing.assert_close(model(u), y, rtol=0, atol=0)


def test_layers_take_sizes_of_their_own() -> None:
    model = fit_any_size(classifier())
    other = SequenceClassifier(1, 3, 4, [3, 7], n_layers=2, norm="layer")
    model.load_state_dict(other.state_dict())
    assert list(state_dims(model).values()) == [3, 7]


def test_copies_and_wrappers_inherit_it() -> None:
    model = fit_any_size(classifier())
    small = classifier(d_state=3)
    for outer, inner in ((copied := copy.deepcopy(model), copied), ((average := AveragedModel(model)), average.module)):
        inner.load_state_dict(small.state_dict())
        assert set(state_dims(outer).values()) == {3}
        assert set(state_dims(model).values()) == {16}  # and not the original


def test_a_part_of_a_model_can_be_loaded_by_itself() -> None:
    transformers = pytest.importorskip("transformers")

    def language_model(states: int) -> Any:
        return transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=20, hidden_size=8, state_size=states, num_hidden_layers=2)
        )

    model = fit_any_size(language_model(8))
    model.backbone.load_state_dict(language_model(3).backbone.state_dict())
    assert set(state_dims(model).values()) == {3}
    assert model.config.state_size == 3


def test_parameters_stay_the_objects_that_optimizers_hold() -> None:
    model = fit_any_size(classifier())
    held = dict(model.named_parameters())
    model.load_state_dict(classifier(d_state=3).state_dict())
    assert all(parameter is held[name] for name, parameter in model.named_parameters())


def test_shards_are_loaded_one_by_one() -> None:
    model, small = fit_any_size(classifier()), classifier(d_state=3).state_dict()
    names = list(small)
    for part in (names[::2], names[1::2]):
        model.load_state_dict({name: small[name] for name in part}, strict=False)
    assert all(torch.equal(value, small[name]) for name, value in model.state_dict().items())


def test_fit_reads_shapes_alone() -> None:
    shapes = {name: list(value.shape) for name, value in classifier(d_state=3).state_dict().items()}
    model = fit(classifier(), shapes)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == shapes


def test_weights_of_another_model_are_refused() -> None:
    model = fit_any_size(classifier())
    with pytest.raises(CheckpointError, match=r"blocks.0.ssm: weights of shapes .* belong to no state dimension"):
        model.load_state_dict(classifier(d_model=5).state_dict())
    with pytest.raises(UnsupportedModelError):
        fit_any_size(torch.nn.Linear(1, 1))
