"""The order of the packages: a lower one never imports a higher one, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import compressm

SOURCE = Path(compressm.__file__).parent
# From the lowest floor up; modules on the ground, of no room, may import all of them.
ROOMS = (
    "errors", "runtime", "scans", "layers", "theory", "adapters", "observing", "cutting", "training", "saving",
    "integrations", "lab", "cli",
)  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> frozenset[str]:
    return frozenset(module_name(file) for file in SOURCE.rglob("*.py"))


@cache
def imports(path: Path) -> frozenset[str]:
    """Modules of ours that a file imports, at once or in a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compressm"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    found: set[str] = set()
    for name in names:
        while name and name not in modules():
            name = name.rpartition(".")[0]
        found |= {name} - {""}
    return frozenset(found)


def test_a_lower_room_never_imports_a_higher_one() -> None:
    for path in SOURCE.rglob("*.py"):
        name = module_name(path)
        if name.count(".") == 0 or name in ("compressm.__main__", "compressm._moved"):
            continue
        room = name.split(".")[1]
        for other in imports(path) - {"compressm"}:
            above = other.split(".")[1]
            assert ROOMS.index(above) <= ROOMS.index(room), f"{name} imports {other}"


def test_no_circles() -> None:
    """Not even by an import in a function. The package itself, whose version some modules write down, imports all."""
    graph = {module_name(path): imports(path) - {"compressm"} for path in SOURCE.rglob("*.py")}
    order = list(TopologicalSorter({name: needs - {name} for name, needs in graph.items()}).static_order())
    assert len(order) == len(graph)


def test_theory_and_scans_know_no_layers_and_layers_no_compression() -> None:
    for room in ("theory", "scans", "layers"):
        for path in (SOURCE / room).rglob("*.py"):
            rooms = {name.split(".")[1] for name in imports(path) if "." in name}
            allowed = {"theory": {"errors", "runtime", "theory"}, "scans": {"errors", "runtime", "scans"}}.get(
                room, {"errors", "runtime", "scans", "layers"}
            )
            assert rooms <= allowed, f"{module_name(path)} imports {rooms - allowed}"


def test_git_ignores_no_module() -> None:
    """A module that git ignores is missing from a clone and from the distributions, and ruff does not look at it."""
    files = [str(path) for path in SOURCE.rglob("*.py")]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *files], cwd=SOURCE, capture_output=True, text=True, check=False
    )
    if done.returncode == 128:
        pytest.skip("no git repository here")
    assert done.stdout.split() == []
