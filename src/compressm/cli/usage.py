"""Errors of the option parser, told as our own are: the option, its value, what was expected, and what to write.

Versions of typer word them differently (newer ones ask pydantic), so they are told by what they are about.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def told(error: Any, given: Sequence[str]) -> str:
    """One line about a usage error.

    Args:
        error: typer's.
        given: the command line's arguments.
    """
    message = str(error.format_message()).rstrip(".")
    command = getattr(getattr(error, "ctx", None), "command_path", "") or "compressm"
    more = f"see {command} --help"
    parameter = getattr(error, "param", None)
    if message.startswith("Missing "):
        return f"{message.split(maxsplit=2)[2].partition('.')[0].strip(chr(39))}: missing; {more}"
    if without_value := re.match(r"Option '(\S+)' requires an argument", message):
        return f"{without_value[1]}: its value is missing; write one behind it, or {more}"
    if extra := re.match(r"Got unexpected extra arguments?\S* \((.*)\)", message):
        return f"{extra[1]}: more arguments than {command} takes; leave it out, or {more}"
    if parameter is None or not parameter.opts[0].startswith("-"):
        return f"{message}{' See' if message.endswith('?') else '; see'} {command} --help"
    value = _value(parameter.opts, given)
    expected = _expected(message, getattr(parameter, "default", None))
    return f"{parameter.opts[0]} {value}: {expected}" if expected else f"{message}; {more}"


def _value(options: Sequence[str], given: Sequence[str]) -> str:
    """The last value of an option, which is the one that counts."""
    found = ""
    for word, following in zip(given, [*given[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in options:
            found = value if equals else following
    return found


def _expected(message: str, default: object) -> str | None:
    """What was expected in place of a value; None if the message is about something else."""
    example = default if isinstance(default, int | float) else None
    if smallest := re.search(r"(?:equal to |x>=)(\d+)", message):
        return f"must be at least {smallest[1]}"
    if "is not one of" in message:
        *names, last = re.findall(r"'([^']*)'", message.partition("is not one of")[2])
        return f"choose {', '.join(names)} or {last}"
    if "integer" in message:
        return f"a whole number was expected, such as {example or 8}"
    if "number" in message or "float" in message:
        return f"a number was expected, such as {example or 0.02}"
    return None


__all__ = ["told"]
