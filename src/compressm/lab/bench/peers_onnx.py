"""Peers in ONNX Runtime: the step that `compressm.saving.export` writes, on one thread."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from compressm.lab.bench.steps import WIDTH, first_token, flat_tokens, layer_of
from compressm.lab.bench.worker import Step
from compressm.saving.export import flatten_state, to_onnx


def stepped(family: str, n: int, batch: int) -> Step:
    """As many steps of the same layer as ours makes. Arrays go in and come out without a copy to tensors."""
    import onnxruntime

    layer = layer_of(family, n)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="compressm-bench-") as folder:
        path = Path(folder) / "step.onnx"
        to_onnx(layer, path, step=True, example=torch.randn(2, 4, WIDTH))
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*arrays: Any) -> list[Any]:
        return list(session.run(None, dict(zip(names, arrays, strict=True))))

    now, state = first_token(layer, batch)
    return flat_tokens(run, now.numpy(), [leaf.numpy() for leaf in flatten_state(state).values()])
