"""One side of a comparison, in a process of its own; commands and answers are lines of JSON on a pipe.

The first line says what to build. After that every ``step`` is answered by the time of one step in milliseconds, and
``peak`` by the memory that the steps needed.

Memory is the highest resident set size during the measured steps, less that after the imports: parameters, optimizer
state, inputs, workspace and compiled code count; Python and its libraries do not, nor does what only the first step
needs (compilation). Only Linux can reset its record of the highest size; elsewhere it is the highest since the start.
On a GPU it is the device memory that PyTorch's or JAX's allocator handed out.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Step = Callable[[], object]
"""One step; returns when all its results are there."""

_SLOW_SECONDS = 10.0


def main() -> None:
    """Serve one side on this process's standard input and output, until the input ends."""
    # Libraries may print: what they write goes to standard error, the answers to the original standard output.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        order = json.loads(sys.stdin.readline())
        if order["cpus"] is not None:
            os.sched_setaffinity(0, order["cpus"])
        try:
            _serve(order, answers)
        except ModuleNotFoundError as error:
            _answer(answers, unavailable=f'{error.name} is not installed: pip install "compressm[bench]"')
        except Exception as error:
            _answer(answers, unavailable=f"{type(error).__name__}: {error}")


def _serve(order: dict[str, Any], answers: TextIO) -> None:
    module_name, function = order["build"].split(":")
    module = importlib.import_module(module_name)
    _set_torch_threads(order["threads"])
    memory = _Memory(module)
    step: Step = getattr(module, function)(**order["arguments"])
    started = time.perf_counter()
    step()  # compiles, fills caches
    if time.perf_counter() - started < _SLOW_SECONDS:
        step()
    memory.reset()
    _answer(answers, ready=True)
    for line in sys.stdin:
        command = line.strip()
        if command == "step":
            started = time.perf_counter()
            step()
            _answer(answers, ms=1e3 * (time.perf_counter() - started))
        elif command == "peak":
            _answer(answers, peak_mb=memory.peak_mb())


def _answer(answers: TextIO, **values: Any) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def _set_torch_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


class _Memory:
    def __init__(self, module: Any) -> None:
        # On a GPU, a module of peers that are not PyTorch's reads its own allocator.
        self._device_peak_mb: Callable[[], float] | None = getattr(module, "device_peak_mb", None)
        self._baseline_kb = _status_kb("VmRSS")

    def reset(self) -> None:
        import torch

        gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what compilation has freed goes back to the system
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM; see proc(5)
            except OSError:
                return

    def peak_mb(self) -> float:
        import torch

        if self._device_peak_mb is not None:
            device = self._device_peak_mb()
            if device:
                return device
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated() / 1e6
        return (_status_kb("VmHWM") - self._baseline_kb) * 1024 / 1e6


def _status_kb(field: str) -> float:
    if sys.platform != "linux":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1024 if sys.platform == "darwin" else peak
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1])
    return float("nan")


if __name__ == "__main__":
    main()
