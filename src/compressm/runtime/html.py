"""Small HTML tables for notebooks, legible in light and dark: they take the page's own colours."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_PLAIN = "color:inherit;background:transparent"  # the page's own colours
_CELL = "padding:.15em .7em;border-bottom:1px solid rgba(128,128,128,.35);white-space:nowrap"


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """A table in a box that scrolls sideways where it is wider than the page. All text is escaped.

    Args:
        caption: above the table.
        columns: their titles. Text stands to the left, numbers to the right.
        rows: one value per column; None leaves the cell empty.
        notes: lines under the table.
    """
    head = "".join(_cell("th", title, "left" if index == 0 else "right") for index, title in enumerate(columns))
    body = "".join(f"<tr>{''.join(_value(value) for value in row)}</tr>" for row in rows)
    told = "".join(f"<div>{html.escape(note)}</div>" for note in notes if note)
    return (
        f'<div style="overflow-x:auto;{_PLAIN}">'
        f'<table style="border-collapse:collapse;font-variant-numeric:tabular-nums;{_PLAIN}">'
        f'<caption style="text-align:left;caption-side:top;font-weight:600;{_PLAIN}">{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{told}</div>"
    )


def _value(value: object) -> str:
    if value is None:
        return _cell("td", "", "right")
    if isinstance(value, float):
        return _cell("td", f"{value:.3g}", "right")
    return _cell("td", str(value), "right" if isinstance(value, int) else "left")


def _cell(tag: str, text: str, side: str) -> str:
    return f'<{tag} style="{_CELL};text-align:{side};{_PLAIN}">{html.escape(text)}</{tag}>'


__all__ = ["table"]
