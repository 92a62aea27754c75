"""`torch.compile` and cuts. A compiled graph is specialised to the shapes of its parameters, which a cut changes."""

from __future__ import annotations

import sys
from typing import Any


def graphs_compiled() -> int:
    """How many graphs Dynamo has compiled in this process so far; 0 where `torch.compile` was never used."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")  # not imported here, since that takes seconds
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def allow_recompilation(times: int = 1) -> None:
    """Let Dynamo compile a function once more in each of its modes (training, evaluation, without gradients).

    After compiling a function 8 times Dynamo assumes that its guards never hold, and silently runs it in eager mode
    from then on. Recompilations for a cut must not count towards this limit.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        name = "recompile_limit" if hasattr(dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(dynamo.config, name, getattr(dynamo.config, name) + 3 * times)


__all__ = ["allow_recompilation", "graphs_compiled"]
