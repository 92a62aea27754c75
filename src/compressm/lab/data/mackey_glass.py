"""Forecasts of the Mackey-Glass series (Mackey and Glass 1977, Science 197), which is generated.

    dx/dt = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x

The series is chaotic. Its delay makes a forecast need a memory. It is integrated by Heun's method in steps of 0.1, and
sampled at every unit of time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_DELAY, _STEPS_PER_UNIT, _TRANSIENT = 17, 10, 300  # units of time; the transient is left out


def generate(count: int, length: int, horizon: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw series with random pasts.

    Args:
        count: how many.
        length: of each, in units of time.
        horizon: how far ahead the targets are, in units of time.
        seed: of the pasts.

    Returns:
        inputs x(t) and targets x(t + horizon), both float32 of shape ``(count, length, 1)``.
    """
    delay, step = _DELAY * _STEPS_PER_UNIT, 1 / _STEPS_PER_UNIT
    units = _TRANSIENT + length + horizon
    x = np.empty((delay + 1 + units * _STEPS_PER_UNIT, count))
    x[: delay + 1] = np.random.default_rng(seed).uniform(0.5, 1.3, (1, count))
    for now in range(delay, len(x) - 1):
        slope = _slope(x[now], x[now - delay])
        ahead = _slope(x[now] + step * slope, x[now + 1 - delay])
        x[now + 1] = x[now] + step * (slope + ahead) / 2
    series = torch.from_numpy(x[delay + 1 + _TRANSIENT * _STEPS_PER_UNIT :: _STEPS_PER_UNIT].T.astype(np.float32))
    return series[:, :length, None].clone(), series[:, horizon : horizon + length, None].clone()


def _slope(x: np.ndarray, past: np.ndarray) -> np.ndarray:
    return 0.2 * past / (1 + past**10) - 0.1 * x


__all__ = ["generate"]
