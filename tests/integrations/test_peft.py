"""Against the real peft: cuts through LoRA's factors, and what is saved of a model with adapters."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    Trainer,
    TrainingArguments,
)

import compressm
from compressm.adapters.composed import effective_weight
from compressm.cutting import state_dims
from compressm.cutting.fitting import fit_any_size
from compressm.errors import CheckpointError, UnsupportedModelError
from compressm.integrations.peft import load, save
from compressm.integrations.transformers import CompressionCallback
from hf_models import perturb, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")  # by peft

COMMON: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
STATES, CUT = 8, 3


def mamba(**options: Any) -> Any:
    return _built(MambaForCausalLM, MambaConfig(**COMMON, state_size=STATES, time_step_rank=2, **options))


def mamba2(**options: Any) -> Any:
    sizes: dict[str, Any] = {"state_size": STATES, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
    return _built(Mamba2ForCausalLM, Mamba2Config(**{**COMMON, **options}, **sizes))


def bamba() -> Any:
    """A hybrid of Mamba-2 and attention."""
    config = {**COMMON, "num_hidden_layers": 3, "intermediate_size": 12, "attn_layer_indices": [1]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 8}
    states = {"mamba_d_state": STATES, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8}
    return _built(BambaForCausalLM, BambaConfig(**config, **heads, **states, mamba_proj_bias=True))


def griffin() -> Any:
    """A model of which a cut removes columns too."""
    config = {**COMMON, "num_hidden_layers": 3, "intermediate_size": 24, "lru_width": 16, "attention_window_size": 8}
    return _built(
        RecurrentGemmaForCausalLM, RecurrentGemmaConfig(**config, num_attention_heads=2, num_key_value_heads=1)
    )


def _built(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config)
    if config.num_hidden_layers < 12:  # deep models of such weights amplify rounding
        perturb(model)
    return model


MODELS: dict[str, tuple[Any, list[str]]] = {
    "mamba": (mamba, ["in_proj", "x_proj"]),
    "mamba2": (mamba2, ["in_proj"]),
    "hybrid": (bamba, ["in_proj", "out_proj", "q_proj"]),
    "columns": (griffin, ["linear_x", "linear_y", "linear_out"]),
}


def adapted(base: Any, targets: list[str], **options: Any) -> Any:
    """A model with LoRA whose terms are not zero."""
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, **options))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
    return model


def trained(model: Any, steps: int = 8, **arguments: Any) -> compressm.Compressor:
    """Train the adapters, with a cut on the way."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    arguments = {"states": CUT, "cuts": 1, "window": 5 / 40, **arguments}
    compressor = compressm.Compressor(model.train(), optimizer, 40, **arguments)
    for step in range(steps):
        x = tokens(2, 13, seed=step)
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        compressor.step()
    model.eval()
    return compressor


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(3, 20, seed=99)).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_of_the_factors_is_the_cut_of_the_merged_weight(name: str) -> None:
    make, targets = MODELS[name]
    model = adapted(make(), targets)
    merged = copy.deepcopy(model).merge_and_unload()
    with model.disable_adapter():
        assert (logits(model) - logits(merged)).abs().max() > 0.1  # the adapters matter
    x = {"input_ids": tokens(3, 20)}
    for one in (model, merged):
        report = compressm.compress(one, states=CUT, data=[x])
        assert {layer.states_after for layer in report.layers} == {CUT}
    torch.testing.assert_close(logits(model), logits(merged), rtol=0, atol=1e-5 * float(logits(merged).abs().max()))
    again = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5 * float(logits(model).abs().max()))
    for theirs, ours in zip(merged.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_merged_adapters_can_be_unmerged_after_a_cut(name: str) -> None:
    make, targets = MODELS[name]
    model = adapted(make(), targets)
    apart = copy.deepcopy(model)
    model.merge_adapter()
    for one in (model, apart):
        compressm.compress(one, states=CUT, data=[{"input_ids": tokens(3, 20)}])
    scale = float(logits(apart).abs().max())
    torch.testing.assert_close(logits(model), logits(apart), rtol=0, atol=1e-5 * scale)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), logits(apart), rtol=0, atol=1e-5 * scale)


