"""What a certificate refuses, held against frequency responses that are computed here."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from compressm.theory.certificate import certify
from compressm.theory.systems import DiagonalSystem
from helpers import random_system


def largest_gain(system: DiagonalSystem, kept: list[int]) -> float:
    """The largest singular value of the response of the modes that go, over 20001 frequencies."""
    gone = [i for i in range(system.n) if i not in kept]
    lam, B, C = system.lam.numpy()[gone], system.B.numpy()[gone], system.C.numpy()[:, gone]
    gains = []
    for omega in np.linspace(0, math.pi, 20001):
        z = np.exp(1j * omega)
        forward = C @ (B / (1 - lam / z)[:, None])
        mirrored = C.conj() @ (B.conj() / (1 - lam.conj() / z)[:, None])  # of the real part, the other half
        gains.append(np.linalg.norm((forward + mirrored) / 2, 2))
    return max(gains)


@pytest.mark.parametrize("seed", range(3))
def test_an_error_above_its_bound_is_refused_and_one_below_is_not(seed: int) -> None:
    system, kept = random_system(seed, n=5, radius=(0.3, 0.9)), [0, 2, 3]
    gain, scale = largest_gain(system, kept), float(system.mode_energy())
    parts = (system.lam[kept], system.B[kept], system.C[:, kept])
    above = certify(system, *parts, bound=1.001 * gain, scale=scale, condition=1.0)
    assert above.valid
    assert above.hinf_error == pytest.approx(gain, rel=1e-4)
    below = certify(system, *parts, bound=0.999 * gain, scale=scale, condition=1.0)
    assert not below.valid
    (reason,) = below.failures
    assert "H-infinity error" in reason
    assert "above its bound" in reason
    # Double precision explains next to nothing of an error of this size.
    assert below.rounding_allowance < 1e-9 * gain


def test_what_rounding_explains_is_not_held_against_a_cut() -> None:
    system = random_system(0, n=4, radius=(0.3, 0.9))
    moved = system.lam * (1 + 1e-15)
    certificate = certify(
        system, moved, system.B, system.C, bound=0.0, scale=float(system.mode_energy()), condition=1.0
    )
    assert 0 < certificate.hinf_error < certificate.rounding_allowance < 1e-11
    assert certificate.valid


@pytest.mark.parametrize(
    ("lam", "condition", "reason"),
    [
        (1.0, 1.0, "unstable: spectral radius 1"),
        (1.5, 1.0, "unstable: spectral radius 1.5"),
        (math.nan, 1.0, "not finite"),
        (0.5, 1e9, "ill conditioned: 1e\\+09"),
        (0.5, math.nan, "ill conditioned: nan"),
    ],
)
def test_systems_that_must_not_be_used_are_refused(lam: float, condition: float, reason: str) -> None:
    one = torch.ones(1, 1, dtype=torch.complex128)
    system = DiagonalSystem(torch.tensor([0.5]), one, one)
    reduced = torch.tensor([lam], dtype=torch.complex128)
    certificate = certify(system, reduced, one, one, bound=1.0, scale=2.0, condition=condition)
    assert not certificate.valid
    assert any(re.search(reason, failure) for failure in certificate.failures)
