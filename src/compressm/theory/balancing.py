"""Gramians, Hankel singular values, and balanced truncation.

The method is the square-root method (Laub, Heath, Paige, Ward 1987; Antoulas 2005, chapter 7): with ``P = L_P L_P*``
and ``Q = L_Q L_Q*`` the Hankel singular values (HSVs) are the singular values of ``L_Q* L_P = U diag(sigma) V*``, and

    T_r = L_P V_r diag(sigma_r)^-1/2,     T_l = diag(sigma_r)^-1/2 U_r* L_Q*,     T_l T_r = I

cut the system to ``A_r = T_l A T_r``, ``B_r = T_l B``, ``C_r = C T_r`` with ``||G - G_r||_inf <= 2 sum_{i>r} sigma_i``.

*Real-part aware* (the default): a layer that outputs ``Re(C x)`` for real input is a real system of order 2n whose
state is ``(Re x, Im x)``. That system is balanced and cut in real arithmetic to order 2r; its modes come in conjugate
pairs, and each pair is one complex state again. The *complex* method, the CompreSSM paper's, balances ``C (I -
diag(lam)/z)^-1 B``, of which the layer discards the imaginary part, and so spends states on a signal that nobody reads.

Everything is written in the *stacked real* coordinates ``(Re x, Im x)``, so that one pair of matrices describes the
change of basis of both methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError, InvalidSystemError
from compressm.runtime.random_state import generator_from
from compressm.theory.certificate import Certificate, certify
from compressm.theory.factors import factor
from compressm.theory.systems import DiagonalSystem, stein_solution

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


@dataclass(frozen=True)
class Balancing:
    """A system with the factors that its truncation to any order is made of.

    Attributes:
        system: the system, shape ``(*batch,)``.
        method: ``"real"`` (order m = 2n) or ``"complex"`` (order m = n).
        hsv: Hankel singular values, decreasing, float64, shape ``(*batch, m)``.
        factor_P, factor_Q: ``L_P`` and ``L_Q``, shape ``(*batch, m, m)``.
        U, V: singular vectors of ``L_Q* L_P``, shape ``(*batch, m, m)``.
    """

    system: DiagonalSystem
    method: Method
    hsv: Tensor
    factor_P: Tensor
    factor_Q: Tensor
    U: Tensor
    V: Tensor

    @property
    def energy(self) -> Tensor:
        """Hankel energy per complex state, decreasing, shape ``(*batch, n)``.

        A complex state is two real ones: in the real method it carries two HSVs, and their sum is its energy. So
        keeping r states discards ``sum_{i>r} energy_i``, and twice that is the error bound, in both methods.
        """
        if self.method == "complex":
            return self.hsv
        return self.hsv.unflatten(-1, (-1, 2)).sum(-1)

    def rearranged(self, order: Literal["smallest", "random"]) -> Balancing:
        """The same, with the complex states in another order, for comparisons: truncation keeps the first.

        Any part of a balanced system is stable, and its error at most twice the sum of the HSVs that are missing: the
        diagonal of the kept HSVs still satisfies both Lyapunov inequalities. States whose HSVs are rounding noise stay
        last.

        Args:
            order: ``"smallest"`` HSVs first, or ``"random"``, by `generator_from` the HSVs.
        """
        pair = 2 if self.method == "real" else 1
        hsv = self.hsv.reshape(-1, self.hsv.shape[-1])
        indices = torch.arange(hsv.shape[-1]).expand_as(hsv).clone()
        for row, values in enumerate(hsv):
            count = _resolved(values) // pair
            ascending = torch.arange(count).flip(0)
            states = torch.randperm(count, generator=generator_from(values)) if order == "random" else ascending
            indices[row, : pair * count] = (pair * states[:, None] + torch.arange(pair)).reshape(-1)
        indices = indices.reshape(self.hsv.shape)

        def columns(vectors: Tensor) -> Tensor:
            return vectors.gather(-1, indices[..., None, :].expand_as(vectors))

        return replace(self, hsv=self.hsv.gather(-1, indices), U=columns(self.U), V=columns(self.V))


@dataclass(frozen=True)
class Reduction:
    """A reduced system, how its states depend on the old ones, and its certificate.

    Attributes:
        system: the reduced system, shape ``(*batch,)``, r states (systems of a batch with fewer are padded with states
            whose B and C are zero).
        left: ``(Re x', Im x') = left (Re x, Im x)``, float64, shape ``(*batch, 2r, 2n)``.
        right: the way back onto the kept subspace, shape ``(*batch, 2n, 2r)``; ``left @ right`` is the identity on
            states that are used.
        certificates: one per system of the batch, in row-major order.
    """

    system: DiagonalSystem
    left: Tensor
    right: Tensor
    certificates: tuple[Certificate, ...]

    @property
    def certificate(self) -> Certificate:
        """The certificate of the batch: the only one, or the one that failed, or the one with the largest error."""
        return max(self.certificates, key=lambda c: (not c.valid, c.hinf_error))

    @property
    def discarded(self) -> Tensor:
        """The Hankel energy that goes with what was cut off, half of the error bound: of each system, ``(*batch,)``."""
        bounds = torch.tensor([one.bound for one in self.certificates], dtype=torch.float64)
        return bounds.reshape(self.system.batch_shape) / 2

    def padded(self, states: int) -> Reduction:
        """The same system in as many states, if it has fewer: the others are seen by no output.

        They are copies of the first one but for that. So gradients reach what the output makes of them, and training
        can use them, which it could not if nothing reached them either.
        """
        system, r, idle = self.system, self.system.n, states - self.system.n
        if idle <= 0:
            return self
        rows = torch.tensor([*range(r), *[0] * idle])
        C = torch.cat([system.C, torch.zeros_like(system.C[..., :1]).expand(*system.C.shape[:-1], idle)], -1)
        wider = DiagonalSystem(system.lam[..., rows], system.B[..., rows, :], C, system.real_output)
        left = self.left[..., torch.cat([rows, rows + r]), :]
        n2, batch = left.shape[-1], system.batch_shape
        right = torch.nn.functional.pad(self.right.reshape(*batch, n2, 2, r), (0, idle)).reshape(*batch, n2, 2 * states)
        return Reduction(wider, left, right, self.certificates)

    def rescaled(self, factors: Tensor) -> Reduction:
        """The same system with states ``x'_i`` multiplied by ``factors_i > 0``, shape ``(*batch, r)``."""
        system = DiagonalSystem(
            self.system.lam,
            self.system.B * factors[..., :, None],
            self.system.C / factors[..., None, :],
            self.system.real_output,
        )
        both = torch.cat([factors, factors], -1)
        return replace(self, system=system, left=self.left * both[..., :, None], right=self.right / both[..., None, :])


