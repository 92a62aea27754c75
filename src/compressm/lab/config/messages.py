"""One line for every mistake in a configuration: the key, its value, what is wrong, what to do."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from compressm.lab.config.schema import Config


def explained(error: Mapping[str, Any], tree: Mapping[str, Any]) -> str:
    """One line out of a pydantic error: the key's dotted name, its value, what is wrong, what to do."""
    kind, value = error["type"], error["input"]
    if kind == "value_error":
        key, message = error["msg"].removeprefix("Value error, ").split("|", 1)
        found = _lookup(tree, key)
        return f"{key}{'' if found is None or isinstance(found, dict) else f' = {shown(found)}'}: {message}"
    # Pydantic appends the branch of a union to the location; those are no keys of the configuration.
    location = [str(part) for part in error["loc"] if part not in ("int", "list[int]")]
    key = ".".join(location)
    if kind == "extra_forbidden":
        given = "" if isinstance(value, dict) else f" = {shown(value)}"
        return f"{key}{given}: unknown key; {_suggest(location)}"
    if kind == "missing":
        needed = [key]
        if len(location) == 1:
            section: Any = Config.model_fields[key].annotation
            needed = [f"{key}.{name}" for name, field in section.model_fields.items() if field.is_required()]
        values = " ".join(f"{name}=<value>" for name in needed or [f"{key}.<key>"])
        return f"{key}: missing; add it to the file, or give {values}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{key} = {shown(value)}: must be a section with the keys {', '.join(_fields(location))}"
    message = re.sub(r"^Input should be ", "must be ", error["msg"])
    if kind == "literal_error" and isinstance(value, str):
        message += _did_you_mean(value, re.findall(r"'([^']+)'", error["msg"]))
    return f"{key} = {shown(value)}: {message}"


def shown(value: object) -> str:
    """Like ``repr``, but short: what a file holds may be long and deeply nested."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)


def _fields(location: Sequence[str]) -> list[str]:
    annotation: Any = Config
    for part in location:
        annotation = annotation.model_fields[part].annotation
    return list(annotation.model_fields)


def _suggest(location: Sequence[str]) -> str:
    """A remedy for an unknown key: a similar one in the same section, the same one elsewhere, or the list of all."""
    *section, name = location
    siblings = _fields(section)
    if similar := _did_you_mean(name, siblings):
        return similar.removeprefix("; ")
    everywhere = {key: f"{part}.{key}" for part in _fields([]) for key in _fields([part])}
    if close := difflib.get_close_matches(name, everywhere, 1, 0.8):
        return f"did you mean {everywhere[close[0]]}?"
    return f"known here are {', '.join(siblings)}"


def _did_you_mean(word: str, possibilities: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, possibilities, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _lookup(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = cast("dict[str, Any]", value).get(part) if isinstance(value, dict) else None
    return value


__all__ = ["explained", "shown"]
