"""A Hyena language model, its long convolutions distilled into state space models: loss, error bound, time per token.

    python benchmarks/hyena.py [--steps 2000] [--threads 1]

Bytes of tiny Shakespeare, split 90:5:5 in order. After training, copies of the model are distilled to several orders,
each tested as it is, and that of order 16 trained on for a twentieth of the steps; ``small`` is a model that had state
space models of as many states as that one in place of the convolutions from the start. Then one token is generated
after sequences of several lengths. Writes ``results/hyena.json``.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from byte_models import VOCABULARY, bits_per_byte, root, tokens, train
from stored import store

import compressm
from compressm.layers import LanguageModel

ORDERS = (2, 4, 8, 16, 32)


@torch.no_grad()
def token_milliseconds(model: LanguageModel, lengths: list[int]) -> list[float]:
    """Median time of one step after so many."""
    model.eval()
    state, times, found = model.initial_state(1), list[float](), list[float]()
    for count in range(1, max(lengths) + 1):
        started = time.perf_counter()
        _, state = model.step(torch.zeros(1, dtype=torch.long), state)
        times.append(time.perf_counter() - started)
        if count in lengths:
            found.append(1000 * float(np.median(times[-15:])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("results/hyena.json"))
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    text = tokens(root() / "tinyshakespeare/input.txt")
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    learnt, test = text[:first], text[second:]

    lengths = [a.length // 8, a.length // 4, a.length // 2, a.length]

    def fresh(states: int) -> LanguageModel:
        torch.manual_seed(a.seed)
        return LanguageModel(VOCABULARY, a.width, states, 2, layer="hyena", max_length=a.length)

    model = fresh(0)
    _, seconds = train(model, learnt, a.steps, a.batch, a.length, 3e-3)
    rows, small_states = [], 0
    for order in ORDERS:
        distilled = copy.deepcopy(model)
        started = time.perf_counter()
        reports = compressm.distil(distilled, order=order)
        took = time.perf_counter() - started
        row = {
            "order": order,
            "states": [report.states for report in reports],
            "relative_h2_error": [report.relative_h2_error for report in reports],
            "hinf_bound": [report.largest_bound for report in reports],
            "largest_gain": [report.largest_gain for report in reports],
            "distil_seconds": took,
            "test_bits_per_byte": bits_per_byte(distilled, test, a.length),
        }
        if order == 16:
            small_states = max(report.states for report in reports)
            row["token_milliseconds"] = token_milliseconds(distilled, lengths)
            _, later = train(distilled, learnt, max(20, a.steps // 20), a.batch, a.length, 3e-4)
            row["trained_on_test_bits_per_byte"] = bits_per_byte(distilled, test, a.length)
            row["step_milliseconds"] = 1000 * float(np.median(later))
        print(row, flush=True)
        rows.append(row)
    small = fresh(small_states)
    _, small_seconds = train(small, learnt, a.steps, a.batch, a.length, 3e-3)
    store(
        a.results,
        seed=a.seed,
        steps=a.steps,
        threads=a.threads,
        length=a.length,
        convolution={
            "test_bits_per_byte": bits_per_byte(model, test, a.length),
            "step_milliseconds": 1000 * float(np.median(seconds)),
            "lengths": lengths,
            "token_milliseconds": token_milliseconds(model, lengths),
        },
        distilled=rows,
        small={
            "states": small_states,
            "test_bits_per_byte": bits_per_byte(small, test, a.length),
            "step_milliseconds": 1000 * float(np.median(small_seconds)),
        },
    )


if __name__ == "__main__":
    main()
