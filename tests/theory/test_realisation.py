"""Models of control theory as modes and back, against scipy and python-control."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.signal as signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressm import DiagonalSystem
from compressm.errors import InvalidSystemError

DT = 0.05


def matrices(seed: int, n: int = 5, p: int = 2, q: int = 3, continuous: bool = False) -> list[np.ndarray]:
    """A stable model with well separated poles."""
    random = np.random.default_rng(seed)
    A = random.normal(size=(n, n))
    poles = np.linalg.eigvals(A)
    A = A - (poles.real.max() + 0.1) * np.eye(n) if continuous else 0.95 * A / np.abs(poles).max()
    return [A, random.normal(size=(n, p)), random.normal(size=(q, n)), random.normal(size=(q, p))]


def gains(model: Any, points: np.ndarray) -> np.ndarray:
    """``C (z - A)^-1 B + D``, from the definition."""
    A, B, C, D = model
    return np.array([C @ np.linalg.solve(z * np.eye(len(A)) - A, B) + D for z in points])


CIRCLE = np.exp(1j * np.array([0.0, 0.3, 1.0, 2.5, np.pi]))
AXIS = 1j * np.array([0.0, 0.1, 1.0, 20.0])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 8))
def test_a_discrete_model_comes_back_with_the_same_transfer_function_and_order(seed: int, n: int) -> None:
    model = matrices(seed, n)
    system = DiagonalSystem.from_abcd(*model, dt=DT)
    assert system.dt == DT
    assert system.order == n
    assert system.to_abcd()[0].dtype == np.float64
    np.testing.assert_allclose(gains(system.to_abcd(), CIRCLE), gains(model, CIRCLE), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("discretise", ["zoh", "bilinear"])
def test_sampling_is_scipys_and_can_be_undone(discretise: Any) -> None:
    model = matrices(1, 6, continuous=True)
    system = DiagonalSystem.from_abcd(*model, dt=DT, discretise=discretise)
    sampled = signal.cont2discrete(tuple(model), DT, discretise)[:4]
    np.testing.assert_allclose(gains(system.to_abcd(), CIRCLE), gains(sampled, CIRCLE), rtol=1e-9)
    np.testing.assert_allclose(gains(system.to_abcd(continuous=True), AXIS), gains(model, AXIS), rtol=1e-9)


def test_a_complex_model_stays_complex() -> None:
    A, B, C, D = matrices(2)
    model = [A + 0.1j * np.eye(5) * 0.1, B, C, D]
    system = DiagonalSystem.from_abcd(*model)
    assert not system.real_output
    np.testing.assert_allclose(gains(system.to_abcd(), CIRCLE), gains(model, CIRCLE), rtol=1e-9)


def test_a_layers_matrices_give_its_impulse_response() -> None:
    generator = torch.Generator().manual_seed(0)
    lam = 0.9 * torch.exp(1j * torch.rand(4, generator=generator, dtype=torch.float64))
    B = torch.randn(4, 2, generator=generator, dtype=torch.complex128)
    C = torch.randn(3, 4, generator=generator, dtype=torch.complex128)
    layer = DiagonalSystem(lam, B, C)
    _, (response, *_) = signal.dimpulse((*layer.to_abcd(), 1.0), n=6)
    np.testing.assert_allclose(response, layer.kernel(6)[:, :, 0].numpy(), atol=1e-12)


def test_models_of_scipy_go_in_and_out() -> None:
    model = signal.StateSpace(*matrices(3), dt=DT)
    back = DiagonalSystem.from_model(model).to_scipy()
    assert back.dt == DT
    u = np.random.default_rng(0).normal(size=(200, 2))
    np.testing.assert_allclose(signal.dlsim(back, u)[1], signal.dlsim(model, u)[1], atol=1e-9)
    fraction = signal.TransferFunction([1.0, 0.2], [1.0, 1.2, 0.5])
    continuous = DiagonalSystem.from_model(fraction, dt=DT, discretise="bilinear").to_abcd(continuous=True)
    truth = np.polyval(fraction.num, AXIS) / np.polyval(fraction.den, AXIS)
    np.testing.assert_allclose(gains(continuous, AXIS)[:, 0, 0], truth, rtol=1e-9)


def test_models_of_python_control_go_in_and_out() -> None:
    control = pytest.importorskip("control")
    plant = control.tf([1.0, 0.2], [1.0, 1.2, 0.5])
    system = DiagonalSystem.from_model(plant, dt=DT)
    back = system.to_control(continuous=True)
    assert back.dt == 0
    np.testing.assert_allclose(back(AXIS[1:]), plant(AXIS[1:]), rtol=1e-9)
    assert system.to_control().dt == DT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiagonalSystem.from_abcd(np.eye(2), np.ones((2, 1)), np.ones((1, 2))), r"modulus 1, .* split off"),
        (lambda: DiagonalSystem.from_abcd([[0.9, 1.0], [0, 0.9]], np.ones((2, 1)), np.ones((1, 2))), "not diagonalis"),
        (lambda: DiagonalSystem.from_abcd([0.5], [[1.0]], [[1.0]]), r"A has shape \(1,\): expected a matrix"),
        (lambda: DiagonalSystem.from_abcd([[0.5]], [[1.0]], [[1.0, 2.0]]), "disagree"),
        (lambda: DiagonalSystem.from_abcd([["a"]], [[1.0]], [[1.0]]), "A must be a matrix of numbers"),
        (lambda: DiagonalSystem.from_abcd([[np.nan]], [[1.0]], [[1.0]]), "A has entries that are NaN"),
        (lambda: DiagonalSystem.from_abcd([[0.5]], [[1.0]], [[1.0]], dt=0), "dt must be a sampling time"),
        (lambda: DiagonalSystem.from_abcd([[0.5]], [[1.0]], [[1.0]], discretise="foh"), "discretise must be"),
        (lambda: DiagonalSystem.from_abcd([[0.5]], [[1.0]], [[1.0]], dt=1, discretise="zoh"), "left half-plane"),
        (lambda: DiagonalSystem.from_model("plant"), "model is str: expected a model of scipy.signal"),
        (lambda: DiagonalSystem.from_model(signal.lti([1.0], [1.0, 1.0])), "give the sampling time dt="),
        (lambda: DiagonalSystem.from_model(signal.dlti([1.0], [1.0, 0.5], dt=1.0), dt=2.0), "leave dt out"),
        (lambda: DiagonalSystem.from_abcd([[0.5]], [[1.0]], [[1.0]]).to_abcd(continuous=True), "of discrete time"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_remedy(call: Any, message: str) -> None:
    with pytest.raises(InvalidSystemError, match=message):
        call()


FILTERS = [
    lambda form: signal.butter(12, 0.2, output=form),
    lambda form: signal.butter(10, 5, fs=1000, output=form),
    lambda form: signal.ellip(12, 1, 60, 0.2, output=form),
    lambda form: signal.butter(10, [0.1, 0.3], btype="band", output=form),
]


@pytest.mark.parametrize("design", FILTERS)
def test_a_filter_of_high_order_comes_in_by_zeros_and_poles(design: Any) -> None:
    frequencies = np.linspace(0.001, 3.1, 60)
    _, truth = signal.freqz_zpk(*design("zpk"), frequencies)
    system = DiagonalSystem.from_model(signal.ZerosPolesGain(*design("zpk"), dt=DT))
    assert (system.dt, system.order) == (DT, len(design("zpk")[1]))
    np.testing.assert_allclose(gains(system.to_abcd(), np.exp(1j * frequencies))[:, 0, 0], truth, atol=1e-7)


def test_a_filter_whose_polynomials_have_lost_their_digits_is_sent_to_zeros_and_poles() -> None:
    with pytest.raises(InvalidSystemError, match=r"pass scipy\.signal\.ZerosPolesGain"):
        DiagonalSystem.from_model(signal.TransferFunction(*signal.ellip(12, 1, 60, 0.2), dt=DT))


def test_an_analog_filter_comes_in_as_polynomials_too() -> None:
    """Its coefficients span 25 orders of magnitude, which is a matter of units."""
    numerator, denominator = signal.cheby1(10, 1, 2 * np.pi * 50, analog=True)
    frequencies = np.array([1.0, 100.0, 300.0, 314.0])
    _, truth = signal.freqs(numerator, denominator, frequencies)
    for model in (
        signal.TransferFunction(numerator, denominator),
        signal.ZerosPolesGain(*signal.cheby1(10, 1, 2 * np.pi * 50, analog=True, output="zpk")),
    ):
        system = DiagonalSystem.from_model(model, dt=1e-3, discretise="bilinear")
        found = gains(system.to_abcd(continuous=True), 1j * frequencies)[:, 0, 0]
        np.testing.assert_allclose(found, truth, rtol=1e-8)


@pytest.mark.parametrize(
    ("zeros", "poles", "message"),
    [
        ([], [0.5, 0.5], r"poles 0.5\+0j and 0.5\+0j all but coincide"),
        ([], [0.5, 0.5 + 1e-10], "all but coincide"),
        ([0.1], [], "1 zeros and 0 poles"),
        ([0.1, 0.2], [0.5], "2 zeros and 1 poles"),
        ([], [1.5], "not inside the unit disc"),
    ],
)
def test_zeros_and_poles_without_modes_are_refused(zeros: list[float], poles: list[float], message: str) -> None:
    with pytest.raises(InvalidSystemError, match=message):
        DiagonalSystem.from_model(signal.ZerosPolesGain(zeros, poles, 1.0, dt=DT))
