"""Factors of the Gramians of diagonal systems, to full precision.

The Gramian of a diagonal system, ``P_ij = (B B*)_ij / (1 - lam_i conj(lam_j))``, has a numerical rank far below n
when eigenvalues are close to each other. A factor computed from the entries of P does not resolve directions of
variance eps, that is, of amplitude sqrt(eps), and loses half of the digits of small Hankel singular values. Gaussian
elimination on the Gramian's *displacement* loses none. The equation

    P - Lam P Lam* = B B*

implies that the Schur complement of the pivot p has the same form, with the generator

    B'_i = B_i - (B_i u) u* + phi_p(lam_i) (B_i u) u*,    u = B_p* / |B_p|,
    phi_p(z) = (z - lam_p) / (1 - conj(lam_p) z)

(a Blaschke factor: the Takenaka-Malmquist functions are the case of one input). Only given eigenvalues and inputs are
subtracted from each other. Kailath and Sayed, "Displacement structure" (SIAM Review 37, 1995), section 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressm.errors import InvalidSystemError

Complex = NDArray[np.complex128]


def factor(lam: Tensor, B: Tensor, gramian: Tensor, real: bool) -> Tensor:
    """``L`` with ``L L* = gramian``.

    Well conditioned Gramians are factored by Cholesky; the others from eigenvalues and inputs.

    Args:
        lam: eigenvalues, shape ``(*batch, n)``.
        B: inputs, shape ``(*batch, n, p)``.
        gramian: the Gramian of ``lam`` and ``B``, shape ``(*batch, m, m)``; see ``real``.
        real: True for the Gramian of ``(Re x, Im x)`` for real inputs, ``m = 2n``; False for that of ``x``, ``m = n``.

    Returns:
        shape of ``gramian``; columns for directions that no input reaches are zero.

    Raises:
        InvalidSystemError: a Gramian that overflows.
    """
    if not bool(torch.isfinite(torch.view_as_real(gramian) if gramian.is_complex() else gramian).all()):
        raise InvalidSystemError("the Gramian has entries that are not finite: scale B and C down")
    size = gramian.shape[-1]
    scale = gramian.diagonal(dim1=-2, dim2=-1).real.clamp_min(0).sqrt()
    safe = torch.where(scale > 0, scale, 1.0)  # scale to a unit diagonal, so that units do not affect conditioning
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
        shape ``(n, n)``; lower triangular up to a permutation of its rows. O(n^2 p) operations.
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
        p = int(np.argmax(pivots / start))  # relative, so that units do not affect the choice
        if not pivots[p] > 0:
            break
        u = remaining[p].conj() / np.sqrt((remaining[p].real ** 2 + remaining[p].imag ** 2).sum())
        along = np.einsum("ij,j->i", remaining, u)  # not by BLAS, see `_upper_factor`
        denominator = 1 - lam[p].conj() * lam
        found[:, column] = along * np.sqrt(leak[p]) / denominator
        blaschke = (lam - lam[p]) / denominator
        remaining += ((blaschke * along) - along)[:, None] * u.conj()
        remaining[p] = 0
    return found


def _real_factor(lam: Complex, B: Complex) -> NDArray[np.float64]:
    """A factor of the covariance of ``(Re x, Im x)``, from that of ``(x, conj x)``, which is a diagonal system's."""
    both = displacement_factor(np.concatenate([lam, lam.conj()]), np.concatenate([B, B.conj()]))
    x, mirrored = np.split(both, 2)
    stacked = np.concatenate([(x + mirrored) / 2, (x - mirrored) / 2j])
    # The covariance is real, so ``[Re L, Im L]`` is a factor too.
    wide = np.concatenate([stacked.real, stacked.imag], 1)
    return _upper_factor(wide.T).T


def _upper_factor(matrix: NDArray[Any]) -> NDArray[Any]:
    """``R`` of ``matrix = Q R``.

    By torch: numpy's BLAS has threads of its own, which know neither `torch.set_num_threads` nor the share of the
    processors that a container may use. Beside busy processes they wait for each other milliseconds in every call.
    """
    return torch.linalg.qr(torch.from_numpy(np.ascontiguousarray(matrix)), mode="r").R.numpy()


__all__ = ["displacement_factor", "factor"]
