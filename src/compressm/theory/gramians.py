"""Gramians of diagonal systems in closed form: of the complex system, and of the real one that its layer computes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compressm.theory.systems import DiagonalSystem, stein_solution

# Which Gramians balance a layer: those of the real system of order 2n, or those of the complex one.
Method = Literal["real", "complex"]


def gramians(system: DiagonalSystem) -> tuple[Tensor, Tensor]:
    """Controllability and observability Gramian of ``C (I - diag(lam)/z)^-1 B``, in closed form.

        P = Lam P Lam* + B B*,    Q = Lam* Q Lam + C* C

    Returns:
        ``P`` and ``Q``, Hermitian, complex128, shape ``(*batch, n, n)``.
    """
    return stein_solution(system.lam, system.B), stein_solution(system.lam.conj(), system.C.mH)


def real_gramians(system: DiagonalSystem) -> tuple[Tensor, Tensor]:
    """Gramians of the real system of order 2n that computes ``Re(C x)``, in stacked real coordinates.

    With ``A = [[Re Lam, -Im Lam], [Im Lam, Re Lam]]``, ``B_r = [Re B; Im B]``, ``C_r = [Re C, -Im C]``:

        P = A P A^T + B_r B_r^T,    Q = A^T Q A + C_r^T C_r

    Returns:
        ``P`` and ``Q``, symmetric, float64, shape ``(*batch, 2n, 2n)``.
    """
    dual = (system.lam.conj(), system.C.mH)  # A^T is multiplication by conj(lam), C_r^T the stacked C*
    return _real_covariance(system.lam, system.B), _real_covariance(*dual)


def _real_covariance(lam: Tensor, B: Tensor) -> Tensor:
    """Covariance of ``(Re x, Im x)`` from ``E[x x*]`` and ``E[x x^T]``."""
    hermitian, symmetric = stein_solution(lam, B), stein_solution(lam, B, conjugate=False)
    total, difference = (hermitian + symmetric) / 2, (hermitian - symmetric) / 2
    top = torch.cat([total.real, -difference.imag], -1)
    bottom = torch.cat([total.imag, difference.real], -1)
    covariance = torch.cat([top, bottom], -2)
    return (covariance + covariance.mT) / 2


__all__ = ["Method", "gramians", "real_gramians"]
