from __future__ import annotations

import pytest
import torch

from compressm.errors import InvalidSystemError
from compressm.theory.certificate import hinf_norm
from compressm.theory.systems import DiagonalSystem
from helpers import random_system


@pytest.mark.parametrize("real_output", [True, False])
def test_kernel_is_the_response_of_the_recurrence_to_an_impulse(real_output: bool) -> None:
    system = random_system(0, real_output=real_output)
    for channel in range(system.p):
        x = torch.zeros(system.n, dtype=torch.complex128)
        for k in range(12):
            x = system.lam * x + (system.B[:, channel] if k == 0 else 0)
            y = system.C @ x
            torch.testing.assert_close(system.kernel(12)[k, :, channel], y.real if real_output else y)


@pytest.mark.parametrize("real_output", [True, False])
def test_transfer_function_is_the_fourier_transform_of_the_kernel(real_output: bool) -> None:
    system = random_system(1, radius=(0.2, 0.8), real_output=real_output)
    length = 256  # 0.8^256 is below 1e-24
    transform = torch.fft.fft(system.kernel(length).to(torch.complex128), dim=0)
    omega = 2 * torch.pi * torch.arange(length, dtype=torch.float64) / length
    torch.testing.assert_close(system.transfer_function(omega), transform)


@pytest.mark.parametrize("real_output", [True, False])
def test_h2_norm_is_the_energy_of_the_kernel(real_output: bool) -> None:
    system = random_system(2, radius=(0.2, 0.97), real_output=real_output)
    torch.testing.assert_close(system.h2_norm(), system.kernel(2000).abs().square().sum().sqrt())


@pytest.mark.parametrize("seed", range(10))
def test_hinf_norm_finds_the_peak(seed: int) -> None:
    system = random_system(seed, n=6, radius=(0.5, 0.9999))
    around = system.lam.angle()[:, None] + (1 - system.lam.abs())[:, None] * torch.linspace(
        -2, 2, 401, dtype=torch.float64
    )
    dense = torch.cat([torch.linspace(-torch.pi, torch.pi, 4001, dtype=torch.float64), around.reshape(-1)])
    truth = torch.linalg.matrix_norm(system.transfer_function(dense), ord=2).max()
    found, at = hinf_norm(system)
    assert 0.995 * truth <= found <= truth * (1 + 1e-4)  # the dense grid, too, can miss the very top
    value = torch.linalg.matrix_norm(system.transfer_function(torch.tensor([at], dtype=torch.float64)), ord=2)
    assert float(value) == pytest.approx(found)


def test_hinf_norm_of_a_wide_system_comes_from_below() -> None:
    system = random_system(3, n=20, p=40, q=36, radius=(0.5, 0.99))
    omega = torch.linspace(0, torch.pi, 500, dtype=torch.float64)
    omega = torch.cat([omega, system.lam.angle().abs()])
    truth = float(torch.linalg.matrix_norm(system.transfer_function(omega), ord=2).max())
    found, at = hinf_norm(system)
    here = torch.linalg.matrix_norm(system.transfer_function(torch.tensor([at], dtype=torch.float64)), ord=2)
    assert 0.9 * truth <= found <= float(here) * (1 + 1e-9)


def test_difference_of_systems() -> None:
    a, b = random_system(4), random_system(5, n=5)
    torch.testing.assert_close(a.minus(b).kernel(30), a.kernel(30) - b.kernel(30))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": torch.full((8,), 1.0 + 0j)}, "strictly inside the unit disc"),
        ({"lam": torch.full((8,), 1.2j)}, r"largest \|lam\| is 1.2"),
        ({"B": torch.full((8, 3), torch.nan + 0j)}, "B has 24 entries that are NaN or infinite"),
        ({"C": torch.full((2, 8), torch.inf + 0j)}, "C has 16 entries"),
        ({"B": torch.zeros(7, 3)}, "disagree"),
        ({"B": torch.zeros(8)}, "expected lam"),
        ({"C": torch.zeros(0, 8)}, "at least 1"),
        ({"lam": [0.5] * 8}, "lam must be a torch.Tensor"),
    ],
)
def test_bad_systems_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    system = random_system(0)
    parts = {"lam": system.lam, "B": system.B, "C": system.C, **change}
    with pytest.raises(InvalidSystemError, match=message):
        DiagonalSystem(**parts)
