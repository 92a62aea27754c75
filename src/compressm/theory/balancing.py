"""Gramians, Hankel singular values, and balanced truncation.

The method is the square-root method (Laub, Heath, Paige, Ward 1987; Antoulas 2005, chapter 7): with ``P = L_P L_P*``
and ``Q = L_Q L_Q*`` the Hankel singular values (HSVs) are the singular values of ``L_Q* L_P = U diag(sigma) V*``, and

    T_r = L_P V_r diag(sigma_r)^-1/2,     T_l = diag(sigma_r)^-1/2 U_r* L_Q*,     T_l T_r = I

cut the system to ``A_r = T_l A T_r``, ``B_r = T_l B``, ``C_r = C T_r`` with ``||G - G_r||_inf <= 2 sum_{i>r} sigma_i``.

*Real-part aware* (the default): a layer that outputs ``Re(C x)`` for real input is a real system of order 2n whose
state is ``(Re x, Im x)``. This method balances that system and cuts it in real arithmetic to order 2r. The modes of the
result come in conjugate pairs, and each pair is one complex state. The *complex* method, the CompreSSM paper's,
balances ``C (I - diag(lam)/z)^-1 B``. It spends states on the imaginary part of that output, which the layer discards.

Both methods describe their change of basis by matrices in the *stacked real* coordinates ``(Re x, Im x)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError, InvalidSystemError
from compressm.runtime.random_state import generator_from
from compressm.theory.balanced import Balanced, hankel_operator
from compressm.theory.certificate import Certificate, certify
from compressm.theory.factors import factor
from compressm.theory.gramians import Method, gramians, real_gramians
from compressm.theory.systems import DiagonalSystem
from compressm.theory.truncation import Factors, resolved, truncate_one


@dataclass(frozen=True)
class Balancing(Balanced):
    """A system with the factors from which `truncate` computes a truncation to any order.

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

        In the real method a complex state is two real ones and has two HSVs; its energy is their sum. In both methods a
        cut to r states discards ``sum_{i>r} energy_i``, and the error bound is twice that.
        """
        if self.method == "complex":
            return self.hsv
        return self.hsv.unflatten(-1, (-1, 2)).sum(-1)

    def hankel_operator(self) -> Tensor:
        """``(P^1/2 Q P^1/2)^1/2`` in the layer's own coordinates, shape ``(*batch, m, m)``."""
        return hankel_operator(self.factor_P @ self.factor_P.mH, self.factor_Q)

    def state(self) -> Any:
        """The system's ``lam``, ``B`` and ``C``."""
        return [self.system.lam, self.system.B, self.system.C]

    def singles(self) -> Iterator[Factors]:
        """The systems of the batch, one by one, in row-major order."""
        system, batch = self.system, self.system.batch_shape
        tensors = (system.lam, system.B, system.C, self.hsv, self.factor_P, self.factor_Q, self.U, self.V)
        flat = (x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in tensors)
        for lam, B, C, *factors in zip(*flat, strict=True):
            yield Factors(DiagonalSystem(lam, B, C, system.real_output), self.method, *factors)

    def truncated(self, states: int, exceed: bool = False) -> Reduction:
        """Cut to at most ``states`` complex states; see `truncate`."""
        return truncate(self, states, exceed)

    def rearranged(self, order: Literal["smallest", "random"]) -> Balancing:
        """A copy with the complex states in another order, for comparisons. `truncate` keeps the first states.

        Every subsystem of a balanced system is stable, and its error is at most twice the sum of the removed HSVs,
        since the diagonal matrix of the kept HSVs satisfies both Lyapunov inequalities. States whose HSVs are rounding
        noise stay last.

        Args:
            order: ``"smallest"`` HSVs first, or ``"random"``, by `generator_from` the HSVs.
        """
        pair = 2 if self.method == "real" else 1
        hsv = self.hsv.reshape(-1, self.hsv.shape[-1])
        indices = torch.arange(hsv.shape[-1]).expand_as(hsv).clone()
        for row, values in enumerate(hsv):
            count = resolved(values) // pair
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
        right: maps the reduced states back into the kept subspace, shape ``(*batch, 2n, 2r)``; ``left @ right`` is the
            identity on states that are used.
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
        """Hankel energy that the cut discards from each system, shape ``(*batch,)``."""
        discarded = torch.tensor([one.discarded for one in self.certificates], dtype=torch.float64)
        return discarded.reshape(self.system.batch_shape)

    def padded(self, states: int) -> Reduction:
        """The same system with ``states`` states, if it has fewer.

        Each added state is a copy of the first one with a column of zeros in C. Inputs reach it, so the gradient of
        that column is not zero, and training can put the state to use. With B zero too it could not.
        """
        system, r, idle = self.system, self.system.n, states - self.system.n
        if idle <= 0:
            return self
        rows = torch.tensor([*range(r), *[0] * idle])
        C = torch.cat([system.C, torch.zeros_like(system.C[..., :1]).expand(*system.C.shape[:-1], idle)], -1)
        wider = replace(system, lam=system.lam[..., rows], B=system.B[..., rows, :], C=C)
        left = self.left[..., torch.cat([rows, rows + r]), :]
        n2, batch = left.shape[-1], system.batch_shape
        right = torch.nn.functional.pad(self.right.reshape(*batch, n2, 2, r), (0, idle)).reshape(*batch, n2, 2 * states)
        return Reduction(wider, left, right, self.certificates)

    def rescaled(self, factors: Tensor) -> Reduction:
        """The same system with states ``x'_i`` multiplied by ``factors_i > 0``, shape ``(*batch, r)``."""
        system = replace(self.system, B=self.system.B * factors[..., :, None], C=self.system.C / factors[..., None, :])
        both = torch.cat([factors, factors], -1)
        return replace(self, system=system, left=self.left * both[..., :, None], right=self.right / both[..., None, :])


