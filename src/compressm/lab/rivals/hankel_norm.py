"""Regularisation by the Hankel nuclear norm (Forgione, Mejari and Piga 2024, arXiv 2403.14833).

The sum of a layer's Hankel singular values, ``sum_i sigma_i = tr (P Q)^1/2``, is added to the loss, so that training
itself makes most of them small; the model is cut when training is over. Its derivative needs no derivative of an
eigenvalue problem: with the balancing transformation ``T`` (``P = T S T*``, ``Q = T^-* S T^-1``, ``S = diag(sigma)``),

    d tr (P Q)^1/2 = Re tr(X dP) + Re tr(Y dQ),      X = T^-* T^-1 / 2,      Y = T T* / 2.

One Cholesky factorisation and one Hermitian eigenproblem of order n give value and derivative. At zero the norm has a
kink, like every nuclear norm: values below ``FLOOR`` times the largest count as zero there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from compressm.errors import UnsupportedModelError
from compressm.layers.lru import LRU
from compressm.theory.systems import stein_solution

FLOOR = 1e-6
_RIDGE = 1e-13  # a share of the Gramian's diagonal; it lets the factorisation succeed in directions without energy


class _TraceOfRoot(torch.autograd.Function):
    """``tr (P Q)^1/2`` of two Hermitian positive matrices, complex128 of shape ``(n, n)``."""

    @staticmethod
    def forward(ctx: Any, P: Tensor, Q: Tensor) -> Tensor:
        factor = _factor(P)
        squares, vectors = torch.linalg.eigh(factor.mH @ Q @ factor)
        sigma = squares.clamp_min(0).sqrt()
        counted = sigma > FLOOR * sigma[-1]
        ctx.save_for_backward(Q, factor @ vectors[:, counted], sigma[counted])
        return sigma.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        Q, directions, sigma = cast("tuple[Tensor, Tensor, Tensor]", ctx.saved_tensors)
        T = directions * sigma.rsqrt()
        inverse = (Q @ directions) * sigma.pow(-1.5)  # T^-*
        half = 0.5 * grad_outputs[0]
        return half * (inverse @ inverse.mH), half * (T @ T.mH)


def _factor(P: Tensor) -> Tensor:
    """``L`` with ``L L* = P``, nearly."""
    diagonal = P.diagonal().real
    ridge = _RIDGE
    while True:
        factor, failed = torch.linalg.cholesky_ex(P + torch.diag(ridge * diagonal + torch.finfo(torch.float64).tiny))
        if int(failed) == 0 or ridge > 1:
            return factor
        ridge *= 10


def hankel_nuclear_norm(lam: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Sum of the Hankel singular values of ``y_k = C x_k``, ``x_k = diag(lam) x_{k-1} + B u_k``; differentiable.

    Args:
        lam: eigenvalues, shape ``(n,)``, complex, inside the unit disc.
        B: shape ``(n, p)``, complex.
        C: shape ``(q, n)``, complex.

    Returns:
        a scalar, float64. The computation is in double precision.
    """
    lam, B, C = (x.to(torch.complex128) for x in (lam, B, C))
    return cast("Tensor", _TraceOfRoot.apply(stein_solution(lam, B), stein_solution(lam.conj(), C.mH)))


def hankel_penalty(model: nn.Module) -> Tensor:
    """The sum of `hankel_nuclear_norm` over all `LRU` layers of a model, in the model's precision.

    Raises:
        UnsupportedModelError: there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, LRU)]
    if not layers:
        raise UnsupportedModelError("the Hankel nuclear norm is that of LRU layers, and this model has none")
    norms = []
    for layer in layers:
        log_radius, phase, B_re, B_im, C_re, C_im = layer.system()
        lam = torch.polar(log_radius.double().exp(), phase.double())
        B, C = torch.complex(B_re, B_im), torch.complex(C_re, C_im)
        norms.append(hankel_nuclear_norm(lam, B, C).to(layer.B_re.dtype))
    return torch.stack(norms).sum()


__all__ = ["FLOOR", "hankel_nuclear_norm", "hankel_penalty"]
