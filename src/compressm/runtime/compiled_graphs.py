"""`torch.compile` and cuts: a compiled graph is specialised to the shapes of its parameters, and a cut changes them."""

from __future__ import annotations

import sys
from typing import Any


def graphs_compiled() -> int:
    """How many graphs Dynamo has compiled in this process so far; 0 where `torch.compile` was never used."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")  # not imported by us: it takes seconds
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def allow_recompilation(times: int = 1) -> None:
    """Let Dynamo compile a function once more in each of its modes (training, evaluation, without gradients).

    Dynamo takes a function that it has compiled 8 times for one whose guards never hold, and leaves it to eager mode
    from then on, silently. Recompilations for a cut are none of these.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        name = "recompile_limit" if hasattr(dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(dynamo.config, name, getattr(dynamo.config, name) + 3 * times)


__all__ = ["allow_recompilation", "graphs_compiled"]
