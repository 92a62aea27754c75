"""How fast the engines of `lti_scan` are on this machine, relative to what their counts of operations say.

The counts (`lti_direct.cost`, `lti_fft.cost`, `lti_chunked.cost`) are weighted for one machine. `calibrate` measures
the three engines once, for some seconds, and stores a factor for each beside the compiled kernels. Later processes use
the stored factors; without them all are 1. The choice of an engine therefore never depends on how busy the machine is.

    python -c "from compressm.scans import rates; print(rates.calibrate())"
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Callable

import torch

from compressm.scans import lti_chunked, lti_direct, lti_fft, native

ENGINES = ("direct", "fft", "chunked")
# (batch, length, width, states): narrow and wide, where the choice is made.
_SIZES = ((64, 256, 8, 32), (16, 512, 32, 64), (8, 256, 64, 128))


@functools.cache
def factors() -> dict[str, float]:
    """Seconds for each counted operation, relative to ``"chunked"``; 1 where nothing has been measured."""
    try:
        stored = json.loads(native.cache_file("rates.json").read_text(encoding="utf-8"))
        found = {engine: float(stored[engine]) for engine in ENGINES}
    except (OSError, ValueError, KeyError, TypeError):
        return dict.fromkeys(ENGINES, 1.0)
    usable = all(math.isfinite(value) and value > 0 for value in found.values())
    return found if usable else dict.fromkeys(ENGINES, 1.0)


def factor(engine: str) -> float:
    """The factor of one engine."""
    return factors()[engine]


factor._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  (see `native`)


def calibrate(repeats: int = 5) -> dict[str, float]:
    """Measure the engines on one thread by processor time, the least of a few, and store the factors.

    Raises:
        ValueError: there are no compiled kernels, so that there is nothing to choose between.
    """
    if not native.available():
        raise ValueError("calibrate: there are no compiled kernels here, and so no choice to calibrate")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {engine: statistics.geometric_mean(_ratios(engine, repeats)) for engine in ENGINES}
    finally:
        torch.set_num_threads(threads)
    found = {engine: value / seconds["chunked"] for engine, value in seconds.items()}
    path = native.cache_file("rates.json")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    factors.cache_clear()
    return found


def _ratios(engine: str, repeats: int) -> list[float]:
    """Seconds of a forward pass over its count, for each of the sizes."""
    ratios = list[float]()
    for batch, length, width, n in _SIZES:
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(batch, length, width, generator=generator)
        poles = (-1e-3 - torch.rand(n, generator=generator) / 10, torch.rand(n, generator=generator))
        B, C = torch.randn(2, n, width, generator=generator), torch.randn(2, width, n, generator=generator)
        system = (*poles, B[0], B[1], C[0], C[1])
        if engine == "direct":
            count = lti_direct.cost(batch, length, width, width, n, u.element_size())
            ratios.append(_seconds(lambda u=u, s=system: lti_direct.scan(u, *s, None, None), repeats) / count)
        elif engine == "fft":
            compiled = lti_fft.compiled(u, width)
            count = lti_fft.cost(batch, length, width, width, n, compiled, u.element_size())
            ratios.append(_seconds(lambda u=u, s=system: lti_fft.scan(u, *s), repeats) / count)
        else:
            count, start = lti_chunked.cost(batch, length, width, width, n), u.new_zeros(batch, 2, n)
            ratios.append(_seconds(lambda u=u, s=system, x=start: lti_chunked.scan(u, *s, x), repeats) / count)
    return ratios


@torch.no_grad()
def _seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    taken = list[float]()
    for _ in range(repeats):
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    return max(min(taken), 1e-9)
