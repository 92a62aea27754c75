"""Checkpoints of mamba_ssm with Mamba-3 layers: its model written out by hand, read, cut and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from compressm.errors import CheckpointError
from compressm.layers import Mamba3
from compressm.saving.mamba_ssm_format import is_mamba_ssm, load

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one input": ({}, {}),
    "several inputs, MLPs": ({"is_mimo": True, "mimo_rank": 2, "is_outproj_norm": True}, {"d_intermediate": 100}),
    "all pairs rotate, untied": ({"rope_fraction": 1.0, "ngroups": 2}, {"tie_embeddings": False}),
    "LayerNorm": ({}, {"rms_norm": False, "residual_in_fp32": False}),
}


def checkpoint(folder: Path, cfg: dict[str, Any], options: dict[str, Any], file: str = "model.safetensors") -> Any:
    """A folder as ``MambaLMHeadModel.save_pretrained`` writes it, and its tensors and layers."""
    torch.manual_seed(0)
    cfg = {"layer": "Mamba3", "d_state": 16, "headdim": 4, **cfg}
    config: dict[str, Any] = {
        "d_model": 8, "d_intermediate": 0, "n_layer": 2, "vocab_size": 250, "ssm_cfg": cfg, "attn_layer_idx": [],
        "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 8, "tie_embeddings": True, **options,
    }  # fmt: skip
    layers = [
        Mamba3(
            8, cfg["d_state"], head_dim=4, n_groups=cfg.get("ngroups", 1), rope_fraction=cfg.get("rope_fraction", 0.5),
            mimo_rank=cfg.get("mimo_rank", 1), out_norm=cfg.get("is_outproj_norm", False),
        )
        for _ in range(2)
    ]  # fmt: skip
    tensors: dict[str, Tensor] = {"backbone.embedding.weight": torch.randn(256, 8)}
    norms = ["backbone.norm_f"]
    for i, layer in enumerate(layers):
        path = f"backbone.layers.{i}"
        tensors |= {f"{path}.mixer.{name}": value.detach().clone() for name, value in layer.state_dict().items()}
        norms.append(f"{path}.norm")
        if config["d_intermediate"]:
            norms.append(f"{path}.norm2")
            tensors[f"{path}.mlp.fc1.weight"] = torch.randn(256, 8) / 8**0.5
            tensors[f"{path}.mlp.fc2.weight"] = torch.randn(8, 128) / 128**0.5
    tensors |= {f"{name}.weight": 1 + 0.1 * torch.randn(8) for name in norms}
    if not config["rms_norm"]:
        tensors |= {f"{name}.bias": 0.1 * torch.randn(8) for name in norms}
    embedding = tensors["backbone.embedding.weight"]
    tensors["lm_head.weight"] = embedding.clone() if config["tie_embeddings"] else torch.randn(256, 8)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "LICENSE").write_text("Apache-2.0")
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file)
    return config, tensors, layers


def by_hand(config: dict[str, Any], tensors: dict[str, Tensor], layers: list[Mamba3], ids: Tensor) -> Tensor:
    def norm(name: str, h: Tensor) -> Tensor:
        weight = tensors[f"{name}.weight"]
        if config["rms_norm"]:
            return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        return F.layer_norm(h, (8,), weight, tensors[f"{name}.bias"], 1e-5)

    h = tensors["backbone.embedding.weight"][ids]
    for i, layer in enumerate(layers):
        path = f"backbone.layers.{i}"
        h = h + layer(norm(f"{path}.norm", h))
        if config["d_intermediate"]:
            y, gate = (norm(f"{path}.norm2", h) @ tensors[f"{path}.mlp.fc1.weight"].T).chunk(2, -1)
            h = h + (y * gate * gate.sigmoid()) @ tensors[f"{path}.mlp.fc2.weight"].T
    return norm("backbone.norm_f", h) @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_that_of_the_package(case: str, tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "a", *CASES[case])
    assert is_mamba_ssm(tmp_path / "a")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "a")(ids), by_hand(*made, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by_loss", [False, True])
def test_it_is_cut_and_written_as_such(case: str, file: str, by_loss: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from compressm.lab.one_shot import compress_checkpoint

    config, big, _ = checkpoint(tmp_path / "big", *CASES[case], file)
    (tmp_path / "text.txt").write_text(TEXT)
    ways: dict[str, Any] = {"gramians": "loss"} if by_loss else {}
    compress_checkpoint(
        tmp_path / "big", tmp_path / "small", tmp_path / "text.txt", states=10, sequences=4, length=32, **ways
    )
    after = json.loads((tmp_path / "small" / "config.json").read_text())
    states = 10 if "all pairs" in case else 8  # in fours, where half of the pairs rotate
    assert after == {**config, "ssm_cfg": {**config["ssm_cfg"], "d_state": states}}
    assert (tmp_path / "small" / "LICENSE").read_text() == "Apache-2.0"
    path = tmp_path / "small" / file
    small = torch.load(path, weights_only=True) if file.endswith(".bin") else load_file(path)
    assert set(small) == set(big)
    rank, groups = config["ssm_cfg"].get("mimo_rank", 1), config["ssm_cfg"].get("ngroups", 1)
    angles = states // 2 if "all pairs" in case else states // 4
    rows = 2 * 16 + 2 * rank * groups * states + 3 * 4 + angles
    for i in range(2):
        assert small[f"backbone.layers.{i}.mixer.in_proj.weight"].shape == (rows, 8)
        assert small[f"backbone.layers.{i}.mixer.B_bias"].shape == (4, rank, states)
    again = load(tmp_path / "small")
    assert again(torch.arange(20)[None]).isfinite().all()
    assert torch.equal(again.state_dict()["backbone.norm_f.weight"], big["backbone.norm_f.weight"])


@pytest.mark.parametrize(
    ("cfg", "options", "message"),
    [
        ({"A_floor": 0.1}, {}, r"ssm_cfg\.A_floor = 0\.1: expected 0\.0001"),
        ({"new_argument": 1}, {}, r"ssm_cfg\.new_argument = 1: an argument that is not known"),
        ({"is_mimo": True, "mimo_rank": 1}, {}, r"ssm_cfg\.mimo_rank = 1 with is_mimo"),
        ({}, {"attn_layer_idx": [1]}, "layers of attention"),
        ({}, {"n_layer": 3}, "is not what its config promises"),
    ],
)
def test_what_our_model_does_not_compute_is_refused(
    cfg: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config, _, _ = checkpoint(tmp_path / "a", {}, {})
    changed = {**config, **options, "ssm_cfg": {**config["ssm_cfg"], **cfg}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "a")


def test_a_state_dimension_that_pairs_do_not_have_is_refused(tmp_path: Path) -> None:
    config, _, _ = checkpoint(tmp_path / "a", {}, {})
    config["ssm_cfg"]["d_state"] = 10
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="d_state=10 must be a multiple of 4"):
        load(tmp_path / "a")
