"""Coordinates in which a state loses least when it is rounded to few bits.

The entries of a state that share a scale are rounded with errors of one size: about the largest of them over the
number of levels. Rounding then costs least when no entry is much larger than the others, and when the output reads all
of them alike. Take noise of covariance ``sigma^2 I`` in the coordinates ``T h``, where sigma^2 is proportional to the
mean power ``tr(T P T^T) / n`` of the entries. The error of the output is then proportional to

    tr(T P T^T) tr(T^-T W T^-1) >= (sum_i s_i)^2

with equality in balanced coordinates, where s are the singular values of ``L_W^T L_P`` (Cauchy and Schwarz). Rotations
leave both traces alone, so the delta rule gains only what equal entries gain; linear attention may use any T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.theory.ordering import balanced_coordinates


def equalising_rotation(moment: Tensor, seed: int = 0) -> Tensor:
    """A rotation Q after which all entries have the same power: ``diag(Q P Q^T) = tr(P) / n``.

    A random rotation first mixes all entries, so that single ones seldom stand out. At most n - 1 plane rotations then
    make the diagonal equal, each between the smallest and the largest entry (Bendel and Mickey 1978).

    Args:
        moment: P, symmetric positive semidefinite, float64, shape ``(n, n)``.
        seed: of the random rotation.

    Returns:
        shape ``(n, n)``, orthogonal.
    """
    n = moment.shape[0]
    draw = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(draw).Q
    P = Q @ ((moment + moment.mT) / 2) @ Q.mT
    mean = P.trace() / n
    for _ in range(n - 1):
        i, j = int(P.diagonal().argmin()), int(P.diagonal().argmax())
        low, high, across = float(P[i, i] - mean), float(P[j, j] - mean), float(P[i, j])
        if high <= 1e-13 * float(mean.abs()) or low >= 0:
            break
        t = (-across + (across**2 - low * high) ** 0.5) / high  # the tangent after which entry i has the mean power
        cosine = (1 + t * t) ** -0.5
        plane = torch.tensor([[cosine, t * cosine], [-t * cosine, cosine]], dtype=torch.float64)
        rows = [i, j]
        Q[rows] = plane @ Q[rows]
        P[rows] = plane @ P[rows]
        P[:, rows] = P[:, rows] @ plane.mT
    return Q


def equal_coordinates(P: Tensor, W: Tensor, any_basis: bool) -> tuple[Tensor, Tensor]:
    """The coordinates ``h' = into h`` and ``C' = out C`` that lose least by rounding; see the module's text.

    Args:
        P, W: moments of states and output vectors, float64, shape ``(groups, n, n)``.
        any_basis: whether any change of basis is possible; otherwise rotations only.

    Returns:
        ``into`` and ``out``, with ``out^T into = I``, shape ``(groups, n, n)``.
    """
    if not any_basis:
        Q = torch.stack([equalising_rotation(one) for one in P])
        return Q, Q
    T = balanced_coordinates(P, W)
    Q = torch.stack([equalising_rotation(one) for one in T @ P @ T.mT])
    into = Q @ T
    return into, torch.linalg.inv(into).mT


__all__ = ["equal_coordinates", "equalising_rotation"]
