"""Former module names: what was imported from them before the packages were laid out anew can still be.

An import of a former name gives the module that has its contents now, with a `DeprecationWarning`. The finder stands
last in `sys.meta_path`, so that modules which exist are never asked for here.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "balancing": "theory.balancing",
    "bench": "lab.bench",
    "card": "saving.card",
    "carry": "cutting.carry",
    "certificate": "theory.certificate",
    "checkpoint": "saving.checkpoint",
    "compiled": "runtime.compiled_graphs",
    "compressor": "training.compressor",
    "costs": "training.clock",
    "cutting.reduce": "cutting",
    "demo": "lab.demo",
    "distributed": "runtime.processes",
    "export": "saving.export",
    "factors": "theory.factors",
    "filters": "cutting.distil",
    "fitting": "cutting.fitting",
    "history": "training.history",
    "lab.bench.report": "lab.bench.results",
    "lab.report": "lab.pages",
    "lab.reproduce.report": "lab.reproduce.tables",
    "measure": "training.step_cost",
    "one_shot": "lab.one_shot",
    "plots": "cutting.plots",
    "pruning": "theory.pruning",
    "ranks": "theory.ranks",
    "reduce": "cutting",
    "report": "lab.pages",
    "reproduce": "lab.reproduce",
    "rivals": "lab.rivals",
    "rng": "runtime.random_state",
    "selection": "theory.selection",
    "selective": "theory.recurrence",
    "sharding": "integrations.sharding",
    "snapshot": "training.snapshot",
    "spectrum": "cutting.spectrum",
    "statistics": "observing.moments",
    "storage": "runtime.files",
    "systems": "theory.systems",
    "training.config": "lab.config",
    "training.data": "lab.data.datasets",
    "training.loop": "lab.runs.loop",
    "training.models": "lab.runs.models",
}


class _FormerName(MetaPathFinder, Loader):
    """Finds a former name of a module, and loads the present one in its place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        present = _present_name(fullname)
        return None if present is None else ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        present = _present_name(spec.name)
        assert present is not None
        warnings.warn(f"{spec.name} is {present} now: import it from there", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(present)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Executed it is; the import system has only stamped the former name's spec on it."""
        former = module.__spec__
        assert former is not None
        module.__spec__ = former.loader_state


def _present_name(former: str) -> str | None:
    package, _, rest = former.partition(".")
    if package != "compressm":
        return None
    for old, new in MOVED.items():
        if rest == old or rest.startswith(f"{old}."):
            return f"compressm.{new}{rest[len(old) :]}"
    return None


sys.meta_path.append(_FormerName())
