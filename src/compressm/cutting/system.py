"""`reduce`: balanced truncation of one linear system, outside of any network and any training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from compressm.cutting.system_plots import plot_systems
from compressm.errors import InvalidRankRuleError, InvalidSystemError
from compressm.theory.balancing import balance
from compressm.theory.certificate import Certificate, certify
from compressm.theory.realisation import Discretisation
from compressm.theory.systems import DiagonalSystem
from compressm.theory.truncation import Factors, Single, resolved, truncate_to_order


@dataclass(frozen=True)
class ReducedSystem:
    """A reduced system beside the one that it was made of.

    Attributes:
        before: the system before.
        system: the reduced system; its ``to_abcd()``, ``to_scipy()`` and ``to_control()`` hand it on.
        hsv: Hankel singular values of ``before``, decreasing, float64. A real model of order n has n of them, with
            zeros after them.
        certificate: the error made and the bound on it.
    """

    before: DiagonalSystem
    system: DiagonalSystem
    hsv: Tensor
    certificate: Certificate

    def plot(self) -> Any:
        """Bode plot, step response and poles, before and after: a matplotlib ``Figure``.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return plot_systems(self.before, self.system, self.certificate.bound)

    def __str__(self) -> str:
        certificate = self.certificate
        return (
            f"order {self.before.order} → {self.system.order}, H∞ error {certificate.hinf_error:.3g} found, at most "
            f"{certificate.bound:.3g} by theory; H2 error {certificate.relative_h2_error:.3g} of the norm; "
            f"spectral radius {certificate.spectral_radius:.6g}"
        )


def reduce(
    model: Any,
    *,
    error: float | None = None,
    order: int | None = None,
    dt: float | None = None,
    discretise: Discretisation = "zoh",
) -> ReducedSystem:
    """Balanced truncation of a linear system, by a limit on its error or its order.

    With Hankel singular values ``sigma_i`` the reduced system of order r has ``||G - G_r||_inf <= 2 sum_{i>r} sigma_i``
    (Enns 1984; Glover 1984): for every input the 2-norm of the output's error is at most this times the input's.

    Args:
        model: a `DiagonalSystem`, or a model of scipy.signal or python-control; see `DiagonalSystem.from_model`.
        error: the largest bound allowed, in units of output per input. The smallest order that keeps it is taken.
        order: the largest order allowed: the number of real states, of complex ones if the output is complex.
        dt: sampling time in seconds, for models of continuous time; see `DiagonalSystem.from_model`.
        discretise: how those are sampled. With ``"bilinear"`` the bound holds in continuous time as well.

    Returns:
        the reduced system with its certificate; the system itself if no smaller one keeps the ``error``, or if its
        order is allowed.

    Raises:
        InvalidRankRuleError: none or both of ``error`` and ``order``, or one that is out of range.
        InvalidSystemError: no stable system that can be diagonalised, or a batch of several systems.
    """
    _check_choice(error, order)
    system = DiagonalSystem.from_model(model, dt=dt, discretise=discretise)
    if system.batch_shape:
        raise InvalidSystemError(
            f"model is a batch of systems, of shape {tuple(system.batch_shape)}: reduce them one by one, or use "
            "balance and truncate"
        )
    balancing = balance(system, "real" if system.real_output else "complex")
    (balanced,) = balancing.singles()
    most = min(resolved(balanced.hsv), system.order - 1) if order is None or order < system.order else 0
    for cut in _candidates(balanced, error, order, most):
        certificate = certify(system, cut.lam, cut.B, cut.C, cut.bound, cut.scale, cut.condition)
        if certificate.valid:
            return ReducedSystem(system, replace(system, lam=cut.lam, B=cut.B, C=cut.C), balancing.hsv, certificate)
    unchanged = certify(system, system.lam, system.B, system.C, 0.0, float(system.mode_energy()), 1.0)
    return ReducedSystem(system, system, balancing.hsv, unchanged)


def _check_choice(error: float | None, order: int | None) -> None:
    if (error is None) == (order is None):
        raise InvalidRankRuleError(f"pass exactly one of error= and order=; got error={error!r}, order={order!r}")
    if error is not None and not (isinstance(error, int | float) and 0 <= error < float("inf")):
        raise InvalidRankRuleError(f"error must be a number, at least 0, in units of output per input; got {error!r}")
    if order is not None and (not isinstance(order, int) or isinstance(order, bool) or order < 1):
        raise InvalidRankRuleError(f"order must be a whole number, at least 1; got {order!r}")


def _candidates(balanced: Factors, error: float | None, order: int | None, most: int) -> Iterable[Single]:
    """Cuts from the smallest one that keeps the error upwards, or from the largest order allowed downwards."""
    if order is not None:
        return (truncate_to_order(balanced, r) for r in range(min(order, most), 0, -1))
    bounds = 2 * balanced.hsv.flip(0).cumsum(0).flip(0)  # of the orders 0, 1, ...
    return (truncate_to_order(balanced, r) for r in range(1, most + 1) if float(bounds[r]) <= (error or 0.0))


__all__ = ["ReducedSystem", "reduce"]
