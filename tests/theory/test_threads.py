"""Cuts compute in as many threads as torch may use, and in no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CUT = """
import os
import threading

import torch

torch.set_num_threads(1)
from compressm.cutting.system import reduce
from compressm.theory.systems import DiagonalSystem

draw = torch.Generator().manual_seed(0)
radius, angle = (torch.rand(256, generator=draw, dtype=torch.float64) for _ in range(2))
B, C = (torch.randn(256, 8, 2, generator=draw, dtype=torch.float64) for _ in range(2))
system = DiagonalSystem(
    torch.polar(0.9 + 0.099 * radius, 0.3 * angle), torch.view_as_complex(B), torch.view_as_complex(C).mT
)
reduce(system, order=32)
busy = {}
for task in os.listdir("/proc/self/task"):
    with open(f"/proc/self/task/{task}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    busy[int(task)] = int(fields[11]) + int(fields[12])  # ticks of a hundredth of a second
own = busy.pop(threading.get_native_id())
print(own, sum(busy.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the times of threads from Linux")
def test_a_cut_stays_within_the_threads_of_torch() -> None:
    """Threads of another library beside torch's wait for each other in every small product: on a busy machine the first
    cut of this system took a minute instead of a second."""
    many = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "4")
    result = subprocess.run(
        [sys.executable, "-c", CUT], env={**os.environ, **many}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    own, others = map(int, result.stdout.split())
    assert own > 20, "nothing was computed"
    assert others < own / 4  # they take part of a tenth to be made
