"""A hook of mkdocs: formulas become MathML while the site is built, and need no script and no network to be read."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what the arithmatex extension has marked."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    formula = convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline")
    return f'<div class="formula">{formula}</div>' if found[2] == "[" else formula
