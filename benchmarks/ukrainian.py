"""A language model of Ukrainian, byte by byte, on one core of a plain processor: big, shrunk, small, cut at random.

    python benchmarks/ukrainian.py [--steps 2000] [--threads 1]

Linear attention with gated decay, 64 states per head, cut to 12 in the first tenth of the steps. The corpus is BrUK,
split by document; its training part is learnt from, and its test part looked at once, at the end. Every run writes
``results/ukrainian/ARM.json``, and one whose file is there is not repeated.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from byte_models import VOCABULARY, bits_per_byte, root, tokens, train
from stored import store

from compressm.cutting import state_dims
from compressm.layers import LanguageModel

ARMS = ("big", "shrunk", "small", "random")


def run(arm: str, a: argparse.Namespace) -> None:
    """One arm, to its file."""
    torch.manual_seed(a.seed)
    model = LanguageModel(
        VOCABULARY, a.width, a.small if arm == "small" else a.big, 2, layer="linear_attention", n_heads=4, decay="gated"
    )
    cut = {"shrunk": {"states": a.small}, "random": {"states": a.small, "selection": "random"}}.get(arm, {})
    files = root() / "ukrainian"
    text = tokens(files / "bruk_train.txt.xz")
    started = time.perf_counter()
    _, seconds = train(model, text, a.steps, a.batch, a.length, 3e-3, **cut)
    total = time.perf_counter() - started
    last = seconds[len(seconds) * 3 // 4 :]
    prompt = torch.from_numpy(np.frombuffer("Україна ".encode(), np.uint8).astype(np.int64))[None]
    torch.manual_seed(a.seed)
    sample = bytes(model.eval().generate(prompt, 200, 0.7)[0].tolist()).decode(errors="replace")
    store(
        a.results / f"{arm}.json",
        arm=arm,
        seed=a.seed,
        steps=a.steps,
        threads=a.threads,
        state_dims=state_dims(model),
        parameters=sum(p.numel() for p in model.parameters()),
        validation_bits_per_byte=bits_per_byte(model, tokens(files / "bruk_valid.txt.xz"), a.length),
        test_bits_per_byte=bits_per_byte(model, tokens(files / "bruk_test.txt.xz"), a.length),
        train_seconds=total,
        step_milliseconds=1000 * float(np.median(last)),
        sample=sample,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--big", type=int, default=64)
    parser.add_argument("--small", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("results/ukrainian"))
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    for arm in a.arms:
        if not (a.results / f"{arm}.json").exists():
            run(arm, a)


if __name__ == "__main__":
    main()
