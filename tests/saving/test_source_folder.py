"""Checkpoints of transformers that hold more than transformers loads: all of it reaches the smaller checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")
import transformers
from huggingface_hub import ModelCard

import compressm
from compressm.cli import main
from compressm.errors import CheckpointError, ConfigError
from compressm.lab.one_shot import compress_checkpoint
from compressm.lab.prospects import analyze_checkpoint
from compressm.layers import LanguageModel
from compressm.saving.source_folder import tensors_of, weight_files
from compressm.training.history import Kept

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
OTHER_FILES = {
    "README.md": "---\nlicense: apache-2.0\n---\n# A model\n",
    "LICENSE": "Apache-2.0",
    "special_tokens_map.json": "{}",
    "modeling_custom.py": "raise RuntimeError('never run')\n",
    "images/curve.svg": "<svg/>",
    "chat_template.jinja": "{{ messages }}",
}
STALE_FILES = ("original/consolidated.pth", "onnx/model.onnx", "tf_model.h5", "model.fp16.safetensors")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def nemotron(folder: Path, vocabulary: int = 256, shards: str = "50GB", tied: bool = False) -> Any:
    """Two Mamba-2 layers and one of attention, with a promise of one layer that predicts further tokens."""
    torch.manual_seed(0)
    build: Any = transformers.NemotronHConfig
    config = build(
        vocab_size=vocabulary, hidden_size=8, num_hidden_layers=3, layers_block_type=["mamba", "attention", "mamba"],
        intermediate_size=12, num_attention_heads=2, num_key_value_heads=2, head_dim=4, ssm_state_size=6,
        mamba_num_heads=4, mamba_head_dim=4, n_groups=1, chunk_size=8, n_routed_experts=2, moe_intermediate_size=8,
        num_nextn_predict_layers=1, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.NemotronHForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def add_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Into the last of a checkpoint's files, as those of the authors have them."""
    last = weight_files(folder)[-1]
    save_file({**load_file(last), **tensors}, last, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] |= dict.fromkeys(tensors, last.name)
        index.write_text(json.dumps(content))


def prediction_layers() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "mtp.layers.0.mixer.q_proj.weight": torch.randn(8, 8),
        "mtp.layers.0.norm.weight": torch.ones(8),
        "mtp.layers.0.eh_proj.weight": torch.randn(8, 16).bfloat16(),
        "score.weight": torch.randn(2, 8),  # of no class that transformers has here
    }


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def test_a_card_with_unreadable_metadata_is_copied_as_it_is_and_named(tmp_path: Path, text: Path) -> None:
    nemotron(tmp_path / "big")
    (tmp_path / "big" / "README.md").write_text(card := "---\nlicense: : :\n---\n# A\n")
    result = compress_checkpoint(tmp_path / "big", tmp_path / "small", text, states=2, sequences=4, length=32)
    assert (tmp_path / "small" / "README.md").read_text() == card
    assert "card copied as it was: README.md: its metadata cannot be read" in str(result)