def balance(system: DiagonalSystem, method: Method = "real") -> Balancing:
    """Hankel singular values and balancing factors of a system, or of each system of a batch.

    Args:
        system: the system; ``method="real"`` needs ``real_output``.
        method: ``"real"`` or ``"complex"``, see the module's text.

    Returns:
        the Hankel singular values, and what `truncate` needs.

    Raises:
        InvalidSystemError: the real method for a system with complex output, an unknown method, or Gramians that
            overflow.
    """
    if method not in ("real", "complex"):
        raise InvalidSystemError(f"method must be 'real' or 'complex'; got {method!r}")
    if method == "real" and not system.real_output:
        raise InvalidSystemError("method='real' needs a system with real output; use method='complex'")
    P, Q = real_gramians(system) if method == "real" else gramians(system)
    factor_P = factor(system.lam, system.B, P, method == "real")
    factor_Q = factor(system.lam.conj(), system.C.mH, Q, method == "real")
    U, hsv, Vh = torch.linalg.svd(factor_Q.mH @ factor_P)
    # Where modes cancel each other altogether (a real output that is identically zero), all values are rounding: of a
    # sum of terms of this size. They are then zero, so that no rule keeps states for them.
    noise = hsv.shape[-1] * torch.finfo(torch.float64).eps * system.mode_energy()
    hsv = torch.where(hsv[..., :1] > noise[..., None], hsv, 0.0)
    return Balancing(system, method, hsv, factor_P, factor_Q, U, Vh.mH)


