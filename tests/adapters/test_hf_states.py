"""Zamba's heads, xLSTM's memory, states that cannot be cut, and how classes with a state are found."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import compressm
from compressm.adapters import SelectiveAdapter, find_layers
from compressm.adapters.changes import layer_values, write
from compressm.cutting import state_dims
from compressm.cutting.spectrum import balance_layers
from compressm.errors import UnsupportedModelError
from compressm.observing.over_data import gather
from compressm.theory.selection import reduce_selective

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from state_classes import stateful_layers
from toy_models import SIZES


@pytest.mark.parametrize("kind", ["recurrent_gemma", "xlstm", "mamba", "zamba"])
def test_padding_that_only_the_model_is_told_of_does_not_count(kind: str) -> None:
    """These models are causal, so what follows a sequence changes none of its states.

    A token of xLSTM whose key and query nearly cancel has a large share in P, and the rounding of their product too.
    """
    torch.manual_seed(0)
    model, x, lengths = SIZES[kind].build().eval(), tokens(4, 16), [6, 8, 10, 12]
    mask = (torch.arange(16) < torch.tensor(lengths)[:, None]).long()
    alone = gather(model, [{"input_ids": x[i : i + 1, :length]} for i, length in enumerate(lengths)])
    padded = gather(model, [{"input_ids": x * mask, "attention_mask": mask}])
    for name, moments in alone.items():
        assert float(padded[name].tokens) == sum(lengths)
        for key, value in moments.tensors().items():
            size = float(value.abs().max())
            torch.testing.assert_close(padded[name].tensors()[key], value, rtol=2e-2, atol=1e-4 * size)


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["zamba", "xlstm"])
@torch.no_grad()
def test_a_cut_at_full_rank_changes_no_logits(kind: str) -> None:
    model, x = SIZES[kind].build(), tokens()
    before = model(x).logits
    balancings = balance_layers(model, moments=gather(model, [{"input_ids": x}]))
    for name, (layer, adapter) in find_layers(model).items():
        assert isinstance(adapter, SelectiveAdapter)
        states = adapter.state_dim(layer)
        reduction = reduce_selective(balancings[name], states, *adapter.maps(layer)[:2])  # type: ignore[arg-type]
        write(layer, adapter.planned(layer)(layer_values(layer), reduction))
    torch.testing.assert_close(model(x).logits, before, rtol=0, atol=1e-4)


@torch.no_grad()
def test_signals_of_zamba_are_those_of_its_scans() -> None:
    model = SIZES["zamba"].build()
    layer, adapter = next(iter(find_layers(model).values()))
    assert isinstance(adapter, SelectiveAdapter)
    hidden = torch.randn(2, 9, 16)
    s = adapter.signals(layer, hidden)
    h, outputs = torch.zeros(2, 32, 8, dtype=torch.float64), list[Tensor]()
    for t in range(9):
        h = torch.exp(-s.step[:, t, :, None] * s.rates) * h
        h = h + s.x[:, t, :, None] * s.B[:, t].repeat_interleave(16, 1)
        outputs.append((h * s.C[:, t].repeat_interleave(16, 1)).sum(-1))
    u = s.x / s.step
    assert s.gain is not None
    inner = (torch.stack(outputs, 1) + layer.get_parameter("D").flatten() * u) * s.gain
    inner = (inner / layer.get_parameter("out_proj.weight").norm(dim=0)).float()
    torch.testing.assert_close(layer.out_proj(inner), layer(hidden), rtol=1e-4, atol=1e-5)  # type: ignore[operator]


@torch.no_grad()
def test_keys_of_xlstm_in_a_subspace_are_cut_without_trace_and_its_cache_fits() -> None:
    model, x = SIZES["xlstm"].build(), tokens()
    for layer, _ in find_layers(model).values():  # 4 heads of 32, whose keys span 16 dimensions
        weight = layer.get_parameter("k.weight")
        weight.copy_((torch.randn(4, 32, 16) @ torch.randn(4, 16, 128) / 40).flatten(0, 1))
    before, whole = model(x).logits, copy.deepcopy(model)
    report = compressm.compress(model, states=16, data=[{"input_ids": x}])
    assert report.cut
    torch.testing.assert_close(model(x).logits, before, rtol=0, atol=1e-3)
    assert model.config.qk_head_dim == 16
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(x, **options), whole.generate(x, **options))


def test_sizes_that_xlstm_cannot_generate_at_are_refused() -> None:
    model = SIZES["xlstm"].build()
    with pytest.raises(UnsupportedModelError, match=r"states=10: .* choose a multiple of 16 \(multiple_of=\)"):
        compressm.compress(model, states=10, data=[{"input_ids": tokens()}])
    assert set(state_dims(model).values()) == {32}
    fused = SIZES["xlstm"].build()
    layer = next(iter(find_layers(fused).values()))[0]
    del layer.q  # type: ignore[misc]
    with pytest.raises(UnsupportedModelError, match="weight_mode='single'"):
        compressm.compress(fused, states=16, data=[{"input_ids": tokens()}])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("kimi_linear", r"KimiLinearDeltaAttention\).* cannot be cut: .*config\.linear_head_dim"),
        ("minimax", r"MiniMaxLightningAttention\) cannot be cut: .*config\.head_dim, which is also"),
        ("rwkv", r"RwkvSelfAttention\).* cannot be cut: RwkvModel allocates the state of every layer by"),
        ("lfm2", r"Lfm2ShortConv\) cannot be cut: its state is the last inputs of a short convolution"),
    ],
)
def test_states_that_cannot_be_cut_are_named_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        compressm.compress(SIZES[kind].build(), fraction=0.5, data=[{"input_ids": tokens()}])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")  # by peft
def test_lora_is_cut_with_the_weights_that_it_changes() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, x = SIZES["qwen3_next"].build(), tokens()
    config = peft.LoraConfig(r=2, target_modules=["in_proj_qkvz", "in_proj_ba"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    merged = copy.deepcopy(adapted).merge_and_unload().eval()
    for one in (adapted, merged):
        assert compressm.compress(one, states=4, data=[{"input_ids": x}]).cut
    with torch.no_grad():
        torch.testing.assert_close(adapted(x).logits, merged(x).logits, rtol=0, atol=2e-3)


NEW = """
class NewPreTrainedModel(PreTrainedModel):
    def forward(self, x, past_key_values=None):
        past_key_values.update_recurrent_state(x, 0)

class NewCache:
    def forward(self): self.recurrent_states = None

if True:
    class NewMixer(nn.Module):
        def forward(self, x, past=None):
            past.update_recurrent_state(x, 0)

class OldFashioned(nn.Module):
    def forward(self, x, state=None):
        return x

class Attention(nn.Module):
    def forward(self, hidden_states, past_key_values=None):
        return past_key_values.update(hidden_states, hidden_states, 0)
"""


def test_layers_with_a_state_are_found_in_sources() -> None:
    assert set(stateful_layers(NEW)) == {"NewMixer", "OldFashioned"}


@pytest.mark.slow
def test_every_class_of_the_installed_transformers_is_answered() -> None:
    from state_classes import unmeasured

    rows = unmeasured()
    assert rows["qwen3_next"]["answer"] == "cut"
    assert [kind for kind, row in rows.items() if row["answer"] == "not answered"] == []
