"""The arguments ``layers=`` and ``exclude=``: which layers of a model are cut."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

from torch import nn

from compressm.adapters.left_out import Choice
from compressm.adapters.registry import candidates
from compressm.errors import InvalidRankRuleError

Which = str | Sequence[str] | Callable[[str, nn.Module], bool]
EXPECTED = "the name of a layer or of a module around it, a glob (blocks.1?.*), a list of these, or a function of a \
layer's name and the layer"
F = TypeVar("F", bound=Callable[..., Any])


def is_which(value: Any) -> bool:
    """Whether a value says which layers."""
    if isinstance(value, str) or callable(value):
        return True
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def choose(
    model: nn.Module,
    layers: Which | None = None,
    exclude: Which | None = None,
    per_layer: bool | None = None,
) -> Choice:
    """The choice of a model's layers.

    Args:
        model: the model.
        layers: those to choose, by default all.
        exclude: those to leave out, of the former.
        per_layer: whether layers may differ in their state dimension though a config holds one for all; None if nothing
            is cut.

    Raises:
        InvalidRankRuleError: a pattern that names no layer; no layer is left; or layers are left out of a model whose
            config holds one state dimension for all.
    """
    if layers is None and exclude is None:
        return Choice()
    every = candidates(model)
    named = {name: layer for name, (layer, _) in every.items()}
    chosen = _matching("layers", layers, named) if layers is not None else set(named)
    chosen -= _matching("exclude", exclude, named) if exclude is not None else set()
    if not chosen:
        raise InvalidRankRuleError(f"layers={layers!r} and exclude={exclude!r} leave no layer of {_some(named)}")
    left = {name: layer for name, layer in named.items() if name not in chosen}
    kinds = {name: adapter for name, (_, adapter) in every.items() if adapter is not None and adapter.uniform}
    torn = [name for name in left if name in kinds and kinds[name] in [kinds.get(one) for one in chosen]]
    if torn and per_layer is False:
        raise InvalidRankRuleError(
            f"layers and exclude leave out {_some(torn)}, and the model's config holds one state dimension for all of "
            "its layers: pass per_layer=True too, and save with compressm.save; or leave out none"
        )
    return Choice(tuple(left.values()))


def _matching(option: str, which: Which, named: dict[str, nn.Module]) -> set[str]:
    """Names of the layers that one of the two arguments says."""
    if not is_which(which):
        raise InvalidRankRuleError(f"{option} must be {EXPECTED}; got {which!r}")
    if callable(which):
        return {name for name, layer in named.items() if which(name, layer)}
    found: set[str] = set()
    for pattern in [which] if isinstance(which, str) else which:
        of_pattern = {name for name in named if any(fnmatchcase(one, pattern) for one in (name, *_around(name)))}
        if not of_pattern:
            raise InvalidRankRuleError(f"{option}={pattern!r} names no layer; expected {EXPECTED}, of {_some(named)}")
        found |= of_pattern
    return found


def _around(name: str) -> list[str]:
    """Names of the modules around a layer."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _some(names: Iterable[str]) -> str:
    names = [name or "the model itself" for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def of_chosen_layers(function: F) -> F:
    """Let a function of a model see the layers only that its arguments ``layers`` and ``exclude`` choose.

    ``per_layer`` is looked up among its arguments too; a function without it cuts nothing.
    """

    @functools.wraps(function)
    def wrapper(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given: dict[str, Any] = {**(inspect.unwrap(function).__kwdefaults__ or {}), **kwargs}
        with choose(model, given["layers"], given["exclude"], given.get("per_layer")).scope():
            return function(model, *args, **kwargs)

    return cast("F", wrapper)


__all__ = ["EXPECTED", "Which", "choose", "is_which", "of_chosen_layers"]