@pytest.mark.parametrize("shards", ["50GB", "4KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_and_every_file_reaches_the_output(shards: str, tied: bool, tmp_path: Path, text: Path) -> None:
    big, small = tmp_path / "big", tmp_path / "small"
    nemotron(big, shards=shards, tied=tied)
    extra = prediction_layers()
    add_tensors(big, extra)
    config = json.loads((big / "config.json").read_text())
    (big / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoConfig": "modeling_custom.C"}, "own": [1]})
    )
    for name, content in OTHER_FILES.items():
        (big / name).parent.mkdir(exist_ok=True)
        (big / name).write_text(content)
    for name in STALE_FILES:
        (big / name).parent.mkdir(exist_ok=True)
        (big / name).write_bytes(b"old")
    (big / ".cache").mkdir()
    (big / ".cache" / "lock").touch()
    generation = '{"_from_model_config": false, "top_k": 7, "do_sample": true}'
    (big / "generation_config.json").write_text(generation)
    result = compress_checkpoint(big, small, text, states=2, sequences=4, length=32)

    before, after = stored(big), stored(small)
    assert set(before) <= set(after)
    for name, value in extra.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value)
    assert result.carried.tensors == tuple(sorted(extra))
    as_they_were = {**OTHER_FILES, "generation_config.json": generation}
    card = as_they_were.pop("README.md")
    for name, content in as_they_were.items():
        assert (small / name).read_text() == content, name
    assert set(result.carried.files) == set(as_they_were)
    extended = (small / "README.md").read_text()
    assert result.carried.extended == ("README.md",)
    assert "license: apache-2.0" in extended
    assert card.rpartition("---\n")[2].strip() in extended
    assert "| 2 | 6 | 2 |" in extended
    assert "- compressed\n" in extended
    assert set(result.carried.left or {}) == {*STALE_FILES, ".cache"}
    for name in (*STALE_FILES, ".cache"):
        assert not (small / name).exists()
        assert f"not copied: {name}" in str(result)
    written = json.loads((small / "config.json").read_text())
    assert written["ssm_state_size"] == 2
    assert (written["own"], written["auto_map"]) == ([1], {"AutoConfig": "modeling_custom.C"})
    assert not list(tmp_path.glob("*.new"))

    # The index names every tensor where it is, and stock transformers loads what was cut.
    if (small / "model.safetensors.index.json").exists():
        index = json.loads((small / "model.safetensors.index.json").read_text())
        assert {name: small / file for name, file in index["weight_map"].items()} == tensors_of(weight_files(small))
        sizes = sum(value.numel() * value.element_size() for value in after.values())
        assert index["metadata"]["total_size"] == sizes
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(small, output_loading_info=True)
    again, info = loaded
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert again.config.ssm_state_size == 2


def test_without_anything_special_the_output_is_one_file(tmp_path: Path, text: Path) -> None:
    nemotron(tmp_path / "big")
    result = compress_checkpoint(tmp_path / "big", tmp_path / "small", text, states=2, sequences=4, length=32)
    assert result.carried.tensors == ()
    assert sorted(os.listdir(tmp_path / "small")) == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_checkpoint_in_the_older_format_loses_nothing_either(tmp_path: Path, text: Path) -> None:
    nemotron(tmp_path / "big")
    extra = prediction_layers()
    tensors = {**load_file(tmp_path / "big" / "model.safetensors"), **extra}
    (tmp_path / "big" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "big" / "pytorch_model.bin")
    compress_checkpoint(tmp_path / "big", tmp_path / "small", text, states=2, sequences=4, length=32)
    after = stored(tmp_path / "small")
    assert set(tensors) <= set(after)
    assert all(torch.equal(after[name], value) for name, value in extra.items())
    assert not (tmp_path / "small" / "pytorch_model.bin").exists()


def test_what_depends_on_the_state_size_and_cannot_be_cut_is_named(tmp_path: Path, text: Path) -> None:
    model = nemotron(tmp_path / "big")
    shape = model.get_parameter("model.layers.0.mixer.in_proj.weight").shape
    add_tensors(tmp_path / "big", {"mtp.layers.0.mixer.in_proj.weight": torch.randn(shape)})
    with pytest.raises(
        CheckpointError, match=r"mtp\.layers\.0\.mixer\.in_proj\.weight.*depends on the state dimension"
    ):
        compress_checkpoint(tmp_path / "big", tmp_path / "small", text, states=2)
    assert not (tmp_path / "small").exists()


def test_a_model_that_transformers_would_complete_at_random_is_refused(tmp_path: Path, text: Path) -> None:
    nemotron(tmp_path / "big")
    file = tmp_path / "big" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("backbone.layers.1.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.1\.norm\.weight.*at random"):
        compress_checkpoint(tmp_path / "big", tmp_path / "small", text, states=2)


@pytest.mark.parametrize("vocabulary", [255, 257, 5000])
def test_bytes_are_ids_for_a_vocabulary_of_bytes_only(vocabulary: int, tmp_path: Path, text: Path) -> None:
    nemotron(tmp_path / "big", vocabulary)
    compressm.save(LanguageModel(vocabulary, d_model=4, d_state=3), tmp_path / "own")
    for folder in ("big", "own"):
        with pytest.raises(ConfigError, match=rf"no tokenizer and a vocabulary of {vocabulary}, and only one of 256"):
            compress_checkpoint(tmp_path / folder, tmp_path / "small", text, states=2)
        with pytest.raises(ConfigError, match="no tokenizer"):
            analyze_checkpoint(tmp_path / folder, text)
    arguments = [
        "compress",
        str(tmp_path / "big"),
        "--states",
        "2",
        "--data",
        str(text),
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(arguments) == 2
    assert not (tmp_path / "o").exists()


def tokenizer(folder: Path, words: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[unk]": 0, **{word: 1 + index for index, word in enumerate(dict.fromkeys(TEXT.split()))}}
    vocabulary |= {f"word{index}": index for index in range(len(vocabulary), words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[unk]").save_pretrained(folder)


def test_a_tokenizer_is_used_and_copied_byte_by_byte(tmp_path: Path, text: Path) -> None:
    nemotron(tmp_path / "big", vocabulary=40)
    tokenizer(tmp_path / "big", 40)
    compress_checkpoint(tmp_path / "big", tmp_path / "small", text, states=2, sequences=4, length=16)
    for path in (tmp_path / "big").glob("tokenizer*"):
        assert (tmp_path / "small" / path.name).read_bytes() == path.read_bytes()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, text: Path) -> None:
    nemotron(tmp_path / "big", vocabulary=5)
    tokenizer(tmp_path / "big", 40)
    with pytest.raises(ConfigError, match=r"gives ids up to 9, and the model's vocabulary has 5"):
        compress_checkpoint(tmp_path / "big", tmp_path / "small", text, states=2, sequences=4, length=16)


def test_our_own_checkpoints_keep_their_history_and_files(tmp_path: Path, text: Path) -> None:
    from compressm.runtime.files import read_pair, write_pair

    compressm.save(LanguageModel(256, d_model=4, d_state=5), tmp_path / "big", card=True)
    names = ("model.safetensors", "compressm.json")
    description, tensors = read_pair(tmp_path / "big", *names)
    description.pop("sha256")
    history = [Kept(3, 0.5, reference=0.5).to_dict()]
    write_pair(tmp_path / "big", *names, tensors, {**description, "history": history})
    (tmp_path / "big" / "notes.txt").write_text("mine")
    (tmp_path / "big" / "model-step.onnx").write_text("old")
    result = compress_checkpoint(tmp_path / "big", tmp_path / "small", text, states=2, sequences=4, length=16)
    assert read_pair(tmp_path / "small", *names)[0]["history"] == history
    assert (tmp_path / "small" / "notes.txt").read_text() == "mine"
    card = ModelCard((tmp_path / "small" / "README.md").read_text())
    assert "| `blocks.0.ssm` | 2 | 2 |" in card.text
    assert re.search(r"\| \d \| 5 \| 2 \|", card.text)
    assert card.data.eval_results is not None
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == {
        "loss": pytest.approx(result.loss_after),
        "perplexity": pytest.approx(result.score_after),
    }
    assert result.carried.left == {"model-step.onnx": "weights from before the cut"}


def test_an_output_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nemotron(tmp_path / "big")
    (tmp_path / "big" / "LICENSE").write_text("x")
    (tmp_path / "small").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        compress_checkpoint(tmp_path / "big", tmp_path / "small", text, states=2, sequences=4, length=16)
    assert sorted(os.listdir(tmp_path)) == ["big", "small", "text.txt"]
    assert os.listdir(tmp_path / "small") == []


@pytest.mark.parametrize("shards", ["50GB", "3KB"])
@pytest.mark.parametrize("family", ["Mamba", "Mamba2"])
def test_numbers_in_float32_beside_bfloat16_stay_what_they_are(
    family: str, shards: str, tmp_path: Path, text: Path
) -> None:
    """Transformers loads all in bfloat16. In Mamba, `A_log` is cut, and named."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"vocab_size": 256, "hidden_size": 16, "state_size": 6, "num_hidden_layers": 2}
    if family == "Mamba2":
        options |= {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.bfloat16().save_pretrained(tmp_path / "big", max_shard_size=shards)
    for file in weight_files(tmp_path / "big"):
        tensors = load_file(file)
        wide = {name: torch.randn(one.shape) for name, one in tensors.items() if name.endswith((".A_log", ".D"))}
        save_file({**tensors, **wide}, file, metadata={"format": "pt"})
    lost = compress_checkpoint(tmp_path / "big", tmp_path / "small", text, states=3, sequences=4, length=16)
    before, after = stored(tmp_path / "big"), stored(tmp_path / "small")
    kept = {name for name, one in before.items() if one.dtype == torch.float32}
    cut = {name for name in kept if family == "Mamba" and name.endswith(".A_log")}
    assert len(kept) == 4
    assert set(lost.carried.narrowed) == cut
    assert all(name.rpartition(".")[2] == "A_log" and name in str(lost) for name in cut)
    for name in kept - cut:
        assert after[name].dtype == torch.float32
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    index = tmp_path / "small" / "model.safetensors.index.json"
    if index.is_file():
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(one.nbytes for one in after.values())
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert again.config.state_size == 3
