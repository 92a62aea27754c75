"""The gated delta rule of transformers, in its real classes at small sizes."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers

import compressm
from compressm.adapters import SelectiveAdapter, find_layers
from compressm.adapters.changes import layer_values, write
from compressm.cutting import state_dims
from compressm.cutting.spectrum import balance_layers
from compressm.observing.masks import mask_gradients, masked_forward
from compressm.observing.over_data import gather
from compressm.theory.recurrence import Signals
from compressm.theory.selection import reduce_selective

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from toy_models import SIZES

KINDS = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid")
GENERATE: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def layers(model: Any) -> dict[str, tuple[Any, SelectiveAdapter]]:
    found = find_layers(model).items()
    return {name: (layer, one) for name, (layer, one) in found if isinstance(one, SelectiveAdapter)}


def recurrence(s: Signals) -> Tensor:
    """The outputs of a delta rule by its definition, in float64, shape ``(batch, length, d)``."""
    assert s.erase is not None
    (batch, length, d), (groups, n) = s.x.shape, s.B.shape[2:]
    h = torch.zeros(batch, d, n, dtype=torch.float64)
    h = h if s.state is None else s.state.double()
    keys, queries = (v.double().repeat_interleave(d // groups, 2) for v in (s.B, s.C))
    outputs: list[Tensor] = []
    for t in range(length):
        h = torch.exp(-s.step[:, t].double())[..., None] * h
        new = s.x[:, t].double() - s.erase[:, t].double() * (h * keys[:, t]).sum(-1)
        h = h + new[..., None] * keys[:, t]
        outputs.append((h * queries[:, t]).sum(-1))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_values_may_be_wider_than_the_model(kind: str) -> None:
    """As in published sizes of Qwen3.5, whose projection at the end of the layer is built first."""
    toy = SIZES[kind]
    model = replace(toy, toy={**toy.toy, "linear_value_head_dim": 6}).build()
    assert {layer.out_proj.in_features for layer, _ in layers(model).values() if hasattr(layer, "out_proj")} <= {24}
    report = compressm.compress(model, states=4, data=tokens())
    assert set(report.state_dims.values()) == {4}
    assert report.serving is not None
    for layer, adapter in layers(model).values():  # float32, for every value channel
        assert adapter.geometry(layer).state_bytes == 4 * 4 * 6 * 4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_signals_are_those_of_the_recurrence(kind: str) -> None:
    model = SIZES[kind].build()
    layer, adapter = next(iter(layers(model).values()))
    hidden = torch.randn(2, 9, model.config.hidden_size)
    s = adapter.signals(layer, hidden)
    assert s.B.shape == (2, 9, 2, 8)
    assert s.x.shape == (2, 9, 16)
    normed: list[tuple[Tensor, Tensor]] = []
    norm = layer.norm if hasattr(layer, "norm") else layer.o_norm
    handle = norm.register_forward_pre_hook(lambda _, inputs: normed.append(inputs))
    layer(hidden)
    handle.remove()
    ((heads, gate),) = normed
    heads, gate = heads.view(2, 9, 4, 4), gate.view(2, 9, 4, 4)
    y = recurrence(s).view(2, 9, 4, 4) / 8**0.5  # the kernel scales queries by n^-1/2
    torch.testing.assert_close(y.float(), heads, rtol=1e-4, atol=1e-5)
    power = heads.square().mean(-1, keepdim=True)
    out = layer.o_proj if hasattr(layer, "o_proj") else layer.out_proj
    gain = norm.weight * torch.nn.functional.silu(gate) / (power + power.mean((0, 1)) + norm.variance_epsilon).sqrt()
    assert s.gain is not None
    torch.testing.assert_close(s.gain, gain.flatten(-2) * out.weight.norm(dim=0), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_call_that_goes_on_from_a_cache_is_observed_from_its_state() -> None:
    model = SIZES["qwen3_next"].build()
    x, seen = tokens(length=12), list[Signals]()
    layer, adapter = next(iter(layers(model).values()))

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        carried = adapter.carried(module, kwargs)
        fresh = carried is None
        seen.append(adapter.signals(module, hidden) if fresh else adapter.signals_after(module, hidden, carried))

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    model(x, use_cache=False)
    cache = model(x[:, :7], use_cache=True).past_key_values
    model(x[:, 7:11], past_key_values=cache, use_cache=True)
    model(x[:, 11:], past_key_values=cache, use_cache=True)
    handle.remove()
    parts = torch.cat([recurrence(one) for one in seen[1:]], 1)
    torch.testing.assert_close(parts, recurrence(seen[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dead_key_dimensions_go_without_trace_and_all_others_stay(kind: str) -> None:
    model, x = SIZES[kind].build(), tokens()
    for layer, _ in layers(model).values():  # in head 0 the even ones, in head 1 the first four
        dead = torch.cat([torch.arange(0, 8, 2), 8 + torch.arange(4)])
        for name, rows in _rows(layer, dead).items():
            layer.get_parameter(name)[rows] = 0
        # The kernel scales queries by the number of dimensions, which only the constant in the norm of outputs can see.
        (layer.norm if hasattr(layer, "norm") else layer.o_norm).variance_epsilon = 1e-20
    before, untouched = model(x).logits, copy.deepcopy(model)
    moments = gather(model, [{"input_ids": x}])
    for name, (layer, adapter) in layers(model).items():  # all states kept: nothing changes, bit by bit
        reduction = reduce_selective(balance_layers(model, moments=moments)[name], 8, *adapter.maps(layer)[:2])  # type: ignore[arg-type]
        write(layer, adapter.plan(layer_values(layer), reduction))
    assert torch.equal(model(x).logits, before)
    report = compressm.compress(model, states=4, data=[{"input_ids": x}])
    assert set(report.state_dims.values()) == {4}
    assert all(one.certificate.relative_error < 1e-6 for one in report.layers)
    torch.testing.assert_close(model(x).logits, before, rtol=0, atol=1e-4)
    assert model.config.linear_key_head_dim == 4
    assert untouched.config.linear_key_head_dim == 8
    cached = model.generate(x, **GENERATE)
    assert torch.equal(cached, untouched.generate(x, **GENERATE))


def _rows(layer: Any, dead: Tensor) -> dict[str, Tensor]:
    """Rows of the projections of the queries and keys of some key dimensions, of 2 heads of 8."""
    if hasattr(layer, "q_proj"):
        return {"q_proj.weight": dead, "k_proj.weight": dead}
    if hasattr(layer, "in_proj_qkv"):
        return {"in_proj_qkv.weight": torch.cat([dead, 16 + dead])}
    head, inside = dead // 8, dead % 8
    rows = head * (layer.in_proj_qkvz.out_features // 2) + inside
    return {"in_proj_qkvz.weight": torch.cat([rows, rows + 8])}


def test_less_is_lost_than_by_other_choices_and_about_as_much_as_said() -> None:
    model, x = SIZES["qwen3_next"].build(), tokens(8, 48)
    errors: dict[str, list[float]] = {}
    for selection in ("hankel", "random"):
        report = compressm.compress(copy.deepcopy(model), states=6, data=[{"input_ids": x}], selection=selection)  # type: ignore[arg-type]
        errors[selection] = [float(one.error_on_data or 0) for one in report.layers]
        if selection == "hankel":
            for one in report.layers:
                assert 0.4 < one.certificate.relative_error / float(one.error_on_data or 0) < 1.6
    assert sum(errors["hankel"]) < 0.8 * sum(errors["random"])


def test_half_precision_keeps_its_dtypes() -> None:
    model, x = SIZES["qwen3_5"].build().to(torch.bfloat16), tokens()
    for layer, _ in layers(model).values():
        layer.A_log.data = layer.A_log.data.float()
    before = {name: p.dtype for name, p in model.named_parameters()}
    report = compressm.compress(model, states=4, data=[{"input_ids": x}])
    assert report.cut
    assert {name: p.dtype for name, p in model.named_parameters()} == before
    assert sorted({str(dtype) for dtype in before.values()}) == ["torch.bfloat16", "torch.float32"]
    assert torch.equal(model.generate(x, **GENERATE), model.generate(x, **GENERATE))


def test_a_model_around_the_text_model_is_cut_saved_and_read(tmp_path: Path) -> None:
    sizes = SIZES["qwen3_5"]
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": 16}
    text = {**sizes.toy, "vocab_size": 64, "pad_token_id": 0}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    model, x = transformers.Qwen3_5ForConditionalGeneration(config).eval(), tokens()
    compressm.compress(model, states=4, data=[{"input_ids": x}])
    model.save_pretrained(tmp_path)
    again = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.text_config.linear_key_head_dim == 4
    assert torch.equal(again(input_ids=x).logits, model(input_ids=x).logits)


def test_the_compressor_shrinks_it_in_training(tmp_path: Path) -> None:
    model, x = SIZES["qwen3_next"].build().train(), tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compressor = compressm.Compressor(model, optimizer, 12, states=4, cuts=1, window=0.5)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(x, labels=x, use_cache=False).loss
        loss.backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if ".linear_attn." in name}
        optimizer.step()
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
        losses.append(float(loss.detach()))
        compressor.step()
    assert set(state_dims(model).values()) == {4}
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = transformers.Qwen3NextForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(x).logits, model.eval()(x).logits)


@torch.no_grad()
def test_the_mask_is_on_keys_and_queries_of_every_head() -> None:
    """Removing one state by the mask is what the cut that keeps the others does; its gradient, by differences."""
    for kind in ("qwen3_5", "zamba"):
        model = SIZES[kind].build()
        layer, adapter = next(iter(layers(model).values()))
        hidden, g = torch.randn(1, 9, 16), torch.randn(1, 9, 16)
        M = mask_gradients(layer, adapter, (hidden,), {}, g).diagonal(dim1=-2, dim2=-1)
        assert M.shape == (1, 2, 8)
        for group, state in ((0, 1), (1, 6)):
            masks = torch.ones(2, 1, 2, 8)
            masks[0, 0, group, state], masks[1, 0, group, state] = 1.01, 0.99
            up, down = (masked_forward(layer, mask)(hidden) for mask in masks)  # type: ignore[misc]
            slope = float(((up - down) * g).sum()) / 0.02
            assert abs(slope - float(M[0, group, state])) < 2e-2 * float(M.abs().max())


def test_evidence_from_the_loss_picks_states_too() -> None:
    model, x = SIZES["qwen3_next"].build(), tokens(8, 32)
    data = [{"input_ids": x, "labels": x}]

    def loss(output: Any, batch: Any) -> Tensor:
        logits, targets = output.logits[:, :-1], batch["labels"][:, 1:]
        return torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none").sum(1)

    report = compressm.compress(model, states=7, data=data, gramians="loss", loss=loss)
    assert report.cut
    assert set(state_dims(model).values()) == {7}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [True, False])
def test_padding_is_no_part_of_the_mean_power(kind: str, left: bool) -> None:
    model, x = SIZES[kind].build().eval(), tokens(3, 9)
    none = torch.zeros(3, 15, dtype=torch.long)
    padded = torch.cat([none, x] if left else [x, none], 1)
    mask = torch.cat([none, torch.ones_like(x)] if left else [torch.ones_like(x), none], 1)
    plain = gather(model, [{"input_ids": x}])
    masked = gather(model, [{"input_ids": padded, "attention_mask": mask}])
    for name, moments in plain.items():
        for key, value in moments.tensors().items():
            size = float(value.abs().max())
            torch.testing.assert_close(masked[name].tensors()[key], value, rtol=1e-3, atol=1e-4 * size)
