"""Models ``(A, B, C, D)`` of control theory as modes and back, in discrete and continuous time.

A model of discrete time is ``x_{k+1} = A x_k + B u_k, y_k = C x_k + D u_k``; one of continuous time ``x' = A x + B u,
y = C x + D u``. Its modes are ``A = V diag(lam) V^-1`` with inputs ``V^-1 B`` and outputs ``C V``. Two discretisations
with the sampling time ``h`` are known, each as a map of single modes ``(s, b, c, d) -> (lam, b', c', d')``:

    "zoh"       lam = exp(s h),                b' = b (lam - 1) / s,  c' = c,         d' = d
    "bilinear"  lam = (1 + s h/2) / beta,      b' = b h / beta,       c' = c / beta,  d' = d + c b' / 2,
                beta = 1 - s h/2

A zero-order hold is exact at the sampling times for inputs that are constant between them. The bilinear map (Tustin)
keeps the H-infinity norm and all Hankel singular values (Glover 1984; Al-Saggaf and Franklin 1988), so that an error
bound of discrete time holds in continuous time as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compressm.errors import InvalidSystemError

Discretisation = Literal["zoh", "bilinear"]
Array = np.ndarray[Any, np.dtype[Any]]
Matrices = tuple[Array, Array, Array, Array]
# Eigenvectors of a larger condition number lose half of the digits of a double.
MAX_CONDITION = 1e8


@dataclass(frozen=True)
class Realisation:
    """What a model of control theory has besides its modes. No reduction changes it.

    Attributes:
        D: feed-through of discrete time, float64 or complex128, shape ``(q, p)``.
        dt: sampling time in seconds.
        discretisation: how the model came from continuous time; None if it did not.
    """

    D: Tensor
    dt: float = 1.0
    discretisation: Discretisation | None = None


def checked_matrices(A: Any, B: Any, C: Any, D: Any = None) -> Matrices:
    """The matrices of a model as float64 or complex128, of shapes ``(n, n)``, ``(n, p)``, ``(q, n)`` and ``(q, p)``.

    ``D=None`` stands for zeros, and so does a zero of any shape. Vectors are refused, since it is not clear which way
    they stand.

    Raises:
        InvalidSystemError: not matrices of numbers, shapes that do not fit, or entries that are not finite.
    """
    found = {name: _matrix(name, value) for name, value in (("A", A), ("B", B), ("C", C))}
    A, B, C = found["A"], found["B"], found["C"]
    D = np.zeros((C.shape[0], B.shape[1])) if D is None else np.atleast_2d(_numbers("D", D))
    if D.shape != (C.shape[0], B.shape[1]) and not D.any():
        D = np.zeros((C.shape[0], B.shape[1]))
    n = A.shape[0]
    if n < 1 or A.shape != (n, n) or B.shape[0] != n or C.shape[1] != n or D.shape != (C.shape[0], B.shape[1]):
        raise InvalidSystemError(
            f"A {A.shape}, B {B.shape}, C {C.shape}, D {D.shape} disagree: expected (n, n), (n, p), (q, n), (q, p)"
        )
    for name, value in (("A", A), ("B", B), ("C", C), ("D", D)):
        if not np.isfinite(value).all():
            raise InvalidSystemError(f"{name} has entries that are NaN or infinite: pass finite numbers")
    return A, B, C, D


def check_stable(poles: Array, continuous: bool) -> None:
    """Refuse a model with a pole outside the stable region, and say what can be done.

    Raises:
        InvalidSystemError: a pole is not inside the unit disc, or of continuous time not in the left half-plane.
    """
    margin = np.real(poles) if continuous else np.abs(poles) - 1
    worst = int(margin.argmax())
    if margin[worst] >= 0:
        size = f"real part {poles[worst].real:.4g}" if continuous else f"modulus {abs(poles[worst]):.9g}"
        where = "left half-plane" if continuous else "unit disc"
        raise InvalidSystemError(
            f"A has the eigenvalue {poles[worst]:.4g}, with {size}, not inside the {where}: balanced truncation needs "
            "a stable model; split off its stable part (scipy.linalg.schur with sort=), reduce that, and add the rest"
        )


class ZerosAndPoles(NamedTuple):
    """``gain prod(z - zeros) / prod(z - poles)``: complex128, shapes ``(m,)`` and ``(n,)``, and a number."""

    zeros: Array
    poles: Array
    gain: complex


def matrices_of(model: Any) -> tuple[tuple[Any, Any, Any, Any] | ZerosAndPoles, float | None, bool]:
    """``(A, B, C, D)`` of a model of scipy.signal or python-control, its sampling time, and whether it is of continuous
    time. The sampling time is None where it is not known. A model that is given by zeros and poles stays so.

    Raises:
        InvalidSystemError: something else than such a model.
    """
    control = type(model).__module__.partition(".")[0] == "control"
    by_poles = all(hasattr(model, name) for name in ("gain", "zeros", "poles"))  # the gain, since all have zeros
    if not by_poles and not hasattr(model, "A"):
        model = _state_space(model, control)
    # python-control writes 0 for continuous time, and None or True for a time that is not known; scipy None and True.
    own = getattr(model, "dt", None)
    continuous = own == 0 if control else own is None
    known = None if own is None or own is True or own == 0 else float(own)
    if by_poles:
        zeros, poles = (np.atleast_1d(_numbers(name, getattr(model, name))) for name in ("zeros", "poles"))
        if not 1 <= len(poles) >= len(zeros):
            raise InvalidSystemError(f"{len(zeros)} zeros and {len(poles)} poles: expected at least as many poles")
        found = ZerosAndPoles(zeros.astype(np.complex128), poles.astype(np.complex128), model.gain)
        return found, known, bool(continuous)
    return (model.A, model.B, model.C, model.D), known, bool(continuous)


def _state_space(model: Any, control: bool) -> Any:
    """A transfer function or a zero-pole form as a state space model."""
    if hasattr(model, "to_ss"):
        return model.to_ss()
    if control:
        import control as package

        return package.tf2ss(model)
    raise InvalidSystemError(
        f"model is {type(model).__name__}: expected a model of scipy.signal or python-control; for matrices call "
        "DiagonalSystem.from_abcd(A, B, C, D)"
    )


def modes_of(A: Array, B: Array, C: Array) -> tuple[Array, Array, Array, bool]:
    """``(lam, B, C, real)`` of a model in modal form, complex128, in no order that means anything.

    A real model has ``y = Re(C x)`` with one state for each conjugate pair, the one with positive phase, and one for
    each real eigenvalue, whose row of B and column of C are real.

    Raises:
        InvalidSystemError: A is not diagonalisable, or so nearly not that the result would mean nothing.
    """
    from scipy.linalg import matrix_balance  # a tenth of the time that importing compressm takes

    # States of a transfer function's companion form differ by orders of magnitude, which says nothing about its modes.
    A, (scales, _) = matrix_balance(A, permute=False, separate=True)
    B, C = B / scales[:, None], C * scales
    lam, V = np.linalg.eig(A)
    condition = float(np.linalg.cond(V))
    if not condition <= MAX_CONDITION:
        one, other = _closest(lam)
        raise InvalidSystemError(
            "A is not diagonalisable in double precision: its eigenvectors have a condition above "
            f"{MAX_CONDITION:.0e}, and the eigenvalues closest to each other are {one:.4g} and {other:.4g}; if A comes "
            "from a transfer function, pass scipy.signal.ZerosPolesGain (of a filter: output='zpk'); else move one of "
            "them, by a hundredth of its size say, or split the model into a chain of smaller ones"
        )
    inputs, outputs = np.linalg.solve(V, B.astype(np.complex128)), C @ V
    if any(np.iscomplexobj(matrix) for matrix in (A, B, C)):
        return lam.astype(np.complex128), inputs, outputs.astype(np.complex128), False
    return _one_of_each_pair(lam.astype(np.complex128), inputs, outputs.astype(np.complex128))


def modes_of_zeros_and_poles(model: ZerosAndPoles, continuous: bool) -> tuple[Array, Array, Array, Array, bool]:
    """``(lam, B, C, D, real)`` of ``gain prod(z - zeros) / prod(z - poles)``, as `modes_of` gives them.

    The residue of a pole, ``gain prod(p - zeros) / prod(p - other poles)``, keeps the digits that the coefficients of a
    high order filter's polynomials have lost.

    Raises:
        InvalidSystemError: poles that coincide or nearly do.
    """
    zeros, poles, gain = model
    others = poles[:, None] - poles[None, :] + np.eye(len(poles))
    ratios = np.concatenate([poles[:, None] - zeros[None, :], np.ones((len(poles), len(poles) - len(zeros)))], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        residues = gain * np.prod(ratios / others, 1)
    _check_residues(zeros, poles, gain, residues, continuous)
    D = np.full((1, 1), gain if len(zeros) == len(poles) else 0.0)
    inputs, outputs = np.ones((len(poles), 1), np.complex128), residues[None]
    conjugate = all(np.allclose(np.sort_complex(x), np.sort_complex(x.conj()), rtol=1e-12) for x in (zeros, poles))
    if np.iscomplexobj(gain) or not conjugate:
        return poles, inputs, outputs, D, False
    lam, inputs, outputs, _ = _one_of_each_pair(poles, inputs, outputs)
    return lam, inputs, outputs, D, True


def _check_residues(zeros: Array, poles: Array, gain: complex, residues: Array, continuous: bool) -> None:
    """Refuse residues that cancel each other, as those of poles that all but coincide do: their sum loses the digits by
    which its terms are larger than the gain's peak, which is looked for at the frequency of every pole."""
    at = 1j * np.imag(poles) if continuous else np.exp(1j * np.angle(poles))
    peak = max(abs(gain * np.prod(z - zeros) / np.prod(z - poles)) for z in at)
    if not max(np.abs(residues / (z - poles)).sum() for z in at) <= MAX_CONDITION * peak:
        one, other = _closest(poles)
        raise InvalidSystemError(
            f"the poles {one:.4g} and {other:.4g} all but coincide: move one of them, by a hundredth of its size say, "
            "or split the model into a chain of smaller ones"
        )


