"""Truncation of one balanced system: its order, its modes and their scale. `balancing.truncate` truncates a batch.

In the real method the number of complex states of a truncated system is known only after its diagonalisation: each
conjugate pair is one state, and each real eigenvalue that has no partner is another. So orders are found by trial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressm.theory.gramians import Method
from compressm.theory.systems import DiagonalSystem


@dataclass(frozen=True)
class Factors:
    """One system with the factors of its truncation to any order; see `balancing.Balancing`.

    Attributes:
        system: without batch dimensions.
        method: ``"real"`` (order m = 2n) or ``"complex"`` (order m = n).
        hsv: Hankel singular values, in the order in which states are kept, shape ``(m,)``.
        factor_P, factor_Q, U, V: shape ``(m, m)``.
    """

    system: DiagonalSystem
    method: Method
    hsv: Tensor
    factor_P: Tensor
    factor_Q: Tensor
    U: Tensor
    V: Tensor

    def modes(self, order: int) -> Modes:
        """The modes of the system truncated to its first ``order`` balanced dimensions."""
        half = self.hsv[:order].rsqrt()
        to_new = half[:, None] * (self.U[:, :order].mH @ self.factor_Q.mH)
        to_old = (self.factor_P @ self.V[:, :order]) * half
        return diagonalise(self.system.lam, to_new, to_old, self.method)


@dataclass(frozen=True)
class Modes:
    """The complex states of a truncated system, in any scale.

    Attributes:
        lam: eigenvalues, shape ``(r,)``.
        left, right: in stacked real coordinates (see `Reduction`), shapes ``(2r, 2n)`` and ``(2n, 2r)``.
        condition: condition number of the eigenvectors.
    """

    lam: Tensor
    left: Tensor
    right: Tensor
    condition: float

    @property
    def count(self) -> int:
        """Number of complex states."""
        return self.lam.shape[0]

    @property
    def stable(self) -> bool:
        """Whether all eigenvalues are inside the unit circle."""
        return bool((self.lam.abs() < 1).all())


@dataclass(frozen=True)
class Single:
    """One reduced system that has not been certified yet.

    Attributes:
        lam, B, C: of the reduced system, shapes ``(r,)``, ``(r, p)`` and ``(q, r)``.
        left, right: see `Reduction`, shapes ``(2r, 2n)`` and ``(2n, 2r)``.
        bound: twice the sum of the discarded HSVs.
        scale: `DiagonalSystem.mode_energy`, at least the sum of all HSVs.
        condition: condition number of the eigenvectors that diagonalised it.
    """

    lam: Tensor
    B: Tensor
    C: Tensor
    left: Tensor
    right: Tensor
    bound: float
    scale: float
    condition: float

    def padded(self, width: int) -> Single:
        """The same system with ``width`` states. The added ones have zero eigenvalues, B and C."""
        extra = width - self.lam.shape[0]
        if extra == 0:
            return self
        pad = torch.nn.functional.pad
        n2, r = self.left.shape[-1], self.lam.shape[0]
        left = pad(self.left.reshape(2, r, n2), (0, 0, 0, extra)).reshape(2 * width, n2)
        right = pad(self.right.reshape(n2, 2, r), (0, extra)).reshape(n2, 2 * width)
        return replace(
            self, lam=pad(self.lam, (0, extra)), B=pad(self.B, (0, 0, 0, extra)), C=pad(self.C, (0, extra)),
            left=left, right=right,
        )  # fmt: skip


def truncate_one(balanced: Factors, states: int, exceed: bool, lower: bool) -> Single:
    """Cut one balanced system; see `balancing.truncate` for the arguments."""
    most = min((2 if balanced.method == "real" else 1) * states, resolved(balanced.hsv))
    if most == 0:
        return _empty(balanced.system)
    order, modes = (most, balanced.modes(most)) if exceed else _largest_order(balanced, most, states)
    if lower:
        order, modes = _stable_order(balanced, order, modes)
    return _reduced(balanced.system, modes, bound=2 * float(balanced.hsv[order:].sum()))


def truncate_to_order(balanced: Factors, order: int) -> Single:
    """Cut one balanced system to its first ``order`` balanced dimensions, however many complex states that makes."""
    return _reduced(balanced.system, balanced.modes(order), bound=2 * float(balanced.hsv[order:].sum()))


def resolved(hsv: Tensor) -> int:
    """Number of HSVs that are above the rounding noise."""
    return int((hsv > hsv.max() * hsv.shape[0] * torch.finfo(torch.float64).eps).sum())


def _empty(system: DiagonalSystem) -> Single:
    """A system whose output is always zero, as one state with B = C = 0."""
    n2 = 2 * system.n
    zeros = (torch.zeros(shape, dtype=torch.complex128) for shape in ((1,), (1, system.p), (system.q, 1)))
    empty = (torch.zeros(shape, dtype=torch.float64) for shape in ((2, n2), (n2, 2)))
    return Single(*zeros, *empty, bound=0.0, scale=float(system.mode_energy()), condition=1.0)


def _largest_order(balanced: Factors, most: int, states: int) -> tuple[int, Modes]:
    """An order up to ``most`` whose modes fit in ``states`` complex states, and these modes.

    It is the largest such order, or close to it."""
    order, over, modes = most, most + 1, balanced.modes(most)
    while modes.count > states:
        # Dropping one real dimension per surplus state finds the largest order that fits, in several attempts. Where an
        # attempt is slow, drop two per surplus state: that nearly always fits at once.
        over = order
        order = max(1, order - (modes.count - states) * (1 if order <= 256 else 2))
        modes = balanced.modes(order)
    while over - order > 1 and modes.count < 0.98 * states:  # twice as many were far too many
        middle = (order + over) // 2
        more = balanced.modes(middle)
        if more.count <= states:
            order, modes = middle, more
        else:
            over = middle
    if modes.count < states and order < min(most, 257):
        more = balanced.modes(order + 1)
        if more.count <= states:
            order, modes = order + 1, more
    return order, modes


def _stable_order(balanced: Factors, order: int, modes: Modes) -> tuple[int, Modes]:
    """The order and modes, or those of a lower order that is stable.

    Equal HSVs on both sides of a cut leave a mode on the unit circle."""
    while order > 1 and not modes.stable:
        order -= 1
        modes = balanced.modes(order)
    return order, modes


def _reduced(system: DiagonalSystem, modes: Modes, bound: float) -> Single:
    """The system with these modes, scaled to ``||B_i|| = ||C_i||`` and ordered by decreasing gain."""
    lam, left, right, r = modes.lam, modes.left, modes.right, modes.count
    stacked_B = left @ torch.cat([system.B.real, system.B.imag])
    stacked_C = torch.cat([system.C.real, -system.C.imag], 1) @ right
    B = torch.complex(stacked_B[:r], stacked_B[r:])
    C = torch.complex(stacked_C[:, :r], -stacked_C[:, r:])
    norm_B, norm_C = B.norm(dim=1), C.norm(dim=0)
    gain = norm_B * norm_C / (1 - lam.abs()).clamp_min(1e-300)
    keep = torch.argsort(gain, descending=True, stable=True)
    scale = torch.where((norm_B > 0) & (norm_C > 0), (norm_C / norm_B).sqrt(), 1.0)
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)[keep]
    rows = torch.cat([keep, keep + r])
    both = torch.cat([scale, scale])
    return Single(
        lam[keep],
        B[keep] * scale[:, None],
        C[:, keep] / scale,
        left[rows] * both[:, None],
        right[:, rows] / both,
        bound=bound,
        scale=float(system.mode_energy()),
        condition=modes.condition,
    )


def diagonalise(lam: Tensor, to_new: Tensor, to_old: Tensor, method: Method) -> Modes:
    """Modes of ``to_new diag(lam) to_old`` as complex states.

    In the real method one eigenvalue of each conjugate pair is kept, the one with positive phase.

    Args:
        lam: eigenvalues of the system, shape ``(n,)``.
        to_new, to_old: ``T_l`` and ``T_r``, shapes ``(order, m)`` and ``(m, order)``.
        method: ``"complex"``: ``m = n``; ``"real"``: the matrices are in stacked real coordinates, ``m = 2n``.
    """
    if method == "complex":
        eigenvalues, vectors = torch.linalg.eig(to_new @ (lam[:, None] * to_old))
        left = torch.linalg.solve(vectors, to_new)
        right = to_old @ vectors
        return Modes(eigenvalues, _stacked(left), _stacked(right), _condition(vectors))

    n = lam.shape[0]
    re, im = lam.real[:, None], lam.imag[:, None]
    rotated = torch.cat([re * to_old[:n] - im * to_old[n:], im * to_old[:n] + re * to_old[n:]])
    eigenvalues, vectors = torch.linalg.eig(to_new @ rotated)
    pairs = torch.nonzero(eigenvalues.imag > 0).squeeze(1)  # LAPACK returns exact conjugate pairs for real matrices
    reals = torch.nonzero(eigenvalues.imag == 0).squeeze(1)
    # A pair w, conj(w) spans the real plane of sqrt(2) (Re w, -Im w); this real basis has the condition of the
    # complex one.
    root = math.sqrt(2.0)
    basis = torch.cat([root * vectors[:, pairs].real, vectors[:, reals].real, -root * vectors[:, pairs].imag], 1)
    k, r = pairs.shape[0], pairs.shape[0] + reals.shape[0]
    left = torch.zeros(2 * r, to_new.shape[1], dtype=torch.float64)
    right = torch.zeros(to_old.shape[0], 2 * r, dtype=torch.float64)
    used = torch.cat([torch.arange(r), torch.arange(r, r + k)])
    left[used] = torch.linalg.solve(basis, to_new)
    right[:, used] = to_old @ basis
    return Modes(torch.cat([eigenvalues[pairs], eigenvalues[reals]]), left, right, _condition(basis))


def _stacked(matrix: Tensor) -> Tensor:
    """A complex linear map in stacked real coordinates: ``[[Re, -Im], [Im, Re]]``."""
    return torch.cat([torch.cat([matrix.real, -matrix.imag], 1), torch.cat([matrix.imag, matrix.real], 1)])


def _condition(basis: Tensor) -> float:
    values = torch.linalg.svdvals(basis)
    return float(values[0] / values[-1]) if float(values[-1]) > 0 else math.inf


__all__ = ["Factors", "Modes", "Single", "diagonalise", "resolved", "truncate_one", "truncate_to_order"]
