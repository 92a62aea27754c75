from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# The C library's settings are the whole process's: a process of its own.
SCRIPT = """
import resource, sys
import torch
from compressm.runtime.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(16, 2**20)  # 64 MB, above every default threshold
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
by_default = faults()
agreed = keep_freed_memory()
faults()
print(int(agreed), by_default, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_step_finds_the_memory_that_the_one_before_it_freed() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    agreed, by_default, kept = map(int, done.stdout.split())
    if not agreed:
        pytest.skip("an older glibc, which keeps smaller tensors only")
    assert by_default > 20 * 16 * 4  # huge pages of 2 MB at the least: 32 a tensor
    assert kept < by_default / 10