X_PROJ = "base_model.model.backbone.layers.0.mixer.x_proj"


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")  # these cannot be merged
def test_every_adapter_is_cut_and_each_as_if_it_were_alone() -> None:
    model = adapted(mamba(), ["x_proj"], lora_bias=True)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["in_proj", "x_proj"], lora_bias=True))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
    module: Any = model.get_submodule(X_PROJ)
    base, before = module.base_layer.weight.detach().double(), {one: terms(module, one) for one in ("default", "other")}
    report = compressm.compress(model, states=CUT, data=[{"input_ids": tokens(3, 20)}])
    assert report.layers[0].states_after == CUT
    # The map of the rows, from the base alone: it has more columns than rows.
    M = torch.linalg.lstsq(base.T, module.base_layer.weight.detach().double().T).solution.T
    for one, (weight, bias) in before.items():
        after = terms(module, one)
        torch.testing.assert_close(after[0], M @ weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[1], M @ bias, rtol=1e-4, atol=1e-5)


def terms(module: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """``W_0 + s B A`` and the bias of a projection, from the definition."""
    A, B = module.lora_A[adapter].weight.double(), module.lora_B[adapter]
    scale = module.scaling[adapter]
    weight = module.base_layer.weight.double() + scale * B.weight.double() @ A
    return weight.detach(), scale * B.bias.detach().double()


def test_biases_of_adapters_are_cut_with_the_biases_of_the_base() -> None:
    model = adapted(bamba(), ["in_proj", "out_proj"], lora_bias=True)
    merged = copy.deepcopy(model).merge_and_unload()
    for one in (model, merged):
        compressm.compress(one, states=CUT, data=[{"input_ids": tokens(3, 20)}])
    torch.testing.assert_close(logits(model), logits(merged), rtol=0, atol=1e-5 * float(logits(merged).abs().max()))


def test_the_effective_weight_is_that_of_the_definition_merged_or_not() -> None:
    model = adapted(bamba(), ["out_proj"])
    module: Any = next(one for name, one in model.named_modules() if name.endswith("layers.0.mamba.out_proj"))
    A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
    base = module.base_layer.weight.detach().clone()
    expected = (base + module.scaling["default"] * B @ A).detach()
    torch.testing.assert_close(effective_weight(module), expected)
    with model.disable_adapter():
        assert torch.equal(effective_weight(module), base)
    model.merge_adapter()
    torch.testing.assert_close(effective_weight(module), expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_optimizers_state_of_the_factors_is_that_of_the_gradient_of_the_smaller_weight(name: str) -> None:
    """With one step of momentum the state is the gradient. ``dL/dB = s (dL/dW) A^T``, and ``dL/dA = s B^T (dL/dW)``,
    hold before the cut and after it, with the gradient of W carried over as for a plain weight."""
    make, targets = MODELS[name]
    model = adapted(make(), targets)
    for one in model.parameters():
        one.requires_grad_()
    plain = copy.deepcopy(model).merge_and_unload()
    x = tokens(2, 13)
    optimizers = []
    for one in (model, plain):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.0, momentum=0.9)
        one.train()(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        compressm.compress(one, states=CUT, data=[{"input_ids": x}], optimizer=optimizer)
        optimizers.append(optimizer)
    states = [optimizer.state for optimizer in optimizers]
    checked = 0
    for path, module in model.named_modules():
        if not hasattr(module, "lora_B") or not path.endswith(("in_proj", "x_proj", "linear_x", "linear_out")):
            continue
        layer: Any = module
        weight = plain.get_parameter(f"{path.removeprefix('base_model.model.')}.weight")
        G, scale = states[1][weight]["momentum_buffer"].double(), layer.scaling["default"]
        A, B = (getattr(layer, f"lora_{factor}")["default"].weight for factor in "AB")
        cut, expected = (A, scale * B.T.double() @ G) if path.endswith("out") else (B, scale * G @ A.T.double())
        found = states[0][cut]["momentum_buffer"].double()
        assert found.shape == cut.shape
        tolerance = 1e-4 * float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=tolerance)
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("name", MODELS)
def test_the_next_step_moves_every_factor(name: str) -> None:
    make, targets = MODELS[name]
    model = adapted(make(), targets, lora_dropout=0.1)
    compressor = trained(model, 5)
    assert set(state_dims(model).values()) == {CUT}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    x = tokens(2, 13, seed=7)
    model.train()(input_ids=x, labels=x).loss.backward()
    compressor.optimizer.step()
    for one, value in model.named_parameters():
        assert torch.equal(value, before[one]) is not value.requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_sizes_that_modules_store_are_those_of_their_weights_and_more_adapters_fit(name: str) -> None:
    make, targets = MODELS[name]
    model = adapted(make(), targets)
    compressm.compress(model, states=CUT, data=[{"input_ids": tokens(3, 20)}])
    model.add_adapter("later", LoraConfig(r=2, target_modules=targets))
    model.set_adapter("later")
    logits(model)
    seen = 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or hasattr(module, "lora_A"):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape), path
            seen += hasattr(module, "lora_A")
    assert seen >= 2