def balance(system: DiagonalSystem, method: Method = "real") -> Balancing:
    """Hankel singular values and balancing factors of a system, or of each system of a batch.

    Args:
        system: the system; ``method="real"`` needs ``real_output``.
        method: ``"real"`` or ``"complex"``, see the module's text.

    Returns:
        the Hankel singular values and the factors, for `truncate`.

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
    # Where modes cancel completely (a real output that is identically zero), all computed values are rounding errors
    # of sums of this size. They are set to zero, so that no rule keeps states for them.
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

    In the real method an isolated real eigenvalue takes a whole complex state, so fewer than ``2 states`` real
    dimensions may fit. ``exceed=True`` keeps all ``2 states`` dimensions and adds states where needed; rules that
    promise an error instead of a size use it.

    The reduced states are scaled to ``||B_i|| = ||C_i||`` and ordered by the largest gain of their mode; see
    `Reduction.rescaled`.

    Args:
        balancing: from `balance`.
        states: how many states to keep, at least 1.
        exceed: see above.
        certifier: checks every reduced system; takes the arguments of `certify`.
        lower: keep fewer states where the system with ``states`` states is not stable.

    Returns:
        the reduction; look at ``reduction.certificate.valid`` before using it.

    Raises:
        InvalidRankRuleError: fewer than one state asked for.
    """
    if states < 1:
        raise InvalidRankRuleError(f"states must be at least 1; got {states}")
    balanced = list(balancing.singles())
    cuts = [truncate_one(one, states, exceed, lower) for one in balanced]
    certificates = tuple(
        certifier(one.system, cut.lam, cut.B, cut.C, cut.bound, cut.scale, cut.condition)
        for one, cut in zip(balanced, cuts, strict=True)
    )
    system, batch = balancing.system, balancing.system.batch_shape
    width = max(cut.lam.shape[0] for cut in cuts)
    padded = [cut.padded(width) for cut in cuts]

    def stack(name: str) -> Tensor:
        values = torch.stack([getattr(cut, name) for cut in padded])
        return values.reshape(*batch, *values.shape[1:])

    # A reduction that failed its certificate may be unstable, and a DiagonalSystem must be stable.
    lam = stack("lam")
    if not bool((lam.abs() < 1).all()):
        lam = torch.where(lam.abs() < 1, lam, 0.0)
    reduced = replace(system, lam=lam, B=stack("B"), C=stack("C"))
    return Reduction(reduced, stack("left"), stack("right"), certificates)


__all__ = ["Balancing", "Method", "Reduction", "balance", "truncate"]
