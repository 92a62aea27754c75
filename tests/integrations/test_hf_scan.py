from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, BertConfig, BertModel

from compressm.errors import UnsupportedModelError
from compressm.integrations.hf_scan import enable_fast_scan, fast_scan
from compressm.scans import native
from hf_models import FAMILIES, hf_models, tokens

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from toy_models import SIZES


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=3)
def test_outputs_and_gradients_are_those_of_the_slow_path(family: str, data: st.DataObject) -> None:
    model = data.draw(hf_models(family)).train()
    x = tokens(2, data.draw(st.sampled_from([1, 8, 21])))

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(input_ids=x, use_cache=False).logits
        logits.square().mean().backward()
        return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    slow, slow_gradients = run()
    with fast_scan(model) as handle:
        fast, fast_gradients = run()
    assert handle.layers
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert fast_gradients.keys() == slow_gradients.keys()
    # Some gradients are zero but for rounding, as those of queries and keys are if there is one token.
    noise = 1e-6 * max(float(gradient.abs().max()) for gradient in slow_gradients.values())
    for name, gradient in fast_gradients.items():
        scale = float(slow_gradients[name].abs().max())
        torch.testing.assert_close(gradient, slow_gradients[name], rtol=1e-3, atol=1e-4 * scale + noise, msg=name)


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid"])
def test_delta_rule_trains_and_generates_as_on_the_slow_path(kind: str) -> None:
    model, x = SIZES[kind].build(), tokens(2, 70)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def run() -> tuple[Any, ...]:
        loss = model(input_ids=x, labels=x, use_cache=False).loss
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return loss.detach(), gradients, model.generate(x, **options)

    slow = run()
    calls = list[str]()
    with fast_scan(model), native.watched(lambda name, _: calls.append(name)):
        fast = run()
    assert {"delta_backward", "norm_backward", "norm_forward"} <= set(calls)
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(fast[2], slow[2])
    noise = 1e-6 * max(float(gradient.abs().max()) for gradient in slow[1])
    for a, b in zip(fast[1], slow[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + noise)


@pytest.mark.parametrize("kind", ["mamba2", "zamba2", "qwen3_next", "olmo_hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_norms_are_those_of_transformers(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = SIZES[kind].build().to(dtype)
    norm = next(module for module in model.modules() if type(module).__name__.endswith("RMSNormGated"))
    norm.weight.data.normal_()
    x, gate = (torch.randn(2, 5, len(norm.weight)).to(dtype).requires_grad_() for _ in "xz")

    def run() -> tuple[torch.Tensor, ...]:
        y = norm(x, gate)
        return y.detach(), *torch.autograd.grad(y.square().sum(), [x, gate, norm.weight])

    slow, calls = run(), list[str]()
    with fast_scan(model), native.watched(lambda name, _: calls.append(name)):
        fast = run()
    assert calls == ["norm_forward", "norm_backward"]
    for ours, theirs in zip(fast, slow, strict=True):
        assert ours.dtype == theirs.dtype
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert float(error) < (2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=2)
def test_generation_and_its_cache_are_those_of_the_slow_path(family: str, data: st.DataObject) -> None:
    model, x = data.draw(hf_models(family)), tokens()
    before = model(input_ids=x, use_cache=True)
    slow = model.generate(x, max_new_tokens=5, do_sample=False)
    with fast_scan(model):
        after = model(input_ids=x, use_cache=True)
        fast = model.generate(x, max_new_tokens=5, do_sample=False)
    assert torch.equal(fast, slow)
    for state, expected in zip(_states(after), _states(before), strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def _states(output: Any) -> list[torch.Tensor]:
    cache = output.get("cache_params", None) or output.past_key_values
    states = [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]
    assert states
    return states


@given(data=st.data())
@settings(max_examples=1)
def test_only_this_model_is_touched_and_left_as_it_was(data: st.DataObject, tmp_path_factory: Any) -> None:
    model, other = data.draw(hf_models("Mamba")), data.draw(hf_models("Mamba"))
    folder: Path = tmp_path_factory.mktemp("model")
    state = copy.deepcopy(model.state_dict())
    handle = enable_fast_scan(model)
    assert all("forward" in model.get_submodule(name).__dict__ for name in handle.layers)
    assert not any("forward" in module.__dict__ for module in other.modules())
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mixer was exchanged already"):
        enable_fast_scan(model)
    model.save_pretrained(folder)
    clone = copy.deepcopy(model)
    assert clone.get_submodule(handle.layers[0]).forward.__self__ is clone.get_submodule(handle.layers[0])
    handle.remove()
    handle.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert loaded.state_dict().keys() == state.keys() == model.state_dict().keys()
    assert torch.equal(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_the_block_gives_the_scan_back_after_an_error() -> None:
    model = _one_mamba()
    with pytest.raises(KeyError), fast_scan(model):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_packed_sequences_are_kept_apart(name: str) -> None:
    torch.manual_seed(0)
    model = SIZES[name].build()
    mixer = next(module for module in model.modules() if "A_log" in dict(module.named_parameters(recurse=False)))
    width, places = model.config.hidden_size, torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    u = torch.randn(1, 12, width)
    numbers = torch.repeat_interleave(torch.arange(3), places.diff())[None]
    with fast_scan(model):
        alone = torch.cat([mixer(piece) for piece in u.split(places.diff().tolist(), 1)], 1)
        packed = mixer(u, **({"cu_seq_lens_q": places} if name == "qwen3_next" else {"seq_idx": numbers}))
        torch.testing.assert_close(packed, alone)
        with pytest.raises(UnsupportedModelError, match="cannot tell packed sequences apart by seq_idx"):
            mixer(u, seq_idx=numbers[:, :5])


def test_mamba_of_transformers_takes_no_packed_sequences() -> None:
    model, numbers = _one_mamba(), torch.tensor([[0, 0, 1, 1]])
    mixer = model.backbone.layers[0].mixer
    with fast_scan(model), pytest.raises(UnsupportedModelError, match="does not keep packed sequences apart"):
        mixer(torch.randn(1, 4, model.config.hidden_size), seq_idx=numbers)


def test_a_model_without_such_layers_is_refused() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    with pytest.raises(UnsupportedModelError, match=r"BertModel has no layer whose forward calls"):
        enable_fast_scan(BertModel(config))


def _one_mamba() -> Any:
    import transformers

    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=40, hidden_size=8, state_size=4, num_hidden_layers=1)
    )