def test_observation_draws_no_random_numbers_for_dropout() -> None:
    ends = []
    for states in (CUT, None):
        model = adapted(mamba(), ["in_proj", "x_proj"], lora_dropout=0.5)
        torch.manual_seed(1)
        if states is None:
            optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
            for step in range(4):
                x = tokens(2, 13, seed=step)
                optimizer.zero_grad()
                model.train()(input_ids=x, labels=x).loss.backward()
                optimizer.step()
        else:
            trained(model, 4)  # observed, and not cut yet
        ends.append(torch.cat([one.detach().flatten() for one in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.filterwarnings("ignore:.*no more cuts will be tried")
def test_a_cut_that_is_undone_restores_the_factors() -> None:
    model = adapted(mamba2(), ["in_proj"])
    compressor = trained(model, 5, max_drop=0.1, evaluate=lambda one: float(max(state_dims(one).values()) == STATES))
    assert set(state_dims(model).values()) == {CUT}
    x = tokens(2, 13)
    for _ in range(compressor.check_after):
        model.train()(input_ids=x, labels=x).loss.backward()
        compressor.optimizer.step()
        compressor.step()
    assert [event.kind for event in compressor.history] == ["cut", "rolled_back", "stopped", "fell_short"]
    assert set(state_dims(model).values()) == {STATES}
    logits(model)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"target_modules": ["in_proj"], "use_dora": True}, r"mixer\.in_proj\.weight .*DoraLinear.*merge"),
    "a copy to train": (
        {"target_modules": ["embeddings"], "modules_to_save": ["mixer"]},
        r"layers\.0\.mixer is the adapter modules_to_save .*target_modules",
    ),
    "a parameter": ({"target_parameters": ["mixer.A_log"]}, r"mixer is the adapter ParamWrapper .*target_modules"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", REFUSED)
def test_other_adapters_are_refused_at_construction(how: str) -> None:
    options, message = REFUSED[how]
    model = get_peft_model(mamba2() if how == "DoRA" else mamba(), LoraConfig(r=2, **options))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    with pytest.raises(UnsupportedModelError, match=message):
        compressm.Compressor(model, optimizer, 40, states=CUT)
    with pytest.raises(UnsupportedModelError, match=message):
        compressm.compress(model, states=CUT, data=[{"input_ids": tokens()}])


def test_an_adapter_of_another_kind_is_refused_at_construction() -> None:
    from peft import IA3Config

    model = get_peft_model(mamba2(), IA3Config(target_modules=["in_proj"], feedforward_modules=[]))
    with pytest.raises(UnsupportedModelError, match=r"in_proj\.weight is computed .*peft.*merge_and_unload"):
        compressm.compress(model, states=CUT, data=[{"input_ids": tokens()}])


def test_our_own_layers_are_cut_through_their_factors_too() -> None:
    from compressm.layers import Mamba, Mamba2

    torch.manual_seed(0)
    model = adapted(nn.Sequential(Mamba(4, 8), Mamba2(4, 8, head_dim=4)), ["in_proj", "x_proj", "dt_proj", "out_proj"])
    u = torch.randn(3, 20, 4)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(model(u), merged(u), rtol=1e-4, atol=1e-5)  # no factor is passed over
    for one in (model, merged):
        assert {layer.states_after for layer in compressm.compress(one, states=CUT, data=[u]).layers} == {CUT}
    torch.testing.assert_close(model(u), merged(u), rtol=1e-4, atol=1e-5)


# Saving


SAVED = {
    "mamba, state not in the factors": (mamba, ["in_proj"], {}),
    "mamba": (mamba, ["in_proj", "x_proj"], {}),
    "mamba, split off": (mamba, ["in_proj", "x_proj"], {"init_lora_weights": "pissa"}),
    "mamba2": (mamba2, ["in_proj"], {}),
    "hybrid": (bamba, ["in_proj", "q_proj"], {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", SAVED)
def test_an_adapter_holds_what_the_cut_changed_in_the_base(name: str, tmp_path: Path) -> None:
    make, targets, options = SAVED[name]
    model = get_peft_model(make(), LoraConfig(r=4, target_modules=targets, **options))
    trained(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    # peft by itself refuses the uncut base,
    with pytest.raises(RuntimeError, match="size mismatch for base_model"):
        PeftModel.from_pretrained(make(), tmp_path / "adapter")
    # a base that takes any size gets all that the cut changed, config included,
    base = make()
    again = load(tmp_path / "adapter", base)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    assert set(state_dims(base).values()) == {CUT}
    assert getattr(base.config, "state_size", getattr(base.config, "mamba_d_state", None)) == CUT
    if "init_lora_weights" not in options:  # which peft cannot do without memory
        torch.testing.assert_close(logits(load(tmp_path / "adapter", make(), low_cpu_mem_usage=True)), expected)
    # and an adapter that was merged meanwhile is not counted twice.
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged", make())), expected, rtol=0, atol=1e-5)


def test_a_copy_of_a_model_saves_itself(tmp_path: Path) -> None:
    model = adapted(mamba2(), ["in_proj"])
    trained(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(0.9)
    other.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.backbone.layers.0.mixer.conv1d.weight"
    assert torch.equal(saved[name], other.get_parameter(name))


def test_a_layer_that_is_left_out_keeps_an_adapter_that_no_cut_could_follow(tmp_path: Path) -> None:
    model = get_peft_model(mamba(), LoraConfig(r=2, target_modules=["layers.1.mixer.x_proj"], use_dora=True))
    trained(model, exclude="*.layers.1", per_layer=True)
    assert list(state_dims(model).values()) == [CUT, STATES]
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path, mamba())), logits(model), rtol=0, atol=1e-5)


def test_an_average_of_a_model_with_adapters_follows_and_saves_itself(tmp_path: Path) -> None:
    model = adapted(mamba(), ["in_proj", "x_proj"])
    average = torch.optim.swa_utils.AveragedModel(model)
    trained(model, followers=[average])
    assert set(state_dims(average).values()) == {CUT}
    average.update_parameters(model)
    average.module.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path, mamba())), logits(average.module), rtol=0, atol=1e-5)


def test_an_adapter_without_its_base_does_not_slice_another_base(tmp_path: Path) -> None:
    """As saved by peft alone: the factors of a smaller layer, and a base of the first size that takes any size."""
    model = adapted(mamba2(), ["in_proj"])
    trained(model)
    type(model).save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"of 3 states, and leave out .*in_proj\.base_layer\.weight"):
        load(tmp_path, mamba2())


