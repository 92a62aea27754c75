"""The clocks of a run: where its wall time goes."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch


class Timers:
    """One clock for each kind of work, of which at most one runs at a time.

    Args:
        device: where the run computes.

    Attributes:
        seconds: by kind of work: ``train``, ``reduction``, ``evaluation``, ``checkpoint``.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = {"train": 0.0, "reduction": 0.0, "evaluation": 0.0, "checkpoint": 0.0}
        self._device = device
        self._running, self._since = "", 0.0

    @contextmanager
    def timed(self, work: str) -> Generator[None]:
        """Run one of the clocks in this block, and none of the others."""
        if self._device.type == "cuda" and work != "reduction":
            # Kernels that were started before belong to the clock that runs now. Reductions come after every step,
            # and waiting for the device each time would be too dear.
            torch.cuda.synchronize()
        outer = self._running
        self._switch(work)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, work: str) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running] += now - self._since
        self._running, self._since = work, now


__all__ = ["Timers"]
