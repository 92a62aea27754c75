"""A hook of mkdocs: the foot of every page says which version of compressm it describes."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1] / "src" / "compressm" / "__init__.py"


def on_config(config: Any, **_: Any) -> Any:
    """Put the version, which stands in the package alone, before the copyright."""
    config.copyright = f"compressm {_version()}, {config.copyright}"
    return config


def _version() -> str:
    """Read, not imported: the import takes as long as that of PyTorch."""
    for node in ast.parse(_PACKAGE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise LookupError(f"{_PACKAGE} has no __version__")