FRESH = """
import sys, torch
from peft import AutoPeftModel, PeftModel
from transformers import Mamba2ForCausalLM
folder, out = sys.argv[1:]
x = torch.load(f"{folder}/tokens.pt")
with torch.no_grad():
    adapted = AutoPeftModel.from_pretrained(folder).eval()(input_ids=x).logits
    base = Mamba2ForCausalLM.from_pretrained(f"{folder}/base")
    given = PeftModel.from_pretrained(base, folder).eval()(input_ids=x).logits
    merged = Mamba2ForCausalLM.from_pretrained(f"{folder}/merged").eval()(input_ids=x).logits
assert "compressm" not in sys.modules
torch.save([adapted, given, merged], out)
"""


@pytest.mark.slow
def test_lora_on_twelve_layers_in_a_fresh_process_with_peft_alone(tmp_path: Path) -> None:
    model = adapted(mamba2(num_hidden_layers=12), ["in_proj"])
    trained(model, 8)  # three steps on after the cut
    folder = tmp_path / "saved"
    save(model, folder)
    copy.deepcopy(model).merge_and_unload().save_pretrained(folder / "merged")
    torch.save(tokens(3, 20, seed=99), folder / "tokens.pt")
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, str(folder), str(tmp_path / "out.pt")],
        check=True, env=environment, cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    adapted_there, given, merged = torch.load(tmp_path / "out.pt")
    assert torch.equal(adapted_there, logits(model))
    assert torch.equal(given, logits(model))
    torch.testing.assert_close(merged, logits(model), rtol=0, atol=1e-5)


