"""Factors of the Gramians of diagonal systems, to full precision.

The Gramian of a diagonal system, ``P_ij = (B B*)_ij / (1 - lam_i conj(lam_j))``, has a numerical rank far below n
whenever eigenvalues crowd. A factor computed from its entries knows nothing of a direction of variance eps, that is, of
an amplitude of sqrt(eps), and half of the digits of small Hankel singular values are lost. Gaussian elimination on the
Gramian's *displacement* loses none. From

    P - Lam P Lam* = B B*

follows that the Schur complement of the pivot p has the same form with the generator

    B'_i = B_i - (B_i u) u* + phi_p(lam_i) (B_i u) u*,    u = B_p* / |B_p|,
    phi_p(z) = (z - lam_p) / (1 - conj(lam_p) z)

(a Blaschke factor: the Takenaka-Malmquist functions are the case of one input). All that is ever subtracted are the
eigenvalues and inputs that were given. Kailath and Sayed, "Displacement structure" (SIAM Review 37, 1995), section 4.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressm.errors import InvalidSystemError

Complex = NDArray[np.complex128]


def factor(lam: Tensor, B: Tensor, gramian: Tensor, real: bool) -> Tensor:
    """``L`` with ``L L* = gramian``.

    Well conditioned Gramians are factored as they are, by Cholesky; the others from eigenvalues and inputs.

    Args:
        lam: eigenvalues, shape ``(*batch, n)``.
        B: inputs, shape ``(*batch, n, p)``.
        gramian: of these, shape ``(*batch, m, m)``; see ``real``.
        real: whether the Gramian is that of ``(Re x, Im x)`` for real inputs, ``m = 2n``, and not that of ``x``.

    Returns:
        shape of ``gramian``; columns for directions that nothing reaches are zero.

    Raises:
        InvalidSystemError: a Gramian that overflows.
    """
    if not bool(torch.isfinite(torch.view_as_real(gramian) if gramian.is_complex() else gramian).all()):
        raise InvalidSystemError("the Gramian has entries that are not finite: scale B and C down")
    size = gramian.shape[-1]
    scale = gramian.diagonal(dim1=-2, dim2=-1).real.clamp_min(0).sqrt()
    safe = torch.where(scale > 0, scale, 1.0)  # a unit diagonal: conditioning is not a matter of units
    scaled = (gramian / safe[..., :, None] / safe[..., None, :]).reshape(-1, size, size)
    factors, failed = torch.linalg.cholesky_ex(scaled)
    sound = (failed == 0) & (factors.diagonal(dim1=-2, dim2=-1).real.amin(-1).square() > 1e-8)
    factors = factors * scale.reshape(-1, size, 1)
    for index in torch.nonzero(~sound).squeeze(1).tolist():
        inputs = B.reshape(-1, *B.shape[-2:])[index].resolve_conj().numpy()
        eigenvalues = lam.reshape(-1, lam.shape[-1])[index].resolve_conj().numpy()
        found = _real_factor(eigenvalues, inputs) if real else displacement_factor(eigenvalues, inputs)
        factors[index] = torch.from_numpy(found)
    return factors.reshape(gramian.shape)


def displacement_factor(lam: Complex, B: Complex) -> Complex:
    """``L`` with ``L L* = P`` where ``P - diag(lam) P diag(lam)* = B B*``: pivoted Cholesky, by the module's recursion.

    Args:
        lam: shape ``(n,)``, inside the unit circle.
        B: shape ``(n, p)``.

    Returns:
        shape ``(n, n)``; lower triangular but for the order of its rows. O(n^2 p) operations.
    """
    n = lam.shape[0]
    if B.shape[1] > n:  # only B B* matters
        B = _upper_factor(B.conj().T).conj().T
    remaining = B.astype(np.complex128)
    leak = (1 - np.abs(lam)) * (1 + np.abs(lam))
    start = np.maximum((remaining.real**2 + remaining.imag**2).sum(1) / leak, np.finfo(np.float64).tiny)
    found = np.zeros((n, n), np.complex128)
    for column in range(n):
        pivots = (remaining.real**2 + remaining.imag**2).sum(1) / leak
        p = int(np.argmax(pivots / start))  # relative, so that units do not decide
        if not pivots[p] > 0:
            break
        u = remaining[p].conj() / np.sqrt((remaining[p].real ** 2 + remaining[p].imag ** 2).sum())
        along = remaining @ u
        denominator = 1 - lam[p].conj() * lam
        found[:, column] = along * np.sqrt(leak[p]) / denominator
        blaschke = (lam - lam[p]) / denominator
        remaining += ((blaschke * along) - along)[:, None] * u.conj()
        remaining[p] = 0
    return found


def _real_factor(lam: Complex, B: Complex) -> NDArray[np.float64]:
    """Of the covariance of ``(Re x, Im x)``: that of ``(x, conj x)`` is one of the module's Gramians."""
    both = displacement_factor(np.concatenate([lam, lam.conj()]), np.concatenate([B, B.conj()]))
    x, mirrored = np.split(both, 2)
    stacked = np.concatenate([(x + mirrored) / 2, (x - mirrored) / 2j])
    # The covariance is real, so real and imaginary part of a factor, side by side, are a factor too.
    wide = np.concatenate([stacked.real, stacked.imag], 1)
    return _upper_factor(wide.T).T


def _upper_factor(matrix: NDArray[Any]) -> NDArray[Any]:
    """``R`` of ``matrix = Q R``."""
    return cast("NDArray[Any]", np.linalg.qr(matrix, mode="r"))


__all__ = ["displacement_factor", "factor"]
