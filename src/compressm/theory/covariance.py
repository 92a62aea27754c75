"""Balanced truncation by second moments of the states and adjoint states on data.

Covariance balancing (Otto, Padovan, Rowley, SIAM J. Sci. Comput. 2023, arXiv 2207.14387): the square-root method with
``P = E[x x^T]`` and ``Q = E[lambda lambda^T]`` of `evidence` in place of the Gramians. The singular values sigma of
``L_Q^T L_P`` do not depend on the basis of the states, and are in units of the loss. If the adjoints are Fisher scores,
the Kullback-Leibler divergence of the reduced model's predictions from the original's is estimated as

    1/2 L tr(Q (I - T_r T_l) P (I - T_r T_l)^T) = 1/2 L sum_{i>r} sigma_i^2     nats per sequence of L tokens

The estimate counts the error of every token with all its later effects, as if the errors of different tokens were
independent. But the removed states have memory, so errors of consecutive tokens overlap: for a single mode ``a`` under
white noise on both sides, the estimate is ``1 / (1 - |a|^2)`` times too large. Use it to order states;
`observing.damage` predicts the damage itself.

*Stability.* White noise Gramians satisfy ``P - A P A^T >= 0``, which makes every balanced truncation stable. Moments of
data need not satisfy it. They are used unchanged if the truncation is stable. If it is not, one of P and Q, the one
that changes less, is replaced by a matrix that dominates it: the solution of its Stein equation with the positive part
of ``P - A P A^T`` on the right (Wang, Sreeram, Liu, IEEE TAC 1999). Replacing one is enough (Enns 1984): with ``S =
diag(sigma)``, the leading block of ``S - A S A^T >= 0`` implies that no eigenvalue of ``A_r`` is outside the unit
circle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compressm.errors import InvalidSystemError
from compressm.theory.balancing import Balancing, Reduction, truncate
from compressm.theory.certificate import Certificate, certify
from compressm.theory.evidence import Covariances, check_evidence, shrunk
from compressm.theory.gramians import real_gramians
from compressm.theory.systems import DiagonalSystem

Fallback = Literal["none", "states", "adjoints", "both"]

# Share of the largest eigenvalue below which float32 sums over data resolve nothing, for states of unit variance.
CLIP = 1e-12


@dataclass(frozen=True)
class CovarianceBalancing(Balancing):
    """A system balanced by moments of data; see the module's text.

    Attributes:
        P, Q: the moments that it was balanced with, shape ``(*batch, 2n, 2n)``.
        evidence: the observed moments, before shrinkage and fallback.
        alpha_P, alpha_Q: shares of white noise in P and Q, shape ``(*batch,)``.
        fallbacks: which of P and Q was replaced for stability, one per system in row-major order.
    """

    P: Tensor
    Q: Tensor
    evidence: Covariances
    alpha_P: Tensor
    alpha_Q: Tensor
    fallbacks: tuple[Fallback, ...]

    def truncated(self, states: int, exceed: bool = False) -> Reduction:
        """Cut to at most ``states`` complex states; see `truncate_covariances`."""
        return truncate_covariances(self, states, exceed)

    def state(self) -> Any:
        """The system's ``lam``, ``B`` and ``C``, and the moments."""
        return {"system": super().state(), "evidence": self.evidence.tensors()}

    @property
    def damage(self) -> Tensor:
        """Estimated rise of a sequence's loss if one complex state is removed, in nats, decreasing, shape ``(*batch,
        n)``; see the module's text. The damage of a cut is the sum over the states that it removes."""
        return self.evidence.length / 2 * self.hsv.square().unflatten(-1, (-1, 2)).sum(-1)


@dataclass(frozen=True)
class CovarianceCertificate(Certificate):
    """The certificate of a cut by moments of data. It has no H-infinity bound: ``bound`` is infinite.

    Attributes:
        predicted_damage: estimate of the rise of a sequence's loss, in nats; see the module's text.
        relative_output_error: ``E||y - y_r||^2 / E||y||^2`` that the projection of the states predicts.
        fallback: which moments were replaced by dominating ones for stability: ``"none"``, ``"states"`` (P),
            ``"adjoints"`` (Q) or ``"both"``.
        alpha_P, alpha_Q: shares of white noise in the moments.
        discarded_energy: sum of the discarded singular values.
    """

    predicted_damage: float = math.nan
    relative_output_error: float = math.nan
    fallback: Fallback = "none"
    alpha_P: float = 0.0
    alpha_Q: float = 0.0
    discarded_energy: float = math.nan

    @property
    def discarded(self) -> float:
        """Hankel energy that the cut discards, in units of the loss."""
        return self.discarded_energy

    def errors(self) -> tuple[float, float | None, float | None]:
        """The predicted relative error on the data, and the H-infinity error, which has no bound."""
        return math.sqrt(self.relative_output_error), self.hinf_error, None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {**super().to_dict(), "bound": None}