def test_what_save_wrote_is_loaded_after_a_move_and_only_with_its_base(tmp_path: Path) -> None:
    model = adapted(mamba(), ["in_proj", "x_proj"])
    trained(model)
    save(model, tmp_path / "first" / "run")
    save(model, tmp_path / "first" / "second", base=tmp_path / "first" / "run" / "base")  # is not written again
    assert not (tmp_path / "first" / "second" / "base").exists()
    (tmp_path / "first").rename(tmp_path / "moved")
    for name in ("run", "second"):
        again = load(tmp_path / "moved" / name)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
        # Tensors in a mapped file lie at other addresses, for which matrix products may round in another order.
        torch.testing.assert_close(logits(again), logits(model))
    config = tmp_path / "moved" / "run" / "base" / "config.json"
    config.write_text(config.read_text().replace("40", "41"))
    with pytest.raises(CheckpointError, match=r"is not the base that .* was saved with"):
        load(tmp_path / "moved" / "run")


def test_a_base_that_adapters_were_split_off_is_held_too(tmp_path: Path) -> None:
    model = get_peft_model(mamba(), LoraConfig(r=4, target_modules=["in_proj"], init_lora_weights="pissa"))
    trained(model)
    save(model, tmp_path)  # peft does not split it again when it loads this
    for base in (None, mamba()):
        torch.testing.assert_close(logits(load(tmp_path, base)), logits(model), rtol=0, atol=1e-5)


def test_save_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    base = mamba()
    with pytest.raises(UnsupportedModelError, match=r"expected a peft\.PeftModel"):
        save(base, tmp_path / "a")
    model = adapted(base, ["in_proj"])
    save(model, tmp_path / "b")
    base.backbone.norm_f.weight.data.add_(1)
    with pytest.raises(CheckpointError, match=r"holds another base: its backbone\.norm_f\.weight"):
        save(model, tmp_path / "b")
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match=r"merged into the base: call unmerge_adapter"):
        save(model, tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"holds no base .*load\(folder, model="):
        load(tmp_path / "c")
    other = get_peft_model(nn.Sequential(compressm.layers.Mamba(4, 8)), LoraConfig(target_modules=["0.x_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"the base is a Sequential.*compressm\.save"):
        save(other, tmp_path / "d")


# In the Trainer


def in_trainer(folder: Path, targets: list[str], **arguments: Any) -> Trainer:
    model = adapted(mamba(), targets)
    options: dict[str, Any] = {
        "max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "seed": 1, "dataloader_pin_memory": False, "logging_steps": 100,
    }  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens(32, 13)]
    settings = TrainingArguments(output_dir=str(folder), **{**options, **arguments})
    trainer = Trainer(model, settings, train_dataset=data, eval_dataset=data[:4])
    trainer.add_callback(CompressionCallback(trainer, states=CUT, cuts=2, window=0.5))  # at 3 and 6
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["in_proj"], ["in_proj", "x_proj"]], ids=str)
def test_the_trainer_resumes_before_between_and_after_cuts(targets: list[str], tmp_path: Path) -> None:
    whole = in_trainer(tmp_path / "whole", targets)
    whole.train()
    assert set(state_dims(whole.model).values()) == {CUT}
    end = {name: value.clone() for name, value in whole.model.state_dict().items()}
    for step in (8, 4, 2):
        again = in_trainer(tmp_path / "whole", targets)  # a fresh base of the first size
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert all(torch.equal(value, end[name]) for name, value in again.model.state_dict().items())


@pytest.mark.filterwarnings("ignore::compressm.integrations.best_model.OlderModelWarning")
@pytest.mark.parametrize("best", [2, 4, 8])
def test_the_trainers_best_model_is_the_one_that_was_saved(best: int, tmp_path: Path) -> None:
    trainer = in_trainer(
        tmp_path, ["in_proj"], eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    outputs: dict[int, Tensor] = {}

    def score(_: Any) -> dict[str, float]:
        step = trainer.state.global_step
        outputs[step] = logits(trainer.model)
        return {"score": float(step == best)}

    trainer.compute_metrics = score
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith(f"checkpoint-{best}")
    torch.testing.assert_close(logits(trainer.model), outputs[best], rtol=0, atol=0)


def test_adapters_added_by_transformers_itself_hold_the_base_too(tmp_path: Path) -> None:
    model = mamba()
    model.add_adapter(LoraConfig(r=4, target_modules=["in_proj"]))
    trained(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved["base_model.model.backbone.layers.0.mixer.A_log"].shape[1] == CUT
    again = PeftModel.from_pretrained(fit_any_size(mamba()), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
