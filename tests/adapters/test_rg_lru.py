"""Griffin's recurrent block, ours and RecurrentGemma's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.adapters import RecurrentBlockAdapter
from compressm.adapters.changes import layer_values
from compressm.cutting import state_dims
from compressm.layers import RecurrentBlock


def by_definition(layer: RecurrentBlock, u: Tensor) -> Tensor:
    """Token by token, from the parameters."""
    rg, outputs = layer.rg_lru, []
    x, h = layer.linear_x(u), torch.zeros(u.shape[0], layer.linear_x.out_features, dtype=u.dtype)
    x = F.conv1d(F.pad(x.mT, (3, 0)), layer.conv_1d.weight, layer.conv_1d.bias, groups=x.shape[2]).mT
    for t in range(u.shape[1]):
        blocks = x[:, t].unflatten(-1, rg.input_gate_bias.shape)
        i, r = (
            torch.sigmoid((blocks[:, :, None] @ weight).squeeze(2) + bias).flatten(1)
            for weight, bias in (
                (rg.input_gate_weight, rg.input_gate_bias),
                (rg.recurrent_gate_weight, rg.recurrent_gate_bias),
            )
        )
        a = torch.exp(-8 * F.softplus(rg.recurrent_param) * r)
        h = a * h + (1 - a.square()).sqrt() * i * x[:, t]
        outputs.append(layer.linear_out(F.gelu(layer.linear_y(u[:, t]), approximate="tanh") * h))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_layer_is_its_definition(blocks: int) -> None:
    torch.manual_seed(0)
    layer, u = RecurrentBlock(6, 5, blocks).double(), torch.randn(2, 40, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(u), by_definition(layer, u), rtol=1e-9, atol=1e-10)


def test_channels_that_repeat_others_are_cut_without_trace() -> None:
    torch.manual_seed(1)
    layer, u = RecurrentBlock(6, 8, 2).double(), torch.randn(3, 60, 6, dtype=torch.float64)
    with torch.no_grad():  # in both blocks channel 7 does what channel 2 does, and no gate listens to it
        for block in (0, 8):
            for name in ("linear_x.weight", "linear_x.bias", "linear_y.weight", "linear_y.bias", "conv_1d.weight",
                         "conv_1d.bias", "rg_lru.recurrent_param"):  # fmt: skip
                value = layer.get_parameter(name)
                value[block + 7] = value[block + 2]
        for name in ("input_gate", "recurrent_gate"):
            weight, bias = layer.get_parameter(f"rg_lru.{name}_weight"), layer.get_parameter(f"rg_lru.{name}_bias")
            weight[:, 7] = 0
            weight[:, 2] = 0
            weight[:, :, 7] = weight[:, :, 2]
            bias[:, 7] = bias[:, 2]
    before = layer(u)
    report = compressm.compress(layer, states=7, data=[u])
    assert report.state_dims == {"": 7}
    assert layer.linear_out.in_features == layer.conv_1d.groups == 14
    torch.testing.assert_close(layer(u), before, rtol=1e-4, atol=1e-5)  # moments are float32


def test_optimizer_state_goes_and_stays_with_its_channels() -> None:
    torch.manual_seed(2)
    layer, u = RecurrentBlock(6, 8, 2), torch.randn(3, 60, 6)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(u).square().mean().backward()
    optimizer.step()
    old = {k: optimizer.state[p]["exp_avg"].clone() for k, p in layer.named_parameters()}
    kept = _kept(layer, u, 3)
    compressm.compress(layer, states=3, data=[u], optimizer=optimizer)
    new = {k: optimizer.state[p]["exp_avg"] for k, p in layer.named_parameters()}
    channels = (kept + torch.tensor([[0], [8]])).flatten()
    torch.testing.assert_close(new["linear_x.weight"], old["linear_x.weight"][channels])
    for block in range(2):
        weight = old["rg_lru.input_gate_weight"][block][kept[block]][:, kept[block]]
        torch.testing.assert_close(new["rg_lru.input_gate_weight"][block], weight)
        torch.testing.assert_close(
            new["rg_lru.input_gate_bias"][block], old["rg_lru.input_gate_bias"][block][kept[block]]
        )


def _kept(layer: nn.Module, u: Tensor, states: int) -> Tensor:
    from compressm.theory.recurrence import balance_selective, moments
    from compressm.theory.selection import reduce_selective

    with torch.no_grad():
        balancing = balance_selective(moments(RecurrentBlockAdapter().signals(layer, u)))
    kept = reduce_selective(balancing, states, False, True).kept
    assert kept is not None
    return kept


def gemma(width: int = 16, heads: int = 2) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.RecurrentGemmaConfig(
        vocab_size=40, hidden_size=16, lru_width=width, num_hidden_layers=3, intermediate_size=24,
        num_attention_heads=heads, num_key_value_heads=1, attention_window_size=16, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.RecurrentGemmaForCausalLM(config).eval()


def test_recurrent_gemma_is_cut_saved_and_loaded_by_transformers(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokens = gemma(), torch.randint(40, (3, 30))
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
    at_random, untouched = copy.deepcopy(model), copy.deepcopy(model)
    attention = {k: v.clone() for k, v in model.state_dict().items() if "q_proj" in k}
    report = compressm.compress(model, states=5, data=[{"input_ids": tokens, "use_cache": False}])
    assert set(report.state_dims.values()) == {5}
    assert report.cut
    assert attention
    assert all(torch.equal(model.state_dict()[k], v) for k, v in attention.items())
    compressm.compress(at_random, states=5, data=[{"input_ids": tokens, "use_cache": False}], selection="random")
    with torch.no_grad():
        errors = [float((m(tokens, use_cache=False).logits - before).norm()) for m in (model, at_random)]
    assert 0 < errors[0] < errors[1]
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.lru_width == 10
    with torch.no_grad():
        assert torch.equal(again(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    assert again.generate(tokens[:, :4], max_new_tokens=5, do_sample=False).shape == (3, 9)
    assert set(state_dims(untouched).values()) == {8}


def test_recurrent_gemma_is_read_as_our_block_is() -> None:
    theirs = next(m for m in gemma().modules() if type(m).__name__ == "RecurrentGemmaRecurrentBlock")
    ours = RecurrentBlock(16, 8, 2)
    ours.load_state_dict(theirs.state_dict())
    assert layer_values(ours).keys() == layer_values(theirs).keys()
    u = torch.randn(2, 30, 16)
    positions = torch.arange(1, 31).expand(2, 30)  # no step starts a document there, as in our block
    with torch.no_grad():
        expected = theirs(u, positions, None, use_cache=False)[0]  # type: ignore[operator]
        torch.testing.assert_close(ours(u), expected, rtol=1e-4, atol=1e-5)


def test_signals_of_recurrent_gemma_are_what_its_recurrence_gets() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        num_hidden_layers=1, vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=2, lru_width=16,
        block_types=["recurrent"], num_key_value_heads=1, head_dim=8, attention_window_size=64,
    )  # fmt: skip
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    ((layer, adapter),) = compressm.adapters.find_layers(model).values()
    layer.rg_lru.recurrent_param.data.fill_(-6.0)  # slow: the first token weighs much
    seen: dict[str, Tensor] = {}
    layer.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0]))
    layer.rg_lru.register_forward_hook(lambda _, args, out: seen.update(states=out))
    with torch.no_grad():
        model(torch.randint(1, 64, (2, 40)), use_cache=False)
        signals = adapter.signals(layer, seen["hidden"])
    h, states = torch.zeros_like(signals.B[:, 0]), []
    for t in range(40):
        h = torch.exp(-signals.step[:, t]) * h + signals.B[:, t]
        states.append(h.flatten(-2))
    torch.testing.assert_close(torch.stack(states, 1), seen["states"], rtol=1e-4, atol=1e-5)


def test_signals_after_a_carried_state_are_what_the_recurrence_gets_then() -> None:
    block: Any = next(m for m in gemma().modules() if type(m).__name__ == "RecurrentGemmaRecurrentBlock")
    adapter = compressm.adapters.find_layers(block)[""][1]
    block.rg_lru.recurrent_param.data.fill_(-6.0)  # slow: the carried state weighs much
    u, places = torch.randn(2, 9, 16), torch.arange(9).expand(2, 9)
    seen: list[Tensor] = []
    block.rg_lru.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        block(u[:, :5], places[:, :5], None, use_cache=True)
        assert adapter.carried(block, {"position_ids": places[:, :5]}) is None  # it starts there
        for t in range(5, 9):
            now = {"position_ids": places[:, t : t + 1]}
            carried = adapter.carried(block, now)
            assert carried is not None
            assert adapter.carried(block, {**now, "use_cache": False}) is None
            with pytest.raises(compressm.CompressmError, match="some rows of the batch and starts at position 0"):
                adapter.carried(block, {"position_ids": torch.tensor([[0], [t]])})
            signals = adapter.signals_after(block, u[:, t : t + 1], carried)
            first = adapter.signals_after(block, u[:1, t : t + 1], carried)  # of the first sequence alone
            assert signals.state is not None
            h = torch.exp(-signals.step[:, 0]) * signals.state + signals.B[:, 0]
            block(u[:, t : t + 1], places[:, t : t + 1], None, use_cache=True)
            torch.testing.assert_close(h.flatten(-2), seen[-1][:, 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(first.B, signals.B[:1])
            assert first.state is not None
            torch.testing.assert_close(first.state, signals.state[:1])
        # Several tokens at once: the convolution starts from zeros, as in the layer itself, and the state goes on.
        carried = adapter.carried(block, {"position_ids": places[:, 6:9]})
        signals = adapter.signals_after(block, u[:, 6:9], carried)
        block(u[:, 6:9], places[:, 6:9], None, use_cache=True)
        assert signals.state is not None
        h = signals.state
        for t in range(3):
            h = torch.exp(-signals.step[:, t]) * h + signals.B[:, t]
            torch.testing.assert_close(h.flatten(-2), seen[-1][:, t], rtol=1e-4, atol=1e-5)
