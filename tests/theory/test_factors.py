"""Factors of Gramians: they multiply to the Gramian, and keep the digits that its entries do not hold."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressm.errors import InvalidSystemError
from compressm.theory.balancing import balance
from compressm.theory.factors import displacement_factor, factor
from compressm.theory.gramians import gramians, real_gramians
from compressm.theory.systems import DiagonalSystem


def crowded(seed: int, n: int, p: int, spread: float, real_output: bool) -> DiagonalSystem:
    """Poles within ``spread`` of one another, generic inputs and outputs."""
    rng = np.random.default_rng(seed)
    lam = (0.95 + spread * rng.uniform(-1, 1, n)) * np.exp(1j * (0.3 + spread * rng.uniform(-1, 1, n)))
    B = rng.normal(size=(n, p)) + 1j * rng.normal(size=(n, p))
    C = rng.normal(size=(p, n)) + 1j * rng.normal(size=(p, n))
    return DiagonalSystem(torch.tensor(lam), torch.tensor(B), torch.tensor(C), real_output)


def exact_hsv(system: DiagonalSystem, method: str) -> np.ndarray:
    """Roots of the eigenvalues of P Q, with 80 digits."""
    with mpmath.workdps(80):
        lam, B, C = (mpmath.matrix(x.tolist()) for x in (system.lam[:, None], system.B, system.C))
        n, conj = system.n, mpmath.conj
        modes = [(lam[i], B[i, :], C[:, i]) for i in range(n)]
        if method == "real":  # Re(C x) of x and its conjugate: half of C each
            modes = [(z, b, c / 2) for z, b, c in modes] + [
                (conj(z), b.apply(conj), c.apply(conj) / 2) for z, b, c in modes
            ]
        m = len(modes)
        P, Q = mpmath.zeros(m), mpmath.zeros(m)
        for i, (zi, bi, ci) in enumerate(modes):
            for j, (zj, bj, cj) in enumerate(modes):
                P[i, j] = (bi * bj.H)[0] / (1 - zi * conj(zj))
                Q[i, j] = (ci.H * cj)[0] / (1 - conj(zi) * zj)
        values = mpmath.eig(P * Q, left=False, right=False)
        return np.array(sorted((float(mpmath.sqrt(abs(mpmath.re(v)))) for v in values), reverse=True))


@pytest.mark.parametrize("method", ["real", "complex"])
@pytest.mark.parametrize(("n", "p", "spread"), [(4, 1, 1e-3), (5, 2, 1e-4), (6, 1, 1e-2), (3, 1, 1e-8)])
def test_hsv_of_crowded_poles_have_all_their_digits(method: str, n: int, p: int, spread: float) -> None:
    system = crowded(n, n, p, spread, method == "real")
    exact = exact_hsv(system, method)
    resolved = exact > 1e-15 * exact[0]
    assert exact[resolved][-1] < 1e-5 * exact[0]  # the entries of the Gramians hold nothing of these
    computed = balance(system, method).hsv.numpy()  # type: ignore[arg-type]
    # Relative, each: 1e-9 where cond(poles) is 1e8; the SVD of the product adds 1e-16 of the largest.
    np.testing.assert_allclose(computed[resolved], exact[resolved], rtol=1e-8, atol=1e-14 * exact[0])


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 12),
    p=st.integers(1, 15),
    spread=st.sampled_from([0.04, 1e-3, 0.0]),
)
def test_factors_multiply_to_their_gramians(seed: int, n: int, p: int, spread: float) -> None:
    system = crowded(seed, n, p, spread, real_output=True)
    for matrix, real in ((gramians(system)[0], False), (real_gramians(system)[0], True)):
        L = factor(system.lam, system.B, matrix, real)
        torch.testing.assert_close(L @ L.mH, matrix, rtol=0, atol=1e-12 * float(matrix.abs().max()))
    L = torch.from_numpy(displacement_factor(system.lam.numpy(), system.B.numpy()))
    P = gramians(system)[0]
    torch.testing.assert_close(L @ L.mH, P, rtol=0, atol=1e-12 * float(P.abs().max()))


def test_equal_poles_have_the_rank_of_their_inputs() -> None:
    system = crowded(0, 6, 2, 0.0, real_output=False)
    L = torch.from_numpy(displacement_factor(system.lam.numpy(), system.B.numpy()))
    energy = L.norm(dim=0)
    assert (energy[:2] > 1e-3).all()
    assert (energy[2:] < 1e-12).all()


def test_units_of_the_states_do_not_matter() -> None:
    system = crowded(1, 6, 1, 1e-2, real_output=False)
    units = 10 ** torch.linspace(-8, 8, 6, dtype=torch.float64)
    scaled = DiagonalSystem(system.lam, system.B * units[:, None], system.C / units, False)
    # The smallest is 1e-9 of the largest: the SVD of the product resolves it to 1e-16 / 1e-9.
    torch.testing.assert_close(balance(scaled, "complex").hsv, balance(system, "complex").hsv, rtol=1e-6, atol=0)


def test_an_overflow_is_named() -> None:
    lam, B, C = (torch.tensor(value, dtype=torch.complex128) for value in ([0.5], [[1e200]], [[1.0]]))
    system = DiagonalSystem(lam, B, C, False)
    with pytest.raises(InvalidSystemError, match="scale B and C down"):
        balance(system, "complex")