def _one_of_each_pair(lam: Array, inputs: Array, outputs: Array) -> tuple[Array, Array, Array, bool]:
    """The modes of a real model without the conjugate of each pair."""
    pairs, reals = np.flatnonzero(np.imag(lam) > 0), np.flatnonzero(np.imag(lam) == 0)
    return (
        np.concatenate([lam[pairs], lam[reals]]),
        np.concatenate([inputs[pairs], np.real(inputs[reals])]),
        np.concatenate([2 * outputs[:, pairs], np.real(outputs[:, reals])], 1),
        True,
    )


def real_matrices(lam: Array, B: Array, C: Array) -> tuple[Array, Array, Array]:
    """The real ``(A, B, C)`` whose output is ``Re(C x)``: a block ``[[Re lam, -Im lam], [Im lam, Re lam]]`` for a
    complex state, and one row and column for a real one of which one part is not driven or not read."""
    n = lam.shape[0]
    both = np.zeros((2 * n, 2 * n))
    at = np.arange(n)
    both[2 * at, 2 * at] = both[2 * at + 1, 2 * at + 1] = np.real(lam)
    both[2 * at, 2 * at + 1], both[2 * at + 1, 2 * at] = -np.imag(lam), np.imag(lam)
    inputs = np.stack([np.real(B), np.imag(B)], 1).reshape(2 * n, -1)
    outputs = np.stack([np.real(C), -np.imag(C)], 2).reshape(-1, 2 * n)
    coupled = np.repeat(np.imag(lam) != 0, 2)
    used = coupled | (inputs.any(1) & outputs.any(0))
    if not used.any():
        used[0] = True  # a model of no state is none
    return both[used][:, used], inputs[used], outputs[:, used]


