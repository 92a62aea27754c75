"""Diagonal linear time-invariant systems, the values on which all reductions operate.

A system maps an input sequence ``u`` (real, ``p`` channels) to an output sequence ``y`` (``q`` channels):

    x_k = diag(lam) x_{k-1} + B u_k,      y_k = C x_k          (complex output)
                                          y_k = Re(C x_k)      (real output, what LRU, S5 and S4D layers compute)

The feed-through term ``D u_k`` of a layer is left out, since no reduction changes it. The output ``y_k`` depends on
``u_k``, as in those layers, so the impulse response is ``K_j = C diag(lam)^j B`` with ``j >= 0`` and the transfer
function is ``G(z) = sum_j K_j z^-j = C (I - diag(lam) z^-1)^-1 B``.

In control theory ``x_{k+1} = A x_k + B u_k, y_k = C x_k + D u_k``: the output is one step later, so the transfer
function is ``D + z^-1 G(z)``. Hankel singular values and errors are the same, since ``|z^-1| = 1`` on the unit circle.
See `DiagonalSystem.from_abcd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compressm.errors import InvalidSystemError, MissingExtraError
from compressm.theory.factors import displacement_factor
from compressm.theory.realisation import (
    Discretisation,
    Matrices,
    Realisation,
    ZerosAndPoles,
    as_tensor,
    check_stable,
    checked_matrices,
    discretised,
    matrices_of,
    modes_of,
    modes_of_zeros_and_poles,
    real_matrices,
    undone,
)

if TYPE_CHECKING:
    from scipy.signal import StateSpace

LARGEST_EXACT_NORM = 5e7  # multiplications; about a second


@dataclass(frozen=True)
class DiagonalSystem:
    """One diagonal system, or a batch of them that share their dimensions.

    Args:
        lam: eigenvalues, shape ``(*batch, n)``, strictly inside the unit disc.
        B: input matrix, shape ``(*batch, n, p)``.
        C: output matrix, shape ``(*batch, q, n)``.
        real_output: whether the layer outputs ``Re(C x)`` (the default) or ``C x``.
        model: of a system of control theory, its feed-through and sampling time; None for a layer.

    The first three are converted to complex128 on the CPU. Every computation on systems uses double precision on one
    device, so that all replicas of a model get the same result.

    Raises:
        InvalidSystemError: shapes that do not fit, entries that are not finite, or ``|lam| >= 1``.
    """

    lam: Tensor
    B: Tensor
    C: Tensor
    real_output: bool = True
    model: Realisation | None = None

    def __post_init__(self) -> None:
        for name in ("lam", "B", "C"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise InvalidSystemError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
            object.__setattr__(self, name, value.detach().to(device="cpu", dtype=torch.complex128))
        lam, B, C = self.lam, self.B, self.C
        if lam.ndim < 1 or B.ndim != lam.ndim + 1 or C.ndim != lam.ndim + 1:
            raise InvalidSystemError(
                "expected lam (*batch, n), B (*batch, n, p), C (*batch, q, n); "
                f"got {_shape(lam)}, {_shape(B)}, {_shape(C)}"
            )
        if B.shape[:-1] != lam.shape or (*C.shape[:-2], C.shape[-1]) != lam.shape:
            raise InvalidSystemError(
                f"lam {_shape(lam)}, B {_shape(B)} and C {_shape(C)} disagree: lam is (*batch, n), "
                "B must be (*batch, n, p) and C (*batch, q, n)"
            )
        if 0 in (lam.shape[-1], B.shape[-1], C.shape[-2]):
            raise InvalidSystemError(
                f"n, p and q must be at least 1; got lam {_shape(lam)}, B {_shape(B)}, C {_shape(C)}"
            )
        for name, value in (("lam", lam), ("B", B), ("C", C)):
            bad = int((~torch.isfinite(torch.view_as_real(value))).any(-1).sum())
            if bad:
                raise InvalidSystemError(
                    f"{name} has {bad} entries that are NaN or infinite; the layer has diverged: "
                    "go back to a checkpoint from before that, or lower the learning rate"
                )
        radius = float(lam.abs().max())
        if radius >= 1.0:
            raise InvalidSystemError(
                f"the largest |lam| is {radius:.9g}; "
                "balanced truncation needs every eigenvalue strictly inside the unit disc"
            )

    @classmethod
    def from_abcd(
        cls, A: Any, B: Any, C: Any, D: Any = None, *, dt: float = 1.0, discretise: Discretisation | None = None
    ) -> DiagonalSystem:
        """The modes of a model ``(A, B, C, D)`` of control theory.

        Without ``discretise`` the model is ``x_{k+1} = A x_k + B u_k, y_k = C x_k + D u_k``. With it the model is
        ``x' = A x + B u, y = C x + D u`` and is sampled; see `compressm.theory.realisation` for the equations.

        Args:
            A: state matrix, shape ``(n, n)``; this and the others are arrays, tensors or nested lists, real or complex.
            B: input matrix, shape ``(n, p)``.
            C: output matrix, shape ``(q, n)``.
            D: feed-through, shape ``(q, p)``; None stands for zeros.
            dt: sampling time in seconds.
            discretise: for a model of continuous time: ``"zoh"``, exact at the sampling times for inputs that are
                constant between them; or ``"bilinear"`` (Tustin), which keeps the Hankel singular values and the
                H-infinity error.

        Returns:
            the system, with one complex state for each conjugate pair of poles and one for each real pole.

        Raises:
            InvalidSystemError: matrices that do not fit, a pole that is not stable, or A not diagonalisable.
        """
        A, B, C, D = checked_matrices(A, B, C, D)
        _check_sampling(dt, discretise)
        check_stable(np.linalg.eigvals(A), discretise is not None)
        lam, B, C, real = modes_of(A, B, C)
        return cls._sampled(lam, B, C, D, real, float(dt), discretise)

    @classmethod
    def _sampled(
        cls, lam: Any, B: Any, C: Any, D: Any, real: bool, dt: float, discretise: Discretisation | None
    ) -> DiagonalSystem:
        """Modes as a system, sampled if they are of continuous time."""
        if discretise is not None:
            lam, B, C, D = discretised(lam, B, C, D, real, dt, discretise)
        model = Realisation(torch.from_numpy(D.copy()), dt, discretise)
        return cls(as_tensor(lam), as_tensor(B), as_tensor(C), real, model)

    @classmethod
    def from_model(cls, model: Any, *, dt: float | None = None, discretise: Discretisation = "zoh") -> DiagonalSystem:
        """The modes of a model of scipy.signal (``lti``, ``dlti``) or of python-control.

        Args:
            model: the model. Transfer functions become state space models first. Zeros and poles do not: their modes
                are as exact as they are, where the polynomials of a filter of high order have lost their digits.
            dt: sampling time in seconds; needed for a model of continuous time, and for no other.
            discretise: how a model of continuous time is sampled; see `from_abcd`.

        Raises:
            InvalidSystemError: something else than such a model, a sampling time that is missing or contradicts it, or
                see `from_abcd`.
        """
        if isinstance(model, DiagonalSystem):
            return model
        matrices, own, continuous = matrices_of(model)
        if continuous and dt is None:
            raise InvalidSystemError(
                "the model is of continuous time: give the sampling time dt= in seconds, and discretise= 'zoh' or "
                "'bilinear'"
            )
        if not continuous and None not in (dt, own) and dt != own:
            raise InvalidSystemError(f"dt={dt!r}, and the model has the sampling time {own!r}: leave dt out")
        how = discretise if continuous else None
        step = own or (1.0 if dt is None else dt)
        if not isinstance(matrices, ZerosAndPoles):
            return cls.from_abcd(*matrices, dt=step, discretise=how)
        _check_sampling(step, how)
        check_stable(matrices.poles, continuous)
        return cls._sampled(*modes_of_zeros_and_poles(matrices, continuous), float(step), how)

    def to_abcd(self, *, continuous: bool = False) -> Matrices:
        """``(A, B, C, D)`` of control theory, of the least order that these modes need; A is block diagonal.

        A layer's output depends on the present input, ``y_k = Re(C diag(lam) x_{k-1}) + Re(C B) u_k``; its matrices say
        so.

        Args:
            continuous: of the model in continuous time from which ``discretise=`` made this one, or a reduced one.

        Returns:
            NumPy arrays, float64 (complex128 for a system of complex output), shapes ``(n, n)``, ``(n, p)``, ``(q, n)``
            and ``(q, p)``.

        Raises:
            InvalidSystemError: a batch of systems; or ``continuous`` of a system that is of discrete time.
        """
        if self.batch_shape:
            raise InvalidSystemError(
                f"a batch of systems, of shape {tuple(self.batch_shape)}, has no single (A, B, C, D): take one of them"
            )
        lam, B, C = (x.resolve_conj().numpy() for x in (self.lam, self.B, self.C))
        if self.model is None:
            direct, C = C @ B, C * lam
            D = np.real(direct) if self.real_output else direct
        else:
            D = self.model.D.numpy()
        if continuous:
            if self.model is None or self.model.discretisation is None:
                raise InvalidSystemError(
                    "the system is of discrete time: continuous=True is for what from_abcd(..., discretise=...) sampled"
                )
            lam, B, C, D = undone(lam, B, C, D, self.real_output, self.model.dt, self.model.discretisation)
        if not self.real_output:
            return np.diag(lam), B, C, D
        return *real_matrices(lam, B, C), D

    def to_scipy(self, *, continuous: bool = False) -> StateSpace:
        """As `to_abcd`, as a ``scipy.signal.StateSpace``, with the sampling time if it is of discrete time."""
        from scipy.signal import StateSpace

        matrices = self.to_abcd(continuous=continuous)
        return StateSpace(*matrices) if continuous else StateSpace(*matrices, dt=self.dt)

    def to_control(self, *, continuous: bool = False) -> Any:
        """As `to_abcd`, as a ``control.StateSpace`` of python-control.

        Raises:
            MissingExtraError: python-control is not installed.
            InvalidSystemError: see `to_abcd`.
        """
        try:
            import control
        except ModuleNotFoundError as error:
            raise MissingExtraError('to_control needs python-control: pip install "compressm[control]"') from error
        return control.StateSpace(*self.to_abcd(continuous=continuous), 0 if continuous else self.dt)

    @property
    def dt(self) -> float:
        """Sampling time in seconds; 1 for a layer, whose unit of time is a step."""
        return 1.0 if self.model is None else self.model.dt

    @property
    def order(self) -> int:
        """Order of the model that `to_abcd` gives: two for a complex state, one for a real one."""
        return self.to_abcd()[0].shape[0]

    @property
    def n(self) -> int:
        """State dimension (number of complex states)."""
        return self.lam.shape[-1]

    @property
    def p(self) -> int:
        """Number of input channels."""
        return self.B.shape[-1]

    @property
    def q(self) -> int:
        """Number of output channels."""
        return self.C.shape[-2]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading batch dimensions; empty for a single system."""
        return self.lam.shape[:-1]

    def kernel(self, length: int) -> Tensor:
        """Impulse response ``K_j = C diag(lam)^j B`` (its real part where the output is real).

        Returns:
            shape ``(*batch, length, q, p)``, float64 for real output and complex128 otherwise.
        """
        steps = torch.arange(length, dtype=torch.float64)
        powers = torch.where(steps[:, None] == 0, 1.0, self.lam[..., None, :] ** steps[:, None])  # 0^0 = 1
        kernel = (self.C[..., None, :, :] * powers[..., None, :]) @ self.B[..., None, :, :]
        return kernel.real.clone() if self.real_output else kernel

    def transfer_function(self, omega: Tensor) -> Tensor:
        """``G(e^{i omega})`` of the system that the layer realises.

        For a real output this is ``(F(z) + conj(F(conj z))) / 2`` with ``F(z) = C (I - diag(lam)/z)^-1 B``: the layer
        is the real system whose modes are ``lam`` and their conjugates.

        Args:
            omega: frequencies in radians per step, shape ``(f,)``.

        Returns:
            complex128, shape ``(*batch, f, q, p)``.
        """
        lam, B, C = self.modes()
        z_inverse = torch.exp(-1j * omega.to(torch.float64))
        resolvent = 1.0 / (1.0 - z_inverse[:, None] * lam[..., None, :])  # (*batch, f, m)
        return (C[..., None, :, :] * resolvent[..., None, :]) @ B[..., None, :, :]

    def modes(self) -> tuple[Tensor, Tensor, Tensor]:
        """All complex modes of the input-output map: ``(lam, B, C)`` with conjugates appended for a real output.

        ``Re(C x)`` for real input is the output of the system of order ``2n`` with eigenvalues ``(lam, conj lam)``,
        inputs ``(B; conj B)`` and outputs ``(C, conj C) / 2``.
        """
        if not self.real_output:
            return self.lam, self.B, self.C
        return (
            torch.cat([self.lam, self.lam.conj()], -1),
            torch.cat([self.B, self.B.conj()], -2),
            torch.cat([self.C, self.C.conj()], -1) / 2,
        )

    def h2_norm(self) -> Tensor:
        """``sqrt(sum_j ||K_j||_F^2)``, by Gramians, not by simulation; shape ``(*batch,)``, float64.

        White noise at the input gives the state the covariances ``E[x x*] = P`` and ``E[x x^T] = S`` (see
        `stein_solution`), and the output ``y = Re(C x)`` the power ``(tr(C P C*) + Re tr(C S C^T)) / 2``.
        """
        terms = (self.C.mH @ self.C).mT * stein_solution(self.lam, self.B)
        power, size = terms.sum((-2, -1)).real, terms.abs().sum((-2, -1))
        if self.real_output:
            terms = (self.C.mT @ self.C).mT * stein_solution(self.lam, self.B, False)
            power, size = (power + terms.sum((-2, -1)).real) / 2, (size + terms.abs().sum((-2, -1))) / 2
        norm = power.clamp_min(0).sqrt()
        # Where modes cancel, the difference of large terms is rounding error. A factor of P gives the norm as a sum of
        # squares instead, which is accurate. Where that would take minutes the rounding error stays: it is below eps
        # times the norm that the modes would have without cancellation.
        work = (1 + self.real_output) ** 2 * self.n**2 * min(self.p, self.n)
        lost = (power < 1e-9 * size) & torch.isfinite(size) & (work < LARGEST_EXACT_NORM)
        if bool(lost.any()):
            lam, B, C = (x.reshape(-1, *x.shape[x.ndim - k :]) for x, k in zip(self.modes(), (1, 2, 2), strict=True))
            for index in torch.nonzero(lost.reshape(-1)).squeeze(1).tolist():
                factor = displacement_factor(lam[index].resolve_conj().numpy(), B[index].resolve_conj().numpy())
                norm.reshape(-1)[index] = (C[index] @ torch.from_numpy(factor)).norm()
        return norm

    def mode_energy(self) -> Tensor:
        """``sum_i ||B_i|| ||C_i|| / (1 - |lam_i|^2)``, shape ``(*batch,)``.

        This would be the sum of all HSVs if no mode cancelled another, so it is the scale of their rounding errors.
        With ``P_ii = ||B_i||^2 / (1 - |lam_i|^2)`` and ``Q_ii`` likewise, it equals ``sum_i sqrt(P_ii Q_ii)``, which is
        never less than the sum of the HSVs, in both methods of `balancing`."""
        leak = (1 - self.lam.abs()) * (1 + self.lam.abs())
        return (self.B.norm(dim=-1) * self.C.norm(dim=-2) / leak).sum(-1)

    def minus(self, other: DiagonalSystem) -> DiagonalSystem:
        """The difference system ``self - other``, of order ``self.n + other.n``."""
        if self.real_output != other.real_output:
            raise InvalidSystemError("a system with real and one with complex output cannot be subtracted")
        return DiagonalSystem(
            torch.cat([self.lam, other.lam], -1),
            torch.cat([self.B, other.B], -2),
            torch.cat([self.C, -other.C], -1),
            self.real_output,
        )


