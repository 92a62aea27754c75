"""A progress bar for work that lasts. It is drawn by rich where that is installed, and by nothing else."""

from __future__ import annotations

from typing import Any


class Bar:
    """A bar on standard error, on a terminal only. A context manager.

    Args:
        name: what is being done.
        total: how many units of work there are.
        quiet: draw nothing.
        transient: the bar vanishes when the work is done.
    """

    def __init__(self, name: str, total: int, quiet: bool = False, transient: bool = False) -> None:
        self._name, self._total = name, total
        self._bar: Any = None if quiet else _rich_bar(transient)
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
