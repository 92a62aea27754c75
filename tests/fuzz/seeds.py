"""Writes the seeds of tests/fuzz/corpus: one small whole file of each kind.  python tests/fuzz/seeds.py"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import torch

from compressm import save
from compressm.lab.config import builtin_configs
from compressm.layers import LanguageModel, SequenceClassifier
from compressm.saving.checkpoint import save_tree

CORPUS = Path(__file__).parent / "corpus"


def pair(folder: Path, tensors: str, description: str) -> bytes:
    text = (folder / description).read_bytes()
    return struct.pack("<H", len(text)) + text + (folder / tensors).read_bytes()


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = {
            "lru": SequenceClassifier(1, 2, d_model=2, d_state=2, norm="layer"),
            "mamba": LanguageModel(3, d_model=2, d_state=1, layer="mamba"),
        }
        for name, model in models.items():
            save(model, folder)
            (CORPUS / f"model-{name}").write_bytes(b"\0" + pair(folder, "model.safetensors", "compressm.json"))
        tree = {
            "tensors": [torch.ones(2), torch.ones(1, dtype=torch.complex64)], "array": np.arange(3), 1: (None, True),
            "numbers": [1, -2.5, float("nan"), 1j], "text": "a", "mixed": {2: {"$x": 1}, None: "b"},
        }  # fmt: skip
        save_tree(folder, tree, metadata={"step": 3})
        (CORPUS / "tree").write_bytes(b"\1" + pair(folder, "state.safetensors", "state.json"))
    for name, path in builtin_configs().items():
        (CORPUS / f"config-{name}").write_bytes(b"\2" + path.read_bytes())
    (CORPUS / "overrides").write_bytes(b"\3run.steps=10\nmodel.d_state=[3]\ndata.name=digits\noptimizer.lr=1e-3")
    (CORPUS / "parsed").write_bytes(
        b'\4{"data":{"name":"digits"},"model":{"d_model":4,"d_state":8},"compression":{"tolerance":0.1},"run":{"steps":9}}'
    )
    (CORPUS / "arguments").write_bytes(b"\5--states\n8\n--json\n-\nrun.steps=3\n--help")


if __name__ == "__main__":
    main()
