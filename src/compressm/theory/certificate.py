"""The certificate of a truncation: its errors, computed and checked against the bounds of the theory."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compressm.theory.systems import DiagonalSystem

# A basis of eigenvectors with a larger condition number loses half the digits of a double, all those of a float32.
MAX_CONDITION = 1e8
# How many rounding errors of one eigenvalue in double precision a computation may accumulate, per state.
ROUNDINGS_PER_STATE = 10.0


@dataclass(frozen=True)
class Certificate:
    """The errors of a truncation, computed from both systems, and the result of every check.

    Attributes:
        states_before, states_after: numbers of complex states.
        bound: ``2 sum of the discarded HSVs``: for every input, the 2-norm of the output's error is at most this times
            the 2-norm of the input.
        rounding_allowance: how far above the bound rounding in double precision may put the error; see `certify`.
        hinf_error: the largest singular value of ``G - G_r`` found on an adaptive frequency grid (a lower estimate).
        hinf_frequency: where it was found, in radians per step.
        h2_error, h2_norm: ``||G - G_r||_2`` and ``||G||_2``, exact.
        spectral_radius: largest ``|lam|`` of the reduced system.
        condition: 2-norm condition number of the eigenvectors by which the reduced system was diagonalised.
        rounding_error: H2 error added by rounding to the layer's dtype and parametrisation (0 until written).
        failures: reasons why the truncation must not be used; empty if there are none.
    """

    states_before: int
    states_after: int
    bound: float
    hinf_error: float
    hinf_frequency: float
    h2_error: float
    h2_norm: float
    spectral_radius: float
    condition: float
    rounding_error: float = 0.0
    rounding_allowance: float = 0.0
    failures: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    @property
    def relative_h2_error(self) -> float:
        """``h2_error / h2_norm`` (0 for a system that is zero)."""
        return self.h2_error / self.h2_norm if self.h2_norm > 0 else 0.0

    @property
    def discarded(self) -> float:
        """Hankel energy that the cut discards."""
        return self.bound / 2

    def errors(self) -> tuple[float, float | None, float | None]:
        """The expected relative error, the H-infinity error and its bound, for a table."""
        return self.relative_h2_error, self.hinf_error, self.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {**asdict(self), "failures": list(self.failures), "relative_h2_error": self.relative_h2_error}


def certify(
    system: DiagonalSystem,
    lam: Tensor,
    B: Tensor,
    C: Tensor,
    bound: float,
    scale: float,
    condition: float,
) -> Certificate:
    """Compute the errors of one reduced system and check them.

    Args:
        system: the system before (no batch).
        lam, B, C: the reduced system, shapes ``(r,)``, ``(r, p)``, ``(q, r)``; not yet a `DiagonalSystem`, since it
            may be unstable.
        bound: twice the sum of the discarded HSVs.
        scale: scale of the rounding errors, at least the sum of all HSVs; see `DiagonalSystem.mode_energy`.
        condition: condition number of the eigenvectors that diagonalised it.
    """
    finite = all(bool(torch.isfinite(torch.view_as_real(x)).all()) for x in (lam, B, C))
    radius = float(lam.abs().max()) if finite else math.nan
    failures: list[str] = []
    errors, allowance = _Errors(), 0.0
    if not finite:
        failures.append("the reduced system has entries that are not finite")
    elif radius >= 1:
        failures.append(f"the reduced system is unstable: spectral radius {radius:.9g}")
    else:
        errors = _Errors.of(system, DiagonalSystem(lam, B, C, system.real_output))
        allowance = _rounding_allowance(system, radius, condition, scale)
        if errors.hinf > bound + allowance:
            failures.append(
                f"the H-infinity error {errors.hinf:.6g} is above its bound {bound:.6g} by more than rounding explains"
            )
    if not condition <= MAX_CONDITION:
        failures.append(f"the reduced system's eigenvectors are ill conditioned: {condition:.3g}")
    h2_error, h2_norm = _without_noise(system, errors.h2)
    return Certificate(
        states_before=system.n,
        states_after=lam.shape[0],
        bound=bound,
        hinf_error=errors.hinf,
        hinf_frequency=errors.frequency,
        h2_error=h2_error,
        h2_norm=h2_norm,
        spectral_radius=radius,
        condition=condition,
        rounding_allowance=allowance,
        failures=tuple(failures),
    )


@dataclass(frozen=True)
class _Errors:
    """Norms of the difference of two systems; NaN if one of them is not stable."""

    hinf: float = math.nan
    frequency: float = math.nan
    h2: float = math.nan

    @classmethod
    def of(cls, system: DiagonalSystem, reduced: DiagonalSystem) -> _Errors:
        difference = system.minus(reduced)
        return cls(*hinf_norm(difference), float(difference.h2_norm()))


def _rounding_allowance(system: DiagonalSystem, radius: float, condition: float, scale: float) -> float:
    """How far above its bound rounding in double precision may put an H-infinity error.

    An error of eps in an eigenvalue changes the gain of its mode by a relative ``eps / (1 - |lam|)``. Storing the
    system in double precision costs that much, and the change of basis multiplies it by its condition number.
    """
    margin = 1 - max(radius, float(system.lam.abs().max()))
    eps = torch.finfo(torch.float64).eps
    return ROUNDINGS_PER_STATE * system.n * eps * max(1.0, condition) / margin * scale


def _without_noise(system: DiagonalSystem, h2_error: float) -> tuple[float, float]:
    """An H2 error and the H2 norm of the system.

    If the modes of a system cancel completely, its computed norm is rounding error, and a ratio to it means nothing.
    The norm then counts as zero, and so does an error of that size.
    """
    h2_norm = float(system.h2_norm())
    noise = system.n * torch.finfo(torch.float64).eps * _h2_size(system)
    if h2_norm > noise:
        return h2_error, h2_norm
    return 0.0 if h2_error <= noise else h2_error, 0.0


def _h2_size(system: DiagonalSystem) -> float:
    """The sum of the H2 norms of the single modes: at least the norm of the system."""
    leak = ((1 - system.lam.abs()) * (1 + system.lam.abs())).sqrt()
    return float((system.B.norm(dim=-1) * system.C.norm(dim=-2) / leak).sum())


def hinf_norm(system: DiagonalSystem, grid: int = 40, refinements: int = 6) -> tuple[float, float]:
    """The largest singular value of ``G(e^{i omega})`` over an adaptive frequency grid, and where it is.

    The grid starts from equidistant frequencies and the phases of all modes, since a peak is only ``1 - |lam|`` wide.
    It is then refined around the highest peaks. The result is a lower estimate of the H-infinity norm.

    Args:
        system: one system (no batch).
        grid: number of equidistant frequencies in [0, pi] (complex output: [-pi, pi]).
        refinements: how often the neighbourhood of the four highest peaks is halved.

    Returns:
        the norm, and the frequency in radians per step.
    """
    low = 0.0 if system.real_output else -math.pi
    phases = system.lam.angle()
    if system.real_output:
        phases = phases.abs()
    omega = torch.cat([torch.linspace(low, math.pi, grid, dtype=torch.float64), phases])
    values = _largest_singular_values(system, omega, iterations=3)
    width = (math.pi - low) / (grid - 1) / 2
    for _ in range(refinements):
        peaks = omega[torch.topk(values, min(4, values.shape[0])).indices]
        extra = torch.cat([peaks - width, peaks + width]).clamp(low, math.pi)
        omega = torch.cat([omega, extra])
        values = torch.cat([values, _largest_singular_values(system, extra, iterations=3)])
        width /= 2
    best = torch.topk(values, min(4, values.shape[0])).indices
    values = _largest_singular_values(system, omega[best], iterations=20)
    return float(values.max()), float(omega[best][int(values.argmax())])


def _largest_singular_values(system: DiagonalSystem, omega: Tensor, iterations: int) -> Tensor:
    if min(system.p, system.q) <= 32:
        return torch.linalg.matrix_norm(system.transfer_function(omega), ord=2)
    # Wide systems: power iteration at all frequencies at once, without forming the transfer function. Single precision
    # is enough to rank frequencies. The result exceeds the singular value by no more than rounding.
    lam, B, C = system.modes()
    resolvent = 1.0 / (1.0 - torch.exp(-1j * omega)[:, None] * lam)  # (f, m)
    if iterations < 10:
        resolvent, B, C = resolvent.to(torch.complex64), B.to(torch.complex64), C.to(torch.complex64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(omega.shape[0], system.p, dtype=B.dtype, generator=generator)
    x = x / x.norm(dim=1, keepdim=True)
    gain = torch.zeros(omega.shape[0], dtype=torch.float64)
    for _ in range(iterations):
        y = ((x @ B.mT) * resolvent) @ C.mT
        gain = y.norm(dim=1)
        x = ((y @ C.conj()) * resolvent.conj()) @ B.conj()
        x = x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(B.dtype).tiny)
    return gain.to(torch.float64)
