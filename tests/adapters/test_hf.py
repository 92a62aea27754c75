from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import compressm
from compressm.adapters import SelectiveAdapter, find_layers
from compressm.adapters.changes import layer_values, write
from compressm.adapters.registry import UnknownLayerWarning
from compressm.cutting import plan_reduction
from compressm.cutting.spectrum import balance_layers
from compressm.errors import UnsupportedModelError
from compressm.observing.loss_evidence import LossEvidence
from compressm.observing.observer import Observer
from compressm.observing.over_data import gather
from compressm.theory.rank_rule import RankRule
from compressm.theory.selection import reduce_selective
from hf_models import FAMILIES, S6, hf_models, perturb, tokens

DATA = [{"input_ids": tokens(4, 16, seed=1)}]


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=4)
def test_a_cut_at_full_rank_changes_no_logits(family: str, data: st.DataObject) -> None:
    model = data.draw(hf_models(family))
    before = model(input_ids=tokens()).logits
    balancings = balance_layers(model, moments=gather(model, DATA))
    layers = find_layers(model)
    assert len(layers) >= 2
    for name, (layer, adapter) in layers.items():
        assert isinstance(adapter, SelectiveAdapter)
        n = adapter.state_dim(layer)
        reduction = reduce_selective(balancings[name], n, adapter.folds_into, adapter.folds_out)  # type: ignore[arg-type]
        write(layer, adapter.plan(layer_values(layer), reduction))
        assert adapter.state_dim(layer) == n
    torch.testing.assert_close(model(input_ids=tokens()).logits, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=4)
def test_a_state_that_nothing_enters_is_cut_without_trace(family: str, data: st.DataObject) -> None:
    # Half of the states get no input, so the cut must find them: exact, whatever stands between projection and scan.
    model = data.draw(hf_models(family))
    states = next(iter(compressm.cutting.state_dims(model).values()))
    for layer, _ in find_layers(model).values():
        _silence(layer, states)
    before = model(input_ids=tokens()).logits
    kept = states - states // 2
    report = compressm.compress(model, states=kept, data=DATA)
    assert set(report.state_dims.values()) == {kept}
    torch.testing.assert_close(model(input_ids=tokens()).logits, before, rtol=0, atol=2e-5)