def balance_covariances(
    system: DiagonalSystem, evidence: Covariances, alpha: float | None = None
) -> CovarianceBalancing:
    """Hankel singular values in units of the loss, and balancing factors.

    Args:
        system: a system with real output, or a batch of them.
        evidence: moments of its states and adjoint states.
        alpha: share of white noise, in [0, 1]; by default computed from the evidence, see `evidence.shrunk`.

    Raises:
        InvalidSystemError: a system with complex output, moments that do not fit the system, or an ``alpha`` out of
            range.
    """
    if not system.real_output:
        raise InvalidSystemError("balancing by moments of data needs a system with real output; got complex output")
    if alpha is not None and not 0 <= alpha <= 1:
        raise InvalidSystemError(f"alpha must be a share in [0, 1]; got {alpha!r}")
    check_evidence(system, evidence)
    P, Q, alpha_P, alpha_Q = shrunk(system, evidence, alpha)
    none: tuple[Fallback, ...] = ("none",) * math.prod(system.batch_shape)
    return _balanced(system, P, Q, evidence, alpha_P, alpha_Q, none)


def truncate_covariances(
    balancing: CovarianceBalancing, states: int, exceed: bool = False, *, quick: bool = False
) -> Reduction:
    """Cut to at most ``states`` complex states; see `balancing.truncate`, and the module's text for stability.

    Args:
        balancing: from `balance_covariances`.
        states, exceed: as for `balancing.truncate`.
        quick: leave the errors under white noise out of the certificates; for trial cuts.

    Returns:
        the reduction, with certificates of the kind `CovarianceCertificate`.

    Raises:
        InvalidRankRuleError: fewer than one state asked for.
    """
    certifier = _stability if quick else _facts
    reduction = truncate(balancing, states, exceed, certifier=certifier, lower=False)
    if unstable := _unstable(reduction):
        balancing = _dominated(balancing, unstable)
        reduction = truncate(balancing, states, exceed, certifier=certifier, lower=False)
    if unstable := _unstable(reduction):
        # An eigenvalue is on the unit circle, up to rounding: sigma is equal on both sides of the cut, or no input
        # reaches a state.
        balancing = _dominated(balancing, unstable, both=True)
        reduction = truncate(balancing, states, exceed, certifier=certifier)
    return _certified(balancing, reduction)


def predicted_damage(evidence: Covariances, left: Tensor, right: Tensor) -> Tensor:
    """``1/2 L tr(Q (I - right left) P (I - right left)^T)``, in nats per sequence, of any projection of the states.

    Args:
        evidence: moments of the layer.
        left, right: as in `Reduction`, shapes ``(*batch, 2r, 2n)`` and ``(*batch, 2n, 2r)``.

    Returns:
        shape ``(*batch,)``; the damages of a layer's systems add up.
    """
    return evidence.length / 2 * (evidence.Q * _lost(evidence.P, left, right)).sum((-2, -1)).clamp_min(0)


