"""Write docs/reference.md: every command, option and configuration key: ``python scripts/reference.py``."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from compressm.cli.app import make_app
from compressm.lab.config import Config

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
HEAD = """# Commands and configuration keys

*Generated from the command line and the configuration's schema by `python scripts/reference.py` (`make pages`). Do not
edit this page.*

What the options of compression mean is told under [options](options.md).
"""


def commands() -> dict[str, Any]:
    """Click's commands by name."""
    return dict(typer.main.get_command(make_app()).commands)  # type: ignore[attr-defined]


def every_key() -> Iterator[tuple[str, str, Any]]:
    """Every configuration key: its section, its name and pydantic's field."""
    for section, field in Config.model_fields.items():
        annotation: Any = field.annotation
        for name, inner in annotation.model_fields.items():
            yield section, name, inner


def _cell(text: object) -> str:
    return " ".join(re.sub(r"``(.+?)``", r"`\1`", str(text)).replace("|", "\\|").split())


def _meanings(section: Any) -> dict[str, str]:
    """What the docstring of a section says of its keys."""
    lines = (inspect.getdoc(section) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}([a-z_, ]+): (.*(?:\n {8}.*)*)", lines, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), text)
    return found


def _command(name: str, command: Any) -> Iterator[str]:
    yield from ("", f"## compressm {name}", "", _cell(command.help or ""), "", "| option | meaning |", "|---|---|")
    for one in command.params:
        names = one.opts if one.param_type_name == "option" else [one.metavar or one.name]
        told = ", ".join(f"`{name}`" for name in names)
        yield f"| {told} | {_cell(getattr(one, 'help', '') or '')} |"


def _section(section: str) -> Iterator[str]:
    annotation: Any = Config.model_fields[section].annotation
    meanings = _meanings(annotation)
    yield from ("", f"## {section}:", "", _cell((inspect.getdoc(annotation) or "").partition("\n\nAttributes:")[0]), "")
    yield from ("| key | default | meaning |", "|---|---|---|")
    for name, field in annotation.model_fields.items():
        default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
        yield f"| `{section}.{name}` | {_cell(default)} | {_cell(field.description or meanings.get(name, ''))} |"


def page() -> str:
    """The whole page."""
    lines = [HEAD.rstrip()]
    for name, command in commands().items():
        lines += _command(name, command)
    for section in Config.model_fields:
        lines += _section(section)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/reference.md.")
    parser.add_argument("--output", type=Path, default=PAGE, help="write the page to this file")
    parser.parse_args().output.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