@torch.no_grad()
def _silence(layer: nn.Module, n: int) -> None:
    """No input to every second state: zero rows of B, and zero biases where there are some."""
    silent = torch.arange(1, n, 2)
    if hasattr(layer, "x_proj"):
        start = layer.get_parameter("x_proj.weight").shape[0] - 2 * n
        rows = [("x_proj.weight", start + silent), ("x_proj.weight", start + n + silent)]
    else:
        groups, heads = int(layer.n_groups), layer.get_parameter("A_log").shape[0]  # type: ignore[arg-type]
        silent = torch.cat([g * n + silent for g in range(groups)])
        in_start = layer.get_parameter("in_proj.weight").shape[0] - heads - 2 * groups * n
        conv_start = layer.get_parameter("conv1d.weight").shape[0] - 2 * groups * n
        rows = [("in_proj.weight", in_start + silent), ("in_proj.bias", in_start + silent)]
        rows += [("conv1d.bias", conv_start + silent)]
    names = dict(layer.named_parameters())
    for name, index in rows:
        if name in names:
            names[name][index] = 0


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=3)
def test_after_a_cut_to_half_training_goes_on_and_generation_works(family: str, data: st.DataObject) -> None:
    model = data.draw(hf_models(family))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = tokens(3, 11, seed=2)
    model.train()
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    states = max(compressm.cutting.state_dims(model).values())
    parameters = dict(model.named_parameters())
    report = compressm.compress(model, fraction=0.5, data=DATA, optimizer=optimizer)
    assert report.cut
    assert set(report.state_dims.values()) == {states // 2}
    assert _config_states(model) == states // 2
    optimizer.zero_grad()
    loss = model(input_ids=x, labels=x).loss
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        if name in trained or ".mixer." in name or ".mamba." in name:
            assert not torch.equal(parameter, before[name]), name
    model.eval()
    _check_generation(model)


def _config_states(model: Any) -> int:
    config = model.config
    return next(getattr(config, f) for f in ("state_size", "mamba_d_state", "ssm_state_size") if hasattr(config, f))


@torch.no_grad()
def _check_generation(model: Any) -> None:
    x = tokens(2, 7, seed=3)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(x, use_cache=True, **options)
    for _ in range(6):
        x = torch.cat([x, model(input_ids=x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, x)


LOAD = """
import sys
sys.modules["compressm"] = None  # not importable
import torch, transformers
folder = sys.argv[1]
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
x = torch.load(f"{folder}/x.pt")
with torch.no_grad():
    assert torch.equal(model(input_ids=x).logits, torch.load(f"{folder}/logits.pt"))
    out = model.generate(x, max_new_tokens=6, do_sample=False, eos_token_id=None)
assert torch.equal(out, torch.load(f"{folder}/generated.pt"))
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=1)
def test_stock_transformers_load_a_compressed_checkpoint(
    family: str, data: st.DataObject, tmp_path_factory: Any
) -> None:
    folder: Path = tmp_path_factory.mktemp(family)
    model, x = data.draw(hf_models(family)), tokens()
    compressm.compress(model, fraction=0.5, data=DATA)
    with torch.no_grad():
        torch.save(x, folder / "x.pt")
        torch.save(model(input_ids=x).logits, folder / "logits.pt")
        out = model.generate(x, max_new_tokens=6, do_sample=False, eos_token_id=None)
    torch.save(out, folder / "generated.pt")
    model.save_pretrained(folder)
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("same")


@pytest.mark.parametrize("family", ["Mamba", "Jamba", "FalconMamba"])
@given(data=st.data())
@settings(max_examples=3)
def test_layers_may_differ_on_request_and_our_own_format_keeps_them(
    family: str, data: st.DataObject, tmp_path_factory: Any
) -> None:
    folder: Path = tmp_path_factory.mktemp("own")
    model = data.draw(hf_models(family))
    fresh = copy.deepcopy(model)
    total = sum(compressm.cutting.state_dims(model).values()) - 1  # cannot be shared out evenly
    report = compressm.compress(model, total_states=total, data=DATA, per_layer=True)
    assert sum(report.state_dims.values()) == total
    compressm.save(model, folder)
    loaded = compressm.load(folder, fresh)
    assert torch.equal(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@given(data=st.data())
@settings(max_examples=2)
def test_every_model_that_a_cut_is_written_to_has_buffers_of_its_own(data: st.DataObject) -> None:
    model = data.draw(hf_models("FalconMamba"))
    other = copy.deepcopy(model)
    plan = plan_reduction(model, RankRule(states=1), moments=gather(model, DATA)).cpu()
    for one in (model, other):
        plan.apply(one)
    for (layer, _), (copied, _) in zip(find_layers(model).values(), find_layers(other).values(), strict=True):
        mine, theirs = (dict(one.named_buffers())["b_layernorm.weight"] for one in (layer, copied))
        assert torch.equal(mine, theirs)
        assert mine.shape == (1,)
        assert mine is not theirs


@pytest.mark.parametrize("family", S6)
@given(data=st.data())
@settings(max_examples=3)
def test_signals_are_what_the_scan_gets(family: str, data: st.DataObject) -> None:
    # The recurrence on the signals, by a loop in float64, and what the layer does after it, is the layer's output.
    model = data.draw(hf_models(family)).double()
    for layer, adapter in find_layers(model).values():
        hidden = torch.randn(2, 9, model.config.hidden_size, dtype=torch.float64)
        with torch.no_grad():
            signals = adapter.signals(layer, hidden)  # type: ignore[union-attr]
            state = torch.zeros(2, *signals.rates.shape, dtype=torch.float64)
            outputs = []
            for t in range(9):
                state = torch.exp(-signals.step[:, t, :, None] * signals.rates) * state
                state = state + signals.x[:, t, :, None] * signals.B[:, t]
                outputs.append((state * signals.C[:, t]).sum(-1))
            u = signals.x / signals.step
            norms = layer.get_parameter("out_proj.weight").norm(dim=0)
            assert signals.gain is not None
            inner = (torch.stack(outputs, 1) + layer.get_parameter("D") * u) * signals.gain / norms
            torch.testing.assert_close(layer.out_proj(inner), layer(hidden), rtol=1e-5, atol=1e-5)  # type: ignore[operator]


def test_a_state_space_layer_without_adapter_is_named() -> None:
    layer = nn.Module()
    layer.A_log = nn.Parameter(torch.zeros(3))
    model = nn.Sequential(nn.Linear(2, 2), layer)
    with pytest.raises(UnsupportedModelError, match=r"no adapter is known for 1 \(Module\).*register an adapter"):
        find_layers(model)
    known = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=40, hidden_size=8, state_size=4, num_hidden_layers=1)
    )
    with pytest.warns(UnknownLayerWarning, match=r"no adapter is known for 0\.1 \(Module\)"):
        found = find_layers(nn.Sequential(model, known))
    assert list(found) == ["1.backbone.layers.0.mixer"]


def test_a_model_without_state_gets_a_clear_error() -> None:
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    with pytest.raises(UnsupportedModelError, match=r"BertModel has no state space layer \(known: .*MambaMixer"):
        compressm.compress(transformers.BertModel(config), states=4)


@pytest.mark.filterwarnings("ignore:.*no more cuts will be tried")
def test_the_config_follows_setbacks_reloads_and_averages(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=8, state_size=8, num_hidden_layers=1)
    model, x = transformers.MambaForCausalLM(config), tokens()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    compressor = compressm.Compressor(
        model, optimizer, 20, states=4, max_drop=0.1, evaluate=lambda one: float(one.config.state_size == 8),
        cuts=1, window=0.1, check_after=1, followers=[average],
    )  # fmt: skip
    sizes = []
    for _ in range(3):
        model(x, labels=x).loss.backward()
        optimizer.step()
        compressor.step()
        sizes.append((compressor.state_dims["backbone.layers.0.mixer"], model.config.state_size))
        assert average.module.config.state_size == model.config.state_size
    assert sizes == [(8, 8), (4, 4), (8, 8)]
    weights = copy.deepcopy(model.state_dict())
    compressm.compress(model, states=3, data=DATA)
    model.load_state_dict(weights)  # what load_best_model_at_end does
    model.save_pretrained(tmp_path)
    again = transformers.MambaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(x).logits, model.eval()(x).logits)


def test_where_one_layer_is_refused_all_stay_and_none_reports_a_cut() -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=8, state_size=8, num_hidden_layers=3)
    model = transformers.MambaForCausalLM(config).eval()
    first, second, _ = (block.mixer for block in model.backbone.layers)
    second.A_log = first.A_log  # which cannot be cut for each of them
    report = compressm.compress(model, states=4, data=DATA)
    assert [layer.outcome for layer in report.layers] == ["refused"] * 3
    assert [layer.energy_kept for layer in report.layers] == [None] * 3
    assert set(report.state_dims.values()) == {8}
    assert "share one state dimension" in report.layers[2].reason


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, state_size=8, num_hidden_layers=2, pad_token_id=0)
    model = transformers.MambaForCausalLM(config).eval()
    x = torch.randint(1, 64, (4, 16))
    padded = torch.cat([torch.zeros(4, 48, dtype=torch.long), x], 1)
    mask = (torch.arange(64) >= 48).long().expand(4, 64)
    with torch.no_grad():
        logits = model(input_ids=padded, attention_mask=mask).logits[:, 48:]
        torch.testing.assert_close(logits, model(input_ids=x).logits, rtol=1e-4, atol=1e-5)
    plain = gather(model, [{"input_ids": x}])
    masked = gather(model, [{"input_ids": padded, "attention_mask": mask}])
    for name, moments in plain.items():
        for key, value in moments.tensors().items():
            size = float(value.abs().max())
            torch.testing.assert_close(masked[name].tensors()[key], value, rtol=1e-3, atol=1e-5 * size)


@pytest.mark.parametrize("whole", [True, False])
def test_padding_is_no_prediction_of_the_loss(whole: bool) -> None:
    """Batches of equal rows, with padding behind them and without: evidence of the loss is the same."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, state_size=8, num_hidden_layers=2, pad_token_id=0)
    model = transformers.MambaForCausalLM(config).train()
    perturb(model)
    x = torch.randint(1, 64, (4, 9))
    padded = torch.cat([x, torch.zeros(4, 15, dtype=torch.long)], 1)
    mask = (torch.arange(24) < 9).long().expand(4, 24)

    def evidence(ids: Tensor, **told: Tensor) -> LossEvidence:
        observer = Observer(model, "tokens")
        observer.observe_next()
        if whole:
            logits = model(input_ids=ids, **told).logits
        else:  # a training that calls the parts of its model
            logits = model.lm_head(model.backbone(input_ids=ids, **told)[0])
        F.cross_entropy(logits[:, :8].flatten(0, 1), x[:, 1:].flatten()).backward()
        return LossEvidence.of(observer)

    plain, found = evidence(x), evidence(padded, attention_mask=mask)
    assert (plain.predictions, found.predictions) == (9, 9)
    for name, fisher in plain.fishers.items():
        torch.testing.assert_close(found.fishers[name].F, fisher.F, rtol=1e-3, atol=1e-5 * float(fisher.F.max()))


def test_gradients_of_jamba_come_back_through_its_norms() -> None:
    torch.manual_seed(0)
    config = transformers.JambaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, mamba_d_state=6, mamba_dt_rank=2, attn_layer_period=3, attn_layer_offset=1,
        num_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.JambaForCausalLM(config).double().eval()
    ((name, (layer, adapter)),) = find_layers(model).items()
    with torch.no_grad():
        for vector in "bc":
            layer.get_parameter(f"{vector}_layernorm.weight").copy_(torch.tensor([1, 2, 0.5, 4, 1.5, 3]))
    data = [{"input_ids": tokens(4, 16, seed=1), "use_cache": False}]
    reduction = reduce_selective(balance_layers(model, moments=gather(model, data))[name], 4)  # type: ignore[arg-type]
    change = adapter.plan(layer_values(layer), reduction)  # type: ignore[union-attr]
    (part,) = (part for part in change.parameters if part.names == ("x_proj.weight",))
    old, new = layer.get_parameter("x_proj.weight").detach(), part.values[0]
    rows = part.pullback.mT @ new  # what the old rows are on the kept subspace
    assert reduction.kept is not None
    kept = 2 + reduction.kept[0]  # after the rows of the time step
    torch.testing.assert_close(rows[kept], old[kept])
