"""Models whose states are sorted: of every family of ours and of transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressm.layers import LanguageModel

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

OWN = ("mamba", "mamba2", "linear_attention", "gated_linear_attention", "delta_net", "rg_lru")
THEIRS = (
    "mamba", "falcon_mamba", "mamba2", "jamba", "falcon_h1", "zamba", "qwen3_next", "olmo_hybrid", "xlstm",
    "recurrent_gemma",
)  # fmt: skip


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def own(layer: str, states: int = 8) -> LanguageModel:
    torch.manual_seed(0)
    options: dict[str, Any] = {"mamba2": {"head_dim": 8}, "rg_lru": {"n_blocks": 2}}.get(layer, {})
    if "attention" in layer or layer == "delta_net":
        options = {"n_heads": 2}
    model = LanguageModel(40, 16, states if layer != "rg_lru" else 16, layer=layer, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def model_of(where: str, name: str) -> Any:
    if where == "own":
        return own(name)
    pytest.importorskip("transformers")
    from toy_models import SIZES

    return SIZES[name].build()
