"""Checkpoints in mamba_ssm's own format, held against its constructors' shapes and transformers' computations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")

import transformers

from compressm.errors import CheckpointError
from compressm.lab.one_shot import compress_checkpoint
from compressm.saving.mamba_ssm_format import is_mamba_ssm, load

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def checkpoint(folder: Path, kind: str, file: str) -> Any:
    """What ``MambaLMHeadModel.save_pretrained`` writes, and the same model in transformers' class."""
    torch.manual_seed(0)
    common = {"vocab_size": 256, "hidden_size": 8, "num_hidden_layers": 2, "tie_word_embeddings": True}
    if kind == "Mamba2":
        config = transformers.Mamba2Config(**common, state_size=12, head_dim=4, num_heads=4, n_groups=1, chunk_size=16)
        model, cfg = transformers.Mamba2ForCausalLM(config), {"layer": "Mamba2", "d_state": 12, "headdim": 4}
        cfg["chunk_size"] = 16
    else:
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**common, state_size=12))
        cfg = {"d_state": 12}
    folder.mkdir()
    written = {"d_model": 8, "d_intermediate": 0, "n_layer": 2, "vocab_size": 250, "ssm_cfg": cfg, "attn_layer_idx": []}
    written |= {"attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    written |= {"pad_vocab_size_multiple": 8, "tie_embeddings": True}
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "LICENSE").write_text("Apache-2.0")
    tensors = {
        name.replace("embeddings", "embedding"): value.detach().clone() for name, value in model.state_dict().items()
    }
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file)
    return model.eval()


def read(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True) if file.suffix == ".bin" else load_file(file)


@pytest.mark.parametrize("kind", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_it_is_read_cut_and_written_as_such(kind: str, file: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "big", kind, file)
    (tmp_path / "text.txt").write_text(TEXT)
    assert is_mamba_ssm(tmp_path / "big")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(load(tmp_path / "big")(ids).logits, model(ids).logits)

    compress_checkpoint(tmp_path / "big", tmp_path / "small", tmp_path / "text.txt", states=5, sequences=4, length=32)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("big", "small"))
    assert after == {**before, "ssm_cfg": {**before["ssm_cfg"], "d_state": 5}}
    assert (tmp_path / "small" / "LICENSE").read_text() == "Apache-2.0"
    big, small = (read(tmp_path / name / file) for name in ("big", "small"))
    assert set(big) == set(small)
    mixer = "backbone.layers.0.mixer"
    if kind == "Mamba2":  # in_proj: 2 d_inner + 2 groups N + heads; conv1d: d_inner + 2 groups N
        assert small[f"{mixer}.in_proj.weight"].shape == (2 * 16 + 2 * 5 + 4, 8)
        assert small[f"{mixer}.conv1d.weight"].shape == (16 + 2 * 5, 1, 4)
    else:  # x_proj: dt_rank + 2 N
        assert small[f"{mixer}.x_proj.weight"].shape == (1 + 2 * 5, 16)
        assert small[f"{mixer}.A_log"].shape == (16, 5)
    assert load(tmp_path / "small")(ids).logits.isfinite().all()


def test_layers_that_transformers_has_not_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "big", "Mamba1", "model.safetensors")
    path = tmp_path / "big" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"ssm_cfg": {"layer": "Mamba4"}}, "is a model of mamba_ssm with Mamba4"),
        ({"rms_norm": False}, "LayerNorm"),
        ({"n_layer": 3}, "is not what its config promises"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "big")


def with_layers(folder: Path, **arguments: Any) -> Path:
    """The checkpoint with more arguments of its layers."""
    config = json.loads((folder / "config.json").read_text())
    config["ssm_cfg"] |= arguments
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_limit_of_the_step_sizes_is_kept(tmp_path: Path) -> None:
    model, ids = checkpoint(tmp_path / "a", "Mamba2", "model.safetensors"), torch.arange(20)[None]
    free = model(ids).logits
    for layer in model.backbone.layers:
        layer.mixer.time_step_limit = (0.0, 0.01)
    limited = load(with_layers(tmp_path / "a", dt_limit=[0.0, 0.01]))(ids).logits
    torch.testing.assert_close(limited, model(ids).logits)
    assert not torch.allclose(limited, free)


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        ("Mamba2", "D_has_hdim", True),
        ("Mamba2", "norm_before_gate", True),
        ("Mamba2", "rmsnorm", False),
        ("Mamba2", "d_ssm", 8),
        ("Mamba2", "new_argument", 1),
        ("Mamba1", "dt_limit", [0.0, 0.01]),
    ],
)
def test_arguments_that_change_what_a_layer_computes_are_refused(
    kind: str, argument: str, value: Any, tmp_path: Path
) -> None:
    checkpoint(tmp_path / "a", kind, "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"ssm_cfg\.{argument} = "):
        load(with_layers(tmp_path / "a", **{argument: value}))


def test_arguments_of_a_new_layer_do_not_matter(tmp_path: Path) -> None:
    model, ids = checkpoint(tmp_path / "a", "Mamba2", "model.safetensors"), torch.arange(20)[None]
    folder = with_layers(tmp_path / "a", dt_min=0.001, A_init_range=[1, 16], D_has_hdim=False)
    torch.testing.assert_close(load(folder)(ids).logits, model(ids).logits)