def stein_solution(lam: Tensor, B: Tensor, conjugate: bool = True) -> Tensor:
    """Closed-form solution of the Stein (discrete Lyapunov) equation of a diagonal system.

    ``P = diag(lam) P diag(lam)* + B B*`` has ``P_ij = (B B*)_ij / (1 - lam_i conj(lam_j))``; without conjugation,
    ``S = diag(lam) S diag(lam) + B B^T`` has ``S_ij = (B B^T)_ij / (1 - lam_i lam_j)``.

    Args:
        lam: shape ``(*batch, n)``; B: shape ``(*batch, n, p)``.
        conjugate: which of the two.

    Returns:
        shape ``(*batch, n, n)``, Hermitian (or complex symmetric without conjugation).
    """
    if conjugate:
        return (B @ B.mH) / (1 - lam[..., :, None] * lam.conj()[..., None, :])
    return (B @ B.mT) / (1 - lam[..., :, None] * lam[..., None, :])


def decay_rate(lam: Tensor) -> Tensor:
    """``-log|lam|`` per step, made finite for eigenvalues of zero, whose modes end after one step."""
    return -lam.abs().clamp_min(1e-30).log()


def _check_sampling(dt: Any, discretise: Any) -> None:
    if not (isinstance(dt, int | float) and 0 < dt < float("inf")):
        raise InvalidSystemError(f"dt must be a sampling time in seconds, above 0; got {dt!r}")
    if discretise not in (None, "zoh", "bilinear"):
        raise InvalidSystemError(f"discretise must be 'zoh', 'bilinear' or None; got {discretise!r}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