def truncate(
    balancing: Balancing,
    states: int,
    exceed: bool = False,
    *,
    certifier: Callable[..., Certificate] = certify,
    lower: bool = True,
) -> Reduction:
    """Cut a balanced system to at most ``states`` complex states, diagonalise it, and certify the result.

    In the real method an isolated real eigenvalue takes a whole complex state, so that fewer than ``2 states`` real
    dimensions may fit. ``exceed=True`` keeps all ``2 states`` of them, and uses a state more where needed: for rules
    that promise an error rather than a size.

    The reduced states are scaled so that each is reached and seen equally well (``||B_i|| = ||C_i||``) and ordered by
    the largest gain of their mode; see `Reduction.rescaled`.

    Args:
        balancing: from `balance`.
        states: how many states to keep, at least 1.
        exceed: see above.
        certifier: checks every reduced system; takes the arguments of `certify`.
        lower: keep fewer states where the system of the asked size is not stable.

    Returns:
        the reduction; look at ``reduction.certificate.valid`` before using it.

    Raises:
        InvalidRankRuleError: fewer than one state asked for.
    """
    if states < 1:
        raise InvalidRankRuleError(f"states must be at least 1; got {states}")
    system, batch = balancing.system, balancing.system.batch_shape
    count = math.prod(batch)
    flat = [x.reshape(count, *x.shape[len(batch) :]) for x in (system.lam, system.B, system.C)]
    factors = (balancing.hsv, balancing.factor_P, balancing.factor_Q, balancing.U, balancing.V)
    parts = [x.reshape(count, *x.shape[len(batch) :]) for x in factors]
    singles: list[_Single] = []
    certificates: list[Certificate] = []
    for index in range(count):
        one = DiagonalSystem(flat[0][index], flat[1][index], flat[2][index], system.real_output)
        factored = (x[index] for x in parts)
        single = _truncate_one(one, balancing.method, *factored, states=states, exceed=exceed, lower=lower)
        singles.append(single)
        certificates.append(
            certifier(one, single.lam, single.B, single.C, single.bound, single.scale, single.condition)
        )
    width = max(single.lam.shape[0] for single in singles)
    padded = [single.padded(width) for single in singles]

    def stack(name: str) -> Tensor:
        values = torch.stack([getattr(single, name) for single in padded])
        return values.reshape(*batch, *values.shape[1:])

    # A reduction that failed its certificate may be unstable: it is reported, and must not become a DiagonalSystem.
    lam = stack("lam")
    if not bool((lam.abs() < 1).all()):
        lam = torch.where(lam.abs() < 1, lam, 0.0)
    reduced = DiagonalSystem(lam, stack("B"), stack("C"), system.real_output)
    return Reduction(reduced, stack("left"), stack("right"), tuple(certificates))


@dataclass(frozen=True)
class _Single:
    """One reduced system before it is known to be good. ``order`` of the balanced system was kept."""

    lam: Tensor  # (r,)
    B: Tensor  # (r, p)
    C: Tensor  # (q, r)
    left: Tensor  # (2r, 2n)
    right: Tensor  # (2n, 2r)
    bound: float
    scale: float  # what all states could contribute if none cancelled another, at least the sum of all HSVs
    condition: float

    def padded(self, width: int) -> _Single:
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


