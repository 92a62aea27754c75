"""Time of one training step of a Hugging Face Mamba on a CPU: where it goes, and what `fast_scan` makes of it.

    python benchmarks/hf_scan_time.py --json results/hf_scan_time.json

2 layers, 128 channels, 128 states, batch 8. Four ways to run the recurrence of transformers without CUDA kernels: as it
is; with denormal numbers flushed to zero; as it is but for the slices of its tensors over time, which are taken by one
``unbind`` instead of one index per step; and with our scan. The backward pass of an index is a tensor of the size of
the whole, so that it grows with the square of the length. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from stored import store
from torch import Tensor
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

from compressm.adapters.rebind import rebound_forward
from compressm.integrations.hf_scan import fast_scan

WAYS = ("transformers", "denormals flushed", "slices by unbind", "fast_scan")


def unbound_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    **_: Any,
) -> Tensor:
    """transformers' loop, with its slices taken at once."""
    dt = F.softplus(dt + delta_bias[:, None])
    decay = torch.exp(A[None, :, None, :] * dt[..., None]).unbind(2)
    drive = (dt[..., None] * B.transpose(1, 2)[:, None] * hidden_states[..., None]).unbind(2)
    state, outputs = torch.zeros_like(drive[0]), []
    for a, b, c in zip(decay, drive, C.unbind(2), strict=True):
        state = a * state + b
        outputs.append((state @ c[..., None])[..., 0])
    return (torch.stack(outputs, -1) + hidden_states * D[:, None]) * F.silu(z)


def step_seconds(way: str, length: int, repeats: int) -> dict[str, float]:
    """Seconds of the forward and of the backward pass, the smallest of some runs."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=256, hidden_size=64, state_size=128, num_hidden_layers=2)
    model = MambaForCausalLM(config).train()
    x = torch.randint(0, 256, (8, length))
    if way == "slices by unbind":
        for block in model.backbone.layers:
            block.mixer.forward = rebound_forward(block.mixer, {"mamba_selective_scan": unbound_scan})
    torch.set_flush_denormal(way == "denormals flushed")
    forward, backward = [], []
    with fast_scan(model) if way == "fast_scan" else contextlib.nullcontext():
        for _ in range(repeats):
            started = time.perf_counter()
            loss = model(input_ids=x, labels=x).loss
            between = time.perf_counter()
            loss.backward()
            forward.append(between - started)
            backward.append(time.perf_counter() - between)
    torch.set_flush_denormal(False)
    return {"forward": min(forward), "backward": min(backward), "loss": float(loss.detach())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 256, 784])
    parser.add_argument("--slow-up-to", type=int, default=64, help="lengths for transformers' own way")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    print("| length | way | forward, s | backward, s |\n|---|---|---|---|")
    for length in arguments.lengths:
        for way in WAYS:
            limit = {"fast_scan": length, "slices by unbind": 4 * arguments.slow_up_to}
            if length > limit.get(way, arguments.slow_up_to):
                continue
            seconds = step_seconds(way, length, arguments.repeats)
            rows.append({"length": length, "way": way, **seconds})
            print(f"| {length} | {way} | {seconds['forward']:.3f} | {seconds['backward']:.3f} |", flush=True)
    if arguments.json:
        store(arguments.json, threads=torch.get_num_threads(), transformers=transformers.__version__, rows=rows)


if __name__ == "__main__":
    main()
