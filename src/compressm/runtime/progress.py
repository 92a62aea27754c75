"""A progress bar for work that lasts: by rich on a terminal where that is installed, by IPython in a notebook."""

from __future__ import annotations

import sys
from typing import Any


class Bar:
    """A bar on standard error, on a terminal or under a notebook's cell only. A context manager.

    Args:
        name: what is being done.
        total: how many units of work there are.
        quiet: draw nothing.
        transient: the bar vanishes when the work is done.
    """

    def __init__(self, name: str, total: int, quiet: bool = False, transient: bool = False) -> None:
        self._name, self._total = name, total
        self._bar: Any = None if quiet else _notebook_bar() or _rich_bar(transient)
        self._task: Any = None

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def describe(self, what: str) -> None:
        """Say what is being done now."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._name}: {what}")

    def advance(self) -> None:
        """One unit is done."""
        self.skip(1)

    def skip(self, units: int) -> None:
        """So many units are done or need not be done."""
        if self._bar is not None:
            self._bar.advance(self._task, units)


class _NotebookBar:
    """IPython's own bar under a cell; it needs no widgets, which rich would."""

    def __init__(self, bar_class: Any, show: Any) -> None:
        self._class, self._show, self._bar = bar_class, show, None

    def start(self) -> None:
        """The bar appears with its first task, which says how long it is."""

    def add_task(self, name: str, total: int) -> None:
        """Show the bar."""
        if total:
            self._show(name)
            self._bar = self._class(total)
            self._bar.display()

    def update(self, task: None, description: str) -> None:
        """A cell cannot change the line above the bar, so what is being done now is not told."""

    def advance(self, task: None, units: int) -> None:
        """So many units are done."""
        if self._bar is not None:
            self._bar.progress = min(self._bar.total, self._bar.progress + units)

    def stop(self) -> None:
        """The bar stays, full."""


def _notebook_bar() -> Any:
    """A bar for Jupyter; None elsewhere."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import ProgressBar

    return None if get_ipython() is None else _NotebookBar(ProgressBar, print)


def _rich_bar(transient: bool) -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)


__all__ = ["Bar"]
