"""The operator whose eigenvalues are the Hankel singular values, and what every balanced layer tells of itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from compressm.theory.balanced import hankel_operator
from compressm.theory.balancing import balance
from compressm.theory.gramians import gramians, real_gramians
from compressm.theory.recurrence import balance_selective, moments, root
from compressm.theory.systems import DiagonalSystem
from helpers import random_signals, random_system, real_matrices


def oracle(P: np.ndarray, Q: np.ndarray) -> np.ndarray:
    half = np.asarray(sqrtm(P))
    return np.asarray(sqrtm(half @ Q @ half))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_operator_is_the_root_of_the_product_with_roots_of_p_on_both_sides(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    factor_P, factor_Q = torch.randn(2, 3, 5, 5, dtype=dtype, generator=generator)
    P, Q = factor_P @ factor_P.mH, factor_Q @ factor_Q.mH
    found = hankel_operator(P, factor_Q)
    for index in range(3):
        np.testing.assert_allclose(found[index].numpy(), oracle(P[index].numpy(), Q[index].numpy()), atol=1e-7)
    torch.testing.assert_close(found, found.mH)


def test_of_a_matrix_that_is_negative_by_rounding_the_root_is_real() -> None:
    P = torch.diag(torch.tensor([4.0, 1.0, -1e-17], dtype=torch.float64))
    found = hankel_operator(P, torch.diag(torch.tensor([0.5, 3.0, 2.0], dtype=torch.float64)))
    torch.testing.assert_close(found, torch.diag(torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)))


@pytest.mark.parametrize("method", ["real", "complex"])
def test_a_balanced_layer_has_the_operator_of_its_gramians(method: str) -> None:
    system = random_system(2, n=4, radius=(0.3, 0.9))
    balanced = balance(system, method)  # type: ignore[arg-type]
    P, Q = real_gramians(system) if method == "real" else gramians(system)
    operator = balanced.hankel_operator()
    np.testing.assert_allclose(operator.numpy(), oracle(P.numpy(), Q.numpy()), atol=1e-6 * float(balanced.hsv[0]))
    torch.testing.assert_close(torch.linalg.eigvalsh(operator).flip(0), balanced.hsv)
    # A complex state is one state of the complex system, and two of the real one.
    expected = balanced.hsv if method == "complex" else balanced.hsv[0::2] + balanced.hsv[1::2]
    assert torch.equal(balanced.energy, expected)
    assert all(torch.equal(a, b) for a, b in zip(balanced.state(), (system.lam, system.B, system.C), strict=True))


def test_a_selective_layer_has_the_operator_of_its_moments() -> None:
    balanced = balance_selective(moments(random_signals(1, n=4, groups=2)))
    for group in range(2):
        expected = oracle(balanced.P[group].numpy(), balanced.W[group].numpy())
        np.testing.assert_allclose(balanced.hankel_operator()[group], expected, atol=1e-6 * np.abs(expected).max())
    assert torch.equal(balanced.energy, balanced.hsv)
    assert balanced.state().keys() == {"tokens", "P", "W", "V", "B", "C", "rates"}
    assert balanced.state()["V"] is balanced.moments.V


def test_a_root_of_a_matrix_times_its_transpose_is_the_matrix() -> None:
    factor = torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = factor @ factor.mT  # of rank two, so that some eigenvalues are rounding errors of either sign
    torch.testing.assert_close(root(matrix) @ root(matrix).mT, matrix)


def test_values_of_several_systems_are_told_by_their_mean() -> None:
    singles = [random_system(seed, n=4, p=1, q=1) for seed in range(6)]
    parts = (torch.stack([getattr(one, name) for one in singles]).unflatten(0, (2, 3)) for name in ("lam", "B", "C"))
    expected = np.mean([balance(one).hsv.numpy() for one in singles], axis=0)
    np.testing.assert_allclose(balance(DiagonalSystem(*parts)).mean_hsv().numpy(), expected, rtol=1e-9)
    assert torch.equal(balance(singles[0]).mean_hsv(), balance(singles[0]).hsv)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_gramians_solve_their_stein_equations(batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    lam, B, C = (
        torch.randn(*batch, *shape, dtype=torch.complex128, generator=generator) for shape in ((4,), (4, 3), (2, 4))
    )
    system = DiagonalSystem(0.9 * lam / (1 + lam.abs()), B, C)
    P, Q = gramians(system)
    A = torch.diag_embed(system.lam)
    torch.testing.assert_close(A @ P @ A.mH + B @ B.mH, P)
    torch.testing.assert_close(A.mH @ Q @ A + C.mH @ C, Q)
    P, Q = (one.reshape(-1, 8, 8).numpy() for one in real_gramians(system))
    for index in range(len(P)):
        one = DiagonalSystem(*(x.reshape(-1, *x.shape[len(batch) :])[index] for x in (system.lam, B, C)))
        A, B_r, C_r = real_matrices(one)
        np.testing.assert_allclose(A @ P[index] @ A.T + B_r @ B_r.T, P[index], atol=1e-12)
        np.testing.assert_allclose(A.T @ Q[index] @ A + C_r.T @ C_r, Q[index], atol=1e-12)
        assert np.array_equal(P[index], P[index].T)
