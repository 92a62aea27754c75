"""Training steps and whole trainings of a Mamba-2 language model of transformers, before and after a cut of its states.

The model is transformers' own. With ``scan="theirs"`` its layers run on transformers' path without a CUDA kernel, with
``"ours"`` as `compressm.integrations.transformers.fast_scan` makes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM

from compressm import Compressor, compress
from compressm.lab.bench.peers_hf import with_scan
from compressm.lab.bench.worker import Step

VOCABULARY = 256


def language_model(n: int, heads: int, p: int, layers: int, scan: str) -> Any:
    """A model of width ``heads p / 2`` with ``n`` states, the same in every process."""
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=heads * p // 2, expand=2, num_heads=heads, head_dim=p, state_size=n, n_groups=1,
        num_hidden_layers=layers, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = Mamba2ForCausalLM(config)
    for block in model.backbone.layers:
        with_scan(block.mixer, scan)
    return model


def tokens(batch: int, length: int) -> Tensor:
    """Random tokens, the same in every process, shape ``(batch, length)``."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def training_step(
    n: int, heads: int, p: int, layers: int, batch: int, length: int, scan: str, cut_to: int | None = None,
    device: str = "cpu",
) -> Step:  # fmt: skip
    """Forward, backward and AdamW; with ``cut_to`` of a model that `compressm.compress` has cut to so many states."""
    model, given = language_model(n, heads, p, layers, scan), tokens(batch, length)
    if cut_to is not None:
        compress(model, states=cut_to, data=[{"input_ids": given}], max_reduction=1.0)
        assert model.config.state_size == cut_to
    model, given = model.to(device), given.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return lambda: _train(model, given, optimizer)


def training_run(
    n: int, heads: int, p: int, layers: int, batch: int, length: int, scan: str, steps: int, cut_to: int | None = None
) -> Step:
    """A whole training of so many steps; with ``cut_to`` a `Compressor` observes and cuts in its first tenth."""
    given = tokens(batch, length)

    def run() -> None:
        model = language_model(n, heads, p, layers, scan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        compressor = None if cut_to is None else Compressor(model, optimizer, total_steps=steps, states=cut_to)
        for _ in range(steps):
            _train(model, given, optimizer)
            if compressor is not None:
                compressor.step()
        assert model.config.state_size == (cut_to or n)

    return run


def _train(model: Any, given: Tensor, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(input_ids=given, labels=given).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())
