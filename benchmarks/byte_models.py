"""What the byte-level language models of `ukrainian.py` and `hyena.py` have in common: text, training, evaluation."""

from __future__ import annotations

import lzma
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressm

VOCABULARY = 256


def root() -> Path:
    """Where the texts are."""
    return Path(os.environ.get("COMPRESSM_DATA", "data")) / "text"


def tokens(*paths: Path) -> Tensor:
    """The bytes of some files, one after the other; ``.xz`` is unpacked."""
    parts = (lzma.decompress(p.read_bytes()) if p.suffix == ".xz" else p.read_bytes() for p in paths)
    return torch.from_numpy(np.frombuffer(b"\n".join(parts), np.uint8).astype(np.int64))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy of the next byte, in nats; ``batch`` of shape ``(batch, length + 1)``."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor, length: int) -> float:
    """Over a whole text, in windows without overlap."""
    model.eval()
    windows = text[: (len(text) - 1) // length * length + 1]
    rows = windows.unfold(0, length + 1, length)
    total = sum(float(loss_of(model, batch)) * len(batch) for batch in rows.split(16))
    model.train()
    return total / len(rows) / math.log(2)


def train(
    model: nn.Module, text: Tensor, steps: int, batch: int, length: int, lr: float, **compression: object
) -> tuple[compressm.Compressor | None, list[float]]:
    """Train on random windows, with cuts where ``compression`` says how far.

    Returns:
        the compressor, and the seconds of every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    warmup = max(1, steps // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2),
    )
    compressor = compressm.Compressor(model, optimizer, steps, **compression) if compression else None  # type: ignore[arg-type]
    windows, seconds = text.unfold(0, length + 1, 1), list[float]()
    for step in range(steps):
        started = time.perf_counter()
        loss = loss_of(model, windows[torch.randint(len(windows), (batch,))])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        seconds.append(time.perf_counter() - started)
        if compressor is not None and (event := compressor.step()):
            print(event, flush=True)
        if step % max(1, steps // 20) == 0:
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits per byte", flush=True)
    return compressor, seconds
