"""A training step with the kernels compiled for shorter vectors, as processors without AVX-512 have them.

    python benchmarks/vector_lengths.py [--rounds 5]

The paper's sequential MNIST model, batch 50, on one thread. The compiler is kept from wider registers
(``COMPRESSM_CXXFLAGS``), so that one machine shows all three; it stays the machine that it is in everything else. The
kernels are measured in turn, each in a process of its own, and the fastest round's median counts. Writes
``results/vector_lengths.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from stored import store

from compressm.lab.bench.ours import lru_training_step
from compressm.lab.bench.results import machine
from compressm.scans.native import vector_bytes

FLAGS = {"widest": "", "AVX2": "-mno-avx512f", "SSE2, no fused multiply-add": "-march=x86-64"}
STATES, STEPS, WARMUP = (28, 256), 40, 5


def measure() -> dict[str, float]:
    """Milliseconds of a step, the median, by state dimension, and the bytes of a vector."""
    torch.set_num_threads(1)
    found = {"vector_bytes": float(vector_bytes())}
    for n in STATES:
        step, times = lru_training_step(n, 8, 1, 50, 784), list[float]()
        for _ in range(WARMUP + STEPS):
            started = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - started))
        found[str(n)] = statistics.median(times[WARMUP:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("results/vector_lengths.json"))
    parser.add_argument("--measure", action="store_true", help="one measurement, of the kernels as they are, as JSON")
    a = parser.parse_args()
    if a.measure:
        print(json.dumps(measure()))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in FLAGS}
    for _ in range(a.rounds):
        for name, flags in FLAGS.items():
            environment = {**os.environ, "COMPRESSM_CXXFLAGS": flags}
            output = subprocess.run(
                [sys.executable, __file__, "--measure"], env=environment, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            rounds[name].append(json.loads(output.splitlines()[-1]))
            print(name, rounds[name][-1], flush=True)
    best = {
        name: {key: min(one[key] for one in found) for key in found[0]} | {"flags": FLAGS[name]}
        for name, found in rounds.items()
    }
    store(a.results, machine=machine("cpu", 1, None), steps=STEPS, rounds=a.rounds, best=best)


if __name__ == "__main__":
    main()
