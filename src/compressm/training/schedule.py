"""When cuts come, and how far each goes on the way to a size."""

from __future__ import annotations

import math


def cut_steps(total_steps: int, cuts: int, window: float, start: int) -> tuple[int, ...]:
    """The steps after which cuts come: equidistant in ``window * total_steps`` steps from ``start`` on.

    The last one is later than ``total_steps`` where they do not fit.
    """
    exact = window * total_steps / cuts
    distance = max(1, round(exact))
    if start + distance * cuts > total_steps:  # rounding must not push the last cut out of a window that fits
        distance = max(1, math.floor(exact + 1e-9))
    return tuple(start + distance * (index + 1) for index in range(cuts))


def towards(present: int, target: int, share: float) -> int:
    """A size on the way to a target, in proportions: a share of the way from the present one."""
    return present if target >= present else max(target, round(present * (target / present) ** share))


__all__ = ["cut_steps", "towards"]