def _truncate_one(
    system: DiagonalSystem,
    method: Method,
    hsv: Tensor,
    factor_P: Tensor,
    factor_Q: Tensor,
    U: Tensor,
    V: Tensor,
    states: int,
    exceed: bool,
    lower: bool,
) -> _Single:
    per_state = 2 if method == "real" else 1
    most = min(per_state * states, _resolved(hsv))

    if most == 0:  # nothing reaches the output: one state that does nothing stands for the empty system
        n2 = 2 * system.n
        zeros = (torch.zeros(shape, dtype=torch.complex128) for shape in ((1,), (1, system.p), (system.q, 1)))
        empty = (torch.zeros(shape, dtype=torch.float64) for shape in ((2, n2), (n2, 2)))
        return _Single(*zeros, *empty, bound=0.0, scale=float(system.mode_energy()), condition=1.0)

    def attempt(order: int) -> tuple[Tensor, Tensor, Tensor, float]:
        half = hsv[:order].rsqrt()
        to_new = half[:, None] * (U[:, :order].mH @ factor_Q.mH)
        to_old = (factor_P @ V[:, :order]) * half
        return _diagonalise(system.lam, to_new, to_old, method)

    order, modes = most, attempt(most)
    if not exceed:
        over = order + 1
        while modes[0].shape[0] > states:
            # One real dimension less for each state too many is the best that fits, found in some attempts; where an
            # attempt takes long, twice as many nearly always fit at once.
            over = order
            order = max(1, order - (modes[0].shape[0] - states) * (1 if order <= 256 else 2))
            modes = attempt(order)
        while over - order > 1 and modes[0].shape[0] < 0.98 * states:  # twice as many were far too many
            middle = (order + over) // 2
            more = attempt(middle)
            if more[0].shape[0] <= states:
                order, modes = middle, more
            else:
                over = middle
        if modes[0].shape[0] < states and order < min(most, 257):
            more = attempt(order + 1)
            if more[0].shape[0] <= states:
                order, modes = order + 1, more
    while lower and order > 1 and not bool((modes[0].abs() < 1).all()):
        order -= 1  # equal HSVs on both sides of the cut leave a mode on the unit circle
        modes = attempt(order)
    lam, left, right, condition = modes
    r = lam.shape[0]
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
    return _Single(
        lam[keep],
        B[keep] * scale[:, None],
        C[:, keep] / scale,
        left[rows] * both[:, None],
        right[:, rows] / both,
        bound=2 * float(hsv[order:].sum()),
        scale=float(system.mode_energy()),
        condition=condition,
    )


def _resolved(hsv: Tensor) -> int:
    """How many HSVs are above the precision with which they are known: the others are nothing but rounding noise."""
    return int((hsv > hsv.max() * hsv.shape[0] * torch.finfo(torch.float64).eps).sum())


def _diagonalise(lam: Tensor, to_new: Tensor, to_old: Tensor, method: Method) -> tuple[Tensor, Tensor, Tensor, float]:
    """Modes of ``to_new diag(lam) to_old`` as complex states.

    Returns:
        the eigenvalues kept, shape ``(r,)``; ``left`` and ``right`` in stacked real coordinates (see `Reduction`),
        and the condition number of the eigenvectors. In the real method one eigenvalue of each conjugate pair is
        kept, the one with positive phase.
    """
    if method == "complex":
        eigenvalues, vectors = torch.linalg.eig(to_new @ (lam[:, None] * to_old))
        left = torch.linalg.solve(vectors, to_new)
        right = to_old @ vectors
        return eigenvalues, _stacked(left), _stacked(right), _condition(vectors)

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
    return torch.cat([eigenvalues[pairs], eigenvalues[reals]]), left, right, _condition(basis)


def _stacked(matrix: Tensor) -> Tensor:
    """A complex linear map in stacked real coordinates: ``[[Re, -Im], [Im, Re]]``."""
    return torch.cat([torch.cat([matrix.real, -matrix.imag], 1), torch.cat([matrix.imag, matrix.real], 1)])


def _condition(basis: Tensor) -> float:
    values = torch.linalg.svdvals(basis)
    return float(values[0] / values[-1]) if float(values[-1]) > 0 else math.inf