def _lost(P: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``(I - right left) P (I - right left)^T``, the second moment of the part of the states that a cut removes."""
    gone = torch.eye(left.shape[-1], dtype=torch.float64) - right @ left
    return gone @ P @ gone.mT


def dominating(lam: Tensor, P: Tensor) -> Tensor:
    """The solution of ``X = A X A^T + M_+``, with ``M_+`` the positive part of ``P - A P A^T``; then ``X >= P``.

    Args:
        lam: eigenvalues of A, shape ``(n,)``; their conjugates for the adjoint equation.
        P: symmetric, in stacked real coordinates, shape ``(2n, 2n)``.
    """
    n = lam.shape[0]
    rotation = torch.cat(
        [
            torch.cat([torch.diag(lam.real), -torch.diag(lam.imag)], 1),
            torch.cat([torch.diag(lam.imag), torch.diag(lam.real)], 1),
        ]
    )
    values, vectors = torch.linalg.eigh(P - rotation @ P @ rotation.mT)
    inputs = vectors * values.clamp_min(0).sqrt()
    driven = DiagonalSystem(lam.resolve_conj(), torch.complex(inputs[:n], inputs[n:]), torch.ones(1, n))
    return real_gramians(driven)[0]


def _balanced(
    system: DiagonalSystem,
    P: Tensor,
    Q: Tensor,
    evidence: Covariances,
    alpha_P: Tensor,
    alpha_Q: Tensor,
    fallbacks: tuple[Fallback, ...],
) -> CovarianceBalancing:
    factor_P, factor_Q = _factor(P), _factor(Q)
    U, hsv, Vh = torch.linalg.svd(factor_Q.mT @ factor_P)
    factors = (hsv, factor_P, factor_Q, U, Vh.mT)
    return CovarianceBalancing(system, "real", *factors, P, Q, evidence, alpha_P, alpha_Q, fallbacks)


def _factor(moment: Tensor) -> Tensor:
    """``L`` with ``L L^T = moment``, by eigenvectors; relative eigenvalues below `CLIP` count as zero."""
    scale = moment.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    safe = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(moment / safe[..., :, None] / safe[..., None, :])
    values = torch.where(values > CLIP * values[..., -1:], values, 0.0)
    return scale[..., :, None] * vectors * values.clamp_min(0).sqrt()[..., None, :]


def _dominated(balancing: CovarianceBalancing, unstable: Sequence[int], both: bool = False) -> CovarianceBalancing:
    """Balance again, with P or Q of the unstable systems replaced by a matrix that dominates it."""
    system, m = balancing.system, balancing.P.shape[-1]
    P, Q = balancing.P.reshape(-1, m, m).clone(), balancing.Q.reshape(-1, m, m).clone()
    lam, fallbacks = system.lam.reshape(-1, system.n), list(balancing.fallbacks)
    for index in unstable:
        states, adjoints = dominating(lam[index], P[index]), dominating(lam[index].conj(), Q[index])
        less = bool((Q[index] * states).sum() <= (adjoints * P[index]).sum())  # of tr(Q P)
        if both or less:
            P[index] = states
        if both or not less:
            Q[index] = adjoints
        fallbacks[index] = "both" if both else "states" if less else "adjoints"
    P, Q = P.reshape(balancing.P.shape), Q.reshape(balancing.Q.shape)
    return _balanced(system, P, Q, balancing.evidence, balancing.alpha_P, balancing.alpha_Q, tuple(fallbacks))


def _facts(
    system: DiagonalSystem, lam: Tensor, B: Tensor, C: Tensor, bound: float, scale: float, condition: float
) -> Certificate:
    """Stability, conditioning, and the errors under white noise, which have no bound here."""
    facts = certify(system, lam, B, C, math.inf, scale, condition)
    return CovarianceCertificate(**vars(facts), discarded_energy=bound / 2)


def _stability(
    system: DiagonalSystem, lam: Tensor, B: Tensor, C: Tensor, bound: float, scale: float, condition: float
) -> Certificate:
    """Stability and conditioning alone."""
    del C, B, scale
    radius, unknown = float(lam.abs().max()), math.nan
    failures = () if radius < 1 else (f"the reduced system is unstable: spectral radius {radius:.9g}",)
    errors = (math.inf, unknown, unknown, unknown, unknown)
    facts = Certificate(system.n, lam.shape[0], *errors, radius, condition, failures=failures)
    return CovarianceCertificate(**vars(facts), discarded_energy=bound / 2)


def _unstable(reduction: Reduction) -> list[int]:
    return [index for index, one in enumerate(reduction.certificates) if not one.spectral_radius < 1]


def _certified(balancing: CovarianceBalancing, reduction: Reduction) -> Reduction:
    """The reduction with certificates that add the errors predicted from the evidence."""
    evidence, C = balancing.evidence, balancing.system.C
    stacked_C = torch.cat([C.real, -C.imag], -1)
    seen = stacked_C.mT @ stacked_C
    lost = _lost(evidence.P, reduction.left, reduction.right)
    error = (seen * lost).sum((-2, -1)) / (seen * evidence.P).sum((-2, -1)).clamp_min(1e-300)
    damage = predicted_damage(evidence, reduction.left, reduction.right)
    columns = (damage, error, balancing.alpha_P, balancing.alpha_Q)
    rows = zip(*(column.reshape(-1).tolist() for column in columns), strict=True)
    added = [
        {"fallback": fallback, **dict(zip(_ADDED, row, strict=True))}
        for fallback, row in zip(balancing.fallbacks, rows, strict=True)
    ]
    certificates = tuple(
        replace(one, **facts)  # of the kind CovarianceCertificate, from `_facts` or `_stability`
        for one, facts in zip(reduction.certificates, added, strict=True)
    )
    return replace(reduction, certificates=certificates)


_ADDED = ("predicted_damage", "relative_output_error", "alpha_P", "alpha_Q")


__all__ = [
    "CovarianceBalancing",
    "CovarianceCertificate",
    "balance_covariances",
    "dominating",
    "predicted_damage",
    "truncate_covariances",
]
