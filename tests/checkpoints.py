"""A small checkpoint of transformers and a text, for what the command line does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = "The quick brown fox jumps over the lazy dog. " * 60


def written(folder: Path) -> Path:
    """The text in a file."""
    path = folder / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def mamba2(folder: Path, n_groups: int) -> Any:
    """A random Mamba-2 of two layers with 16 states that reads bytes, saved into the folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options: dict[str, Any] = {"vocab_size": 256, "hidden_size": 16, "num_heads": 4, "head_dim": 8}
    options |= {"n_groups": n_groups, "state_size": 16, "num_hidden_layers": 2, "chunk_size": 16}
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**options)).eval()
    model.save_pretrained(folder)
    return model
