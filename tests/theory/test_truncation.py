"""One balanced system cut to fewer states: the order that is found against all orders there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressm.theory.balancing import Method, balance
from compressm.theory.systems import DiagonalSystem
from compressm.theory.truncation import truncate_one
from helpers import random_system, real_matrices


@pytest.mark.parametrize("method", ["real", "complex"])
@pytest.mark.parametrize("seed", range(4))
def test_as_many_balanced_dimensions_are_kept_as_fit(method: Method, seed: int) -> None:
    system = random_system(seed, n=7, radius=(0.2, 0.9))
    (factors,) = balance(system, method).singles()
    counts = {order: factors.modes(order).count for order in range(1, len(factors.hsv) + 1)}
    for states in range(1, 8):
        cut = truncate_one(factors, states, exceed=False, lower=True)
        order = max(order for order, count in counts.items() if count <= states and order <= 2 * states)
        if method == "complex":
            order = states
        assert cut.lam.shape[0] == counts[order] <= states
        assert cut.bound == pytest.approx(2 * float(factors.hsv[order:].sum()), rel=1e-9, abs=1e-12)


def test_what_exceeds_keeps_all_dimensions() -> None:
    (factors,) = balance(random_system(1, n=6)).singles()
    for states in range(1, 7):
        cut = truncate_one(factors, states, exceed=True, lower=True)
        assert cut.lam.shape[0] == factors.modes(2 * states).count >= states
        assert cut.bound == pytest.approx(2 * float(factors.hsv[2 * states :].sum()), rel=1e-9, abs=1e-12)


def test_modes_are_the_eigenvalues_of_the_projected_matrix() -> None:
    system = random_system(3, n=5)
    (factors,) = balance(system).singles()
    A, B, C = real_matrices(system)
    half = factors.hsv[:6].rsqrt().numpy()
    to_new = half[:, None] * (factors.U[:, :6].T @ factors.factor_Q.T).numpy()
    to_old = (factors.factor_P @ factors.V[:, :6]).numpy() * half
    np.testing.assert_allclose(to_new @ to_old, np.eye(6), atol=1e-9)
    expected = np.linalg.eigvals(to_new @ A @ to_old)
    cut = truncate_one(factors, 3, exceed=True, lower=True)
    found = cut.lam.numpy()
    for value in expected:
        assert min(abs(np.concatenate([found, found.conj()]) - value)) < 1e-9
    # The reduced system answers impulses as the projected matrices do.
    kernel = DiagonalSystem(cut.lam, cut.B, cut.C).kernel(12).numpy()
    for step in range(12):
        power = np.linalg.matrix_power(to_new @ A @ to_old, step)
        np.testing.assert_allclose(kernel[step], C @ to_old @ power @ to_new @ B, atol=1e-9)


def test_systems_of_a_batch_come_one_by_one_in_row_major_order() -> None:
    systems = [random_system(seed, n=4) for seed in range(6)]
    batch = DiagonalSystem(
        *(torch.stack([getattr(s, x) for s in systems]).unflatten(0, (2, 3)) for x in ("lam", "B", "C"))
    )
    for one, factors in zip(systems, balance(batch).singles(), strict=True):
        assert torch.equal(factors.system.lam, one.lam)
        torch.testing.assert_close(factors.hsv, balance(one).hsv, rtol=1e-9, atol=1e-12)


def test_a_system_that_nothing_reaches_becomes_one_state_that_does_nothing() -> None:
    system = random_system(0, n=3)
    (factors,) = balance(DiagonalSystem(system.lam, 0 * system.B, system.C)).singles()
    cut = truncate_one(factors, 2, exceed=False, lower=True)
    assert cut.lam.shape == (1,)
    assert (cut.B.shape, cut.C.shape) == ((1, 3), (2, 1))
    assert float(cut.B.abs().max() + cut.C.abs().max() + cut.lam.abs().max()) == 0
