"""Bode plot, step response and poles of a system before and after its reduction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compressm.errors import MissingExtraError
from compressm.theory.systems import DiagonalSystem

_BEFORE, _AFTER, _ERROR = "#999999", "#0072b2", "#d55e00"
_DEEPEST = 1e-12  # smaller gains are not drawn


def plot_systems(before: DiagonalSystem, after: DiagonalSystem, bound: float) -> Any:
    """Four panels: the largest gain over the frequencies with the error and its bound, the phase from the first input
    to the first output, the step response between these, and the poles.

    Args:
        before, after: systems of equal ``p``, ``q`` and ``dt``, no batches.
        bound: of the H-infinity error, drawn as a line; 0 for none.

    Returns:
        a matplotlib ``Figure``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('this picture needs matplotlib: pip install "compressm[train]"') from error
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    (gain, phase), (step, poles) = figure.subplots(2, 2)
    names = (f"before, order {before.order}", f"after, order {after.order}")
    _bode(gain, phase, before, after, bound, names)
    _steps(step, before, after)
    _poles(poles, before, after)
    for axis in (gain, phase, step, poles):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def response(system: DiagonalSystem, omega: Tensor) -> Tensor:
    """The whole transfer function on the unit circle, with the delay and feed-through of a model of control theory.

    Args:
        omega: frequencies in radians per step, shape ``(f,)``.

    Returns:
        complex128, shape ``(f, q, p)``.
    """
    transfer = system.transfer_function(omega)
    if system.model is None:
        return transfer
    return torch.exp(-1j * omega)[:, None, None] * transfer + system.model.D


def step_response(system: DiagonalSystem, length: int) -> Tensor:
    """The output for an input of ones from step 0 on, per input and output: shape ``(length, q, p)``."""
    kernel = system.kernel(length)
    if system.model is not None:
        kernel = torch.cat([system.model.D[None].to(kernel.dtype), kernel[:-1]])
    return kernel.cumsum(0)


def _bode(gain: Any, phase: Any, before: DiagonalSystem, after: DiagonalSystem, bound: float, names: Any) -> None:
    slowest = min(0.1, *(float(d) for d in (-before.lam.abs().clamp_min(1e-30).log()).reshape(-1)))
    phases = before.lam.angle().abs()
    omega = torch.logspace(math.log10(max(slowest / 10, 1e-6)), math.log10(math.pi), 600, dtype=torch.float64)
    omega = torch.cat([omega, phases[phases > omega[0]]]).sort().values
    at = (omega / before.dt).tolist()
    old, new = response(before, omega), response(after, omega)
    for value, colour, style, name in ((old, _BEFORE, "-", names[0]), (new, _AFTER, "--", names[1])):
        largest = torch.linalg.matrix_norm(value, ord=2).clamp_min(_DEEPEST)
        gain.loglog(at, largest.tolist(), color=colour, linestyle=style, linewidth=2, label=name)
        angle = torch.from_numpy(_unwrapped(value[:, 0, 0])) * 180 / math.pi
        phase.semilogx(at, angle.tolist(), color=colour, linestyle=style, linewidth=2)
    error = torch.linalg.matrix_norm(old - new, ord=2).clamp_min(_DEEPEST)
    gain.loglog(at, error.tolist(), color=_ERROR, linewidth=1, label="error")
    if bound > 0:
        gain.axhline(bound, color=_ERROR, linestyle=":", linewidth=1, label="its bound")
    gain.set(title="Largest gain", xlabel="frequency, rad/s")
    gain.legend(frameon=False, fontsize=8)
    phase.set(title="Phase, first input to first output, degrees", xlabel="frequency, rad/s")


def _unwrapped(values: Tensor) -> Any:
    import numpy as np

    return np.unwrap(values.angle().numpy())


def _steps(axis: Any, before: DiagonalSystem, after: DiagonalSystem) -> None:
    slowest = float(before.lam.abs().max())
    length = 50 if slowest <= 0 else min(5000, max(50, math.ceil(-5 / math.log(slowest))))
    seconds = [k * before.dt for k in range(length)]
    for system, colour, style in ((before, _BEFORE, "-"), (after, _AFTER, "--")):
        axis.plot(seconds, step_response(system, length)[:, 0, 0].real.tolist(), style, color=colour, linewidth=2)
    axis.set(title="Step response, first input to first output", xlabel="seconds")


def _poles(axis: Any, before: DiagonalSystem, after: DiagonalSystem) -> None:
    """Poles of discrete time in the unit disc, or of continuous time where the model came from there."""
    sampled = before.model is not None and before.model.discretisation is not None
    if not sampled:
        circle = torch.linspace(0, 2 * math.pi, 200).tolist()
        axis.plot([math.cos(a) for a in circle], [math.sin(a) for a in circle], color="#d0d0d0", linewidth=1)
        axis.set_aspect("equal")
    for system, colour, marker in ((before, _BEFORE, "o"), (after, _AFTER, "x")):
        poles = system.modes()[0]
        if sampled and system.model is not None:
            bilinear = system.model.discretisation == "bilinear"
            poles = (2 * (poles - 1) / (poles + 1) if bilinear else poles.log()) / system.dt
        axis.plot(poles.real.tolist(), poles.imag.tolist(), marker, color=colour, markerfacecolor="none")
    axis.locator_params(nbins=5)
    axis.set_title("Poles of continuous time, rad/s" if sampled else "Poles")


__all__ = ["plot_systems", "response", "step_response"]