def discretised(s: Array, b: Array, c: Array, d: Array, real: bool, dt: float, by: Discretisation) -> Matrices:
    """Modes of continuous time, sampled; see the module's text. With ``real`` the output is ``Re(c x)``."""
    if by == "zoh":
        growth = np.expm1(s * dt)
        return growth + 1, b * (growth / s)[:, None], c, d
    beta = 1 - s * dt / 2
    b = b * dt / beta[:, None]
    return (1 + s * dt / 2) / beta, b, c / beta, d + _real_if(c @ b, real) / 2


def undone(lam: Array, b: Array, c: Array, d: Array, real: bool, dt: float, by: Discretisation) -> Matrices:
    """Modes of continuous time from sampled ones: the inverse of `discretised`.

    Raises:
        InvalidSystemError: a zero-order hold has no such modes, or they are not those of a real model.
    """
    if by == "zoh":
        lost = (lam == 0) | ((np.imag(lam) == 0) & (np.real(lam) < 0) if real else False)
        if lost.any():
            raise InvalidSystemError(
                f"the eigenvalue {lam[lost][0]:.4g} is that of no real mode of continuous time that a zero-order hold "
                "samples: discretise by 'bilinear', or stay in discrete time"
            )
        s = np.log(lam) / dt
        return s, b * (s / (lam - 1))[:, None], c, d
    if (lam == -1).any():
        raise InvalidSystemError("an eigenvalue of -1 has no counterpart in continuous time: stay in discrete time")
    beta = 2 / (lam + 1)
    c = c * beta
    return 2 / dt * (lam - 1) / (lam + 1), b * beta[:, None] / dt, c, d - _real_if(c @ b, real) / 2


def _real_if(matrix: Array, real: bool) -> Array:
    return np.real(matrix) if real else matrix


def _closest(values: Array) -> tuple[complex, complex]:
    """The two values that lie closest to each other."""
    distance = np.abs(values[:, None] - values[None, :])
    distance[np.diag_indices_from(distance)] = np.inf
    one, other = np.unravel_index(int(distance.argmin()), distance.shape)
    return complex(values[one]), complex(values[other])


def _matrix(name: str, value: Any) -> Array:
    found = _numbers(name, value)
    if found.ndim != 2:
        expected = {"A": "(n, n)", "B": "(n, p)", "C": "(q, n)"}[name]
        raise InvalidSystemError(f"{name} has shape {found.shape}: expected a matrix {expected}")
    return found


def _numbers(name: str, value: Any) -> Array:
    value = value.detach().cpu().resolve_conj().numpy() if isinstance(value, Tensor) else value
    try:
        found = np.asarray(value)
    except ValueError:  # rows of unequal length
        found = np.asarray(None)
    if found.dtype.kind not in "biufc":
        raise InvalidSystemError(f"{name} must be a matrix of numbers; got {type(value).__name__} {value!r:.60}")
    return found.astype(np.complex128 if found.dtype.kind == "c" else np.float64)


def as_tensor(matrix: Array) -> Tensor:
    """A complex128 tensor."""
    return torch.from_numpy(np.ascontiguousarray(matrix, np.complex128))


__all__ = [
    "Discretisation", "Matrices", "Realisation", "ZerosAndPoles", "as_tensor", "check_stable", "checked_matrices",
    "discretised", "matrices_of", "modes_of", "modes_of_zeros_and_poles", "real_matrices", "undone",
]  # fmt: skip
