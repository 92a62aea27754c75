"""What a model was built for, and is saved with: the sizes of the data, by which a model of the user's is built again,
and the names of its classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

_NAME = "_compressm_arguments"  # an attribute of the model, so that its copies have it too


def remember_arguments(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Have `save` write what was offered to the function that built this model, and the names of its classes."""
    setattr(model, _NAME, dict(arguments))


def arguments_of(model: nn.Module) -> dict[str, Any] | None:
    """What was remembered of this model; None for nothing."""
    return getattr(model, _NAME, None)


def class_names_of(model: nn.Module) -> list[str] | None:
    """The names of the classes that a model was trained with, by number; None if they had none."""
    names = (arguments_of(model) or {}).get("class_names")
    return cast("list[str]", names) if isinstance(names, list) else None


def saved_arguments(folder: Path) -> dict[str, Any] | None:
    """What `save` wrote of it; None where nothing can be read, which `load` then says better."""
    try:
        description = json.loads((folder / "compressm.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    arguments = description.get("arguments") if isinstance(description, dict) else None
    return cast("dict[str, Any]", arguments) if isinstance(arguments, dict) else None


__all__ = ["arguments_of", "class_names_of", "remember_arguments", "saved_arguments"]
