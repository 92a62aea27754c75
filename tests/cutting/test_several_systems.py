"""Layers with a system per channel: what their spectra and reports say of all of them together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov

import compressm
from compressm.adapters import find_layers
from compressm.adapters.changes import layer_values
from compressm.layers import S4D
from compressm.theory.recurrence import balance_selective, moments
from compressm.theory.systems import DiagonalSystem
from helpers import random_signals, real_matrices


def hankel_singular_values(layer: S4D) -> np.ndarray:
    """By channel, from the Gramians that scipy finds, shape ``(channels, 2n)``."""
    ((_, adapter),) = find_layers(layer).values()
    channels = adapter.read(layer_values(layer))  # type: ignore[union-attr]
    found = []
    for lam, B, C in zip(channels.lam, channels.B, channels.C, strict=True):
        A, B_real, C_real = real_matrices(DiagonalSystem(lam, B, C))
        P = solve_discrete_lyapunov(A, B_real @ B_real.T)
        Q = solve_discrete_lyapunov(A.T, C_real.T @ C_real)
        found.append(np.sqrt(np.linalg.eigvals(P @ Q).real.clip(0)))
    return np.sort(np.array(found), axis=1)[:, ::-1]


def uneven() -> S4D:
    """Three channels whose outputs differ by factors of ten, and whose spectra fall differently."""
    torch.manual_seed(0)
    layer = S4D(3, 6, dt_min=0.05, dt_max=0.5).double()
    with torch.no_grad():
        scale = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)[:, None]
        fade = torch.tensor([0.5, 0.9, 0.1], dtype=torch.float64)[:, None] ** torch.arange(6)
        layer.C_re *= scale * fade
        layer.C_im *= scale * fade
    return layer


def test_the_reported_values_are_the_mean_over_the_channels() -> None:
    layer = uneven()
    values = hankel_singular_values(layer)
    spectrum = compressm.analyze(layer).layers[0]
    np.testing.assert_allclose(spectrum.hsv.numpy(), values, rtol=1e-4, atol=1e-6 * values.max())
    report = compressm.compress(layer, states=3).layers[0]
    assert len(report.hsv) == 12
    np.testing.assert_allclose(report.hsv, values.mean(0), rtol=1e-4, atol=1e-6 * values.max())


def test_what_is_discarded_is_the_share_of_the_channel_that_loses_most() -> None:
    layer = uneven()
    energy = hankel_singular_values(layer).reshape(3, 6, 2).sum(-1)
    shares = energy[:, ::-1].cumsum(1)[:, ::-1] / energy.sum(1, keepdims=True)  # from the r-th state on
    spectrum = compressm.analyze(layer).layers[0]
    expected = [*shares[:, 1:].max(0), 0.0]
    np.testing.assert_allclose(spectrum.discarded(), expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(spectrum.mean_energy(), energy.mean(0), rtol=1e-4, atol=1e-6 * energy.max())
    # The three channels lose different shares, so that neither their mean nor one of them will do.
    assert np.ptp(shares[:, 1]) > 0.1
    for tolerance in (0.3, 0.1, 0.03):
        wanted = next(r for r in range(1, 7) if expected[r - 1] <= tolerance)
        assert spectrum.states_for(tolerance) == wanted


def test_selective_layers_report_the_mean_over_their_groups() -> None:
    balancing = balance_selective(moments(random_signals(3, d=6, n=5, groups=3)))
    values = []
    for P, W in zip(balancing.P.numpy(), balancing.W.numpy(), strict=True):
        values.append(np.sort(np.sqrt(np.linalg.eigvals(P @ W).real.clip(0)))[::-1])
    np.testing.assert_allclose(balancing.mean_hsv().numpy(), np.mean(values, 0), rtol=1e-5)
    assert np.ptp([value[0] for value in values]) > 0.01 * values[0][0]


@pytest.mark.parametrize("states", [1, 2, 4])
def test_the_energy_kept_is_a_share_of_energy_and_not_of_its_square(states: int) -> None:
    layer = uneven()
    with torch.no_grad():  # no real eigenvalue is left over in slowly turning modes of one channel
        energy = hankel_singular_values(layer).reshape(3, 6, 2).sum(-1)
    report = compressm.compress(layer, states=states).layers[0]
    certificate = report.certificate
    assert certificate is not None
    best = energy[:, :states].sum() / energy.sum()
    squared = 1 - (energy[:, states:] ** 2).sum() / (energy**2).sum()
    assert report.energy_kept is not None
    assert report.energy_kept <= best * (1 + 1e-6)  # no cut keeps more; left-over real eigenvalues may cost a state
    assert report.energy_kept < (best + squared) / 2
