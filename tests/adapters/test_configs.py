"""The state dimension in the configs of transformers' models: true, or not written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import MambaConfig, MambaForCausalLM, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

import compressm
from compressm.adapters.hf_base import DIMS_BY_LAYER
from compressm.adapters.registry import PartOfModelWarning
from compressm.cutting import resize_states, state_dims
from hf_models import perturb, tokens

DATA = [{"input_ids": tokens(3, 20)}]


def config(layers: int = 3) -> MambaConfig:
    return MambaConfig(vocab_size=40, hidden_size=16, state_size=16, num_hidden_layers=layers, time_step_rank=2)


def mamba(shared: MambaConfig | None = None) -> Any:
    torch.manual_seed(0)
    model = MambaForCausalLM(shared or config())
    perturb(model)
    return model.eval()


def test_layers_that_differ_are_listed_and_the_one_number_is_not_written(tmp_path: Path) -> None:
    model = mamba()
    names = list(state_dims(model))
    resize_states(model, dict(zip(names, (10, 11, 10), strict=True)))
    assert model.config.state_size == 16  # what it was, and true of no layer
    assert getattr(model.config, DIMS_BY_LAYER) == dict(zip(names, (10, 11, 10), strict=True))
    model.save_pretrained(tmp_path)
    assert getattr(MambaConfig.from_pretrained(tmp_path), DIMS_BY_LAYER)[names[1]] == 11
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        MambaForCausalLM.from_pretrained(tmp_path)
    resize_states(model, dict.fromkeys(names, 9))  # alike again
    assert model.config.state_size == 9
    assert not hasattr(model.config, DIMS_BY_LAYER)
    model.save_pretrained(tmp_path)
    assert set(state_dims(MambaForCausalLM.from_pretrained(tmp_path)).values()) == {9}


def test_a_cut_per_layer_writes_no_number_that_is_true_of_some_layers_only() -> None:
    model = mamba()
    compressm.compress(model, total_states=25, per_layer=True, data=DATA)
    dims = list(state_dims(model).values())
    assert len(set(dims)) > 1
    assert model.config.state_size == 16
    assert list(getattr(model.config, DIMS_BY_LAYER).values()) == dims


def test_a_model_that_shares_its_config_with_another_gets_its_own(tmp_path: Path) -> None:
    shared = config(2)
    cut, other = mamba(shared), mamba(shared)
    compressm.compress(cut, states=4, data=DATA)
    assert cut.config.state_size == 4
    assert shared.state_size == other.config.state_size == 16
    # All parts of the cut model have the one config, as they had before.
    parts = [module.config for module in cut.modules() if hasattr(module, "config")]
    assert len(parts) > 2
    assert all(part is cut.config for part in parts)
    for model in (cut, other):
        model.save_pretrained(tmp_path)
        again = MambaForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(**DATA[0]).logits, model(**DATA[0]).logits)


def test_a_backbone_tells_the_model_that_it_is_a_part_of() -> None:
    model = mamba()
    compressm.compress(model.backbone, states=4, data=DATA)
    assert model.config.state_size == 4


@pytest.mark.parametrize("part", ["backbone.layers.0", "backbone.layers.0.mixer"])
def test_a_smaller_part_leaves_the_config_as_it_is_and_says_so(part: str) -> None:
    model = mamba()
    with pytest.warns(PartOfModelWarning, match=r"MambaConfig that does not learn of its cut: .*compressm\.save"):
        compressm.compress(model.get_submodule(part), states=4, data=[torch.randn(2, 9, 16)])
    assert list(state_dims(model).values()) == [4, 16, 16]
    assert model.config.state_size == 16


def test_a_whole_model_inside_of_another_module_tells_its_config() -> None:
    inner = mamba()
    model = torch.nn.ModuleDict({"language": inner})
    resize_states(model, dict.fromkeys(state_dims(model), 5))
    assert inner.config.state_size == 5


def test_a_width_of_all_heads_together_is_told() -> None:
    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "lru_width": 16, "num_attention_heads": 2}
    more = {"vocab_size": 40, "intermediate_size": 24, "num_key_value_heads": 1, "attention_window_size": 8}
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, **more))
    before = copy.deepcopy(model.config)
    resize_states(model, dict.fromkeys(state_dims(model), 5))
    assert (before.lru_width, model.config.lru_width) == (16, 10)
