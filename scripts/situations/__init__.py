"""The situations of docs/situations.md: one module for each host, one small function for each row.

A row trains something real through cuts, and checks with `Trial.check` what must hold. Add one like this, in the module
of its host or in a new module that `HOSTS` names:

    @row("Own loop", "gradient clipping")
    def _(trial: Trial) -> None:
        trial.loop(clip=1.0)
"""

from __future__ import annotations

from importlib import import_module

from situations.trial import ROWS, Row, Trial, row

HOSTS = ("own_loop", "compiled", "accelerate_", "trainer", "lightning_", "replicas", "by_loss")


def all_rows() -> list[Row]:
    """The rows of all hosts, in their order."""
    for host in HOSTS:
        import_module(f"situations.{host}")
    return sorted(ROWS, key=lambda one: HOSTS.index(one.run.__module__.rpartition(".")[2]))


__all__ = ["Row", "Trial", "all_rows", "row"]
