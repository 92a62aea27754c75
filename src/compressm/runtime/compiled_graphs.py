"""`torch.compile` and cuts. A compiled graph is specialised to the shapes of its parameters, which a cut changes."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch

_paused: weakref.WeakSet[Pause] = weakref.WeakSet()
_stance: Any = None  # Dynamo's, while any pause lasts


class Pause:
    """Times in which compiled code runs eagerly, in the whole process, because forward hooks must be heard.

    Compiled graphs ignore hooks that were added later. If hooks are there when Dynamo compiles, it traces what they
    compute too: a graph of the observation, which is compiled for minutes, or fails. Several pauses may overlap.
    """

    def begin(self) -> None:
        """Run compiled code eagerly, until `end` or until this object is gone."""
        if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled
            _paused.add(self)
            _set_stance()

    def end(self) -> None:
        """Use compiled graphs again, unless another pause lasts. May be called twice."""
        _paused.discard(self)
        _set_stance()

    def __del__(self) -> None:
        if self in (_paused or ()):
            self.end()


def _set_stance() -> None:
    global _stance
    if _paused and _stance is None:
        _stance = torch.compiler.set_stance("force_eager")
    elif not _paused and _stance is not None:
        _stance.__exit__(None, None, None)
        _stance = None


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


__all__ = ["Pause", "allow_recompilation", "graphs_compiled"]
