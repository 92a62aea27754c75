"""`compressm.reduce` of a model outside of any network, against pyMOR and the definition."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal as signal
import torch
from pymor.models.iosys import LTIModel
from pymor.reductors.bt import BTReductor

import compressm
from compressm import DiagonalSystem
from compressm.cutting.system_plots import response, step_response
from compressm.errors import InvalidRankRuleError, InvalidSystemError


def chain(masses: int = 6) -> signal.StateSpace:
    """Masses between springs and dampers: a force on the first, the place of the last."""
    K = 2 * np.eye(masses) - np.eye(masses, k=1) - np.eye(masses, k=-1)
    Z, eye = np.zeros((masses, masses)), np.eye(masses)
    A = np.block([[Z, eye], [-K, -0.1 * K - 0.02 * eye]])
    return signal.StateSpace(A, np.eye(2 * masses)[:, [masses]], np.eye(2 * masses)[[masses - 1]], np.zeros((1, 1)))


def gain(model: signal.StateSpace, points: np.ndarray) -> np.ndarray:
    A, B, C, D = model.A, model.B, model.C, model.D
    return np.array([np.linalg.norm(C @ np.linalg.solve(z * np.eye(len(A)) - A, B) + D, 2) for z in points])


def test_hankel_singular_values_of_continuous_time_are_pymors() -> None:
    plant = chain()
    truth = LTIModel.from_matrices(plant.A, plant.B, plant.C).hsv()
    for dt in (0.01, 0.5):
        found = compressm.reduce(plant, order=4, dt=dt, discretise="bilinear").hsv[:12]
        np.testing.assert_allclose(found.numpy(), truth, rtol=1e-6, atol=1e-9)


def test_the_reduced_discrete_model_is_pymors() -> None:
    system = DiagonalSystem.from_model(chain(), dt=0.3)
    A, B, C, D = system.to_abcd()
    truth = BTReductor(LTIModel.from_matrices(A, B, C, D, sampling_time=0.3)).reduce(5)
    found = compressm.reduce(system, order=5)
    assert found.system.order == 5
    for omega in (0.01, 0.1, 0.5, 2.0):
        theirs = truth.transfer_function.eval_tf(np.exp(1j * omega))
        ours = response(found.system, torch.tensor([omega], dtype=torch.float64))[0].numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("error", [0.5, 0.05, 1e-4])
def test_error_takes_the_smallest_order_whose_bound_keeps_it_also_in_continuous_time(error: float) -> None:
    plant = chain()
    found = compressm.reduce(plant, error=error, dt=0.2, discretise="bilinear")
    r = found.system.order
    assert 2 * float(found.hsv[r:].sum()) <= error < 2 * float(found.hsv[r - 1 :].sum())
    assert found.certificate.bound <= error
    smaller = found.system.to_scipy(continuous=True)
    A, B = np.block([[plant.A, np.zeros((12, r))], [np.zeros((r, 12)), smaller.A]]), np.vstack([plant.B, smaller.B])
    difference = signal.StateSpace(A, B, np.hstack([plant.C, -smaller.C]), plant.D - smaller.D)
    assert gain(difference, 1j * np.logspace(-3, 3, 2000)).max() <= error


def test_a_real_pole_counts_once() -> None:
    A, B = np.diag([0.9, 0.5, -0.3, 0.1]), np.ones((4, 1))
    found = compressm.reduce(DiagonalSystem.from_abcd(A, B, B.T), order=3)
    assert (found.before.order, found.system.order) == (4, 3)
    assert "order 4 → 3" in str(found)


def test_nothing_smaller_keeps_an_error_of_zero() -> None:
    system = DiagonalSystem.from_model(chain(), dt=0.3)
    found = compressm.reduce(system, error=0)
    assert found.system is system
    assert found.certificate.valid


def test_a_feed_through_goes_through_unchanged() -> None:
    plant = chain()
    plant = signal.StateSpace(plant.A, plant.B, plant.C, [[7.0]])
    assert compressm.reduce(plant, order=4, dt=0.3).system.to_abcd()[3] == 7.0


def test_the_step_response_of_the_plot_is_scipys() -> None:
    system = DiagonalSystem.from_model(chain(), dt=0.3)
    _, (truth,) = signal.dstep(system.to_scipy(), n=40)
    np.testing.assert_allclose(step_response(system, 40)[:, :, 0].numpy(), truth, atol=1e-9)
    figure = compressm.reduce(system, order=4).plot()
    assert len(figure.axes) == 4
    assert all(np.isfinite(line.get_ydata()).all() for axis in figure.axes for line in axis.lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of error= and order="),
        ({"error": 0.1, "order": 3}, "exactly one"),
        ({"error": -1.0}, "error must be a number, at least 0"),
        ({"order": 0}, "order must be a whole number, at least 1"),
        ({"order": 2.5}, "order must be a whole number"),
    ],
)
def test_unfit_limits_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidRankRuleError, match=message):
        compressm.reduce(chain(), dt=0.1, **arguments)  # pyright: ignore[reportArgumentType]


def test_a_batch_is_refused() -> None:
    batch = DiagonalSystem(torch.full((2, 1), 0.5), torch.ones(2, 1, 1), torch.ones(2, 1, 1))
    with pytest.raises(InvalidSystemError, match="reduce them one by one"):
        compressm.reduce(batch, order=1)


def test_a_system_whose_order_is_allowed_stays_as_it_is() -> None:
    plant = signal.ZerosPolesGain(*signal.butter(4, 0.2, output="zpk"), dt=1.0)
    for order in (4, 9):
        found = compressm.reduce(plant, order=order)
        assert found.system.order == 4
        assert found.certificate.bound == 0
