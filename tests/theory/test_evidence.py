from __future__ import annotations

import pytest
import torch

from compressm.theory.covariance import balance_covariances
from compressm.theory.evidence import Covariances, shrunk, white_scales
from compressm.theory.gramians import real_gramians
from compressm.theory.systems import DiagonalSystem
from helpers import random_system


def gathered(x: torch.Tensor, adjoints: torch.Tensor, system: DiagonalSystem) -> Covariances:
    """From samples, shape ``(sequences, length, 2n)``."""
    spread = [
        ((samples / scale).mT @ (samples / scale)).square().sum()
        for samples, scale in zip((x, adjoints), white_scales(system), strict=True)
    ]
    sums = [samples.flatten(0, 1).mT @ samples.flatten(0, 1) for samples in (x, adjoints)]
    count = torch.tensor(float(x.shape[0]), dtype=torch.float64)
    return Covariances(count * x.shape[1], count, count, *sums, *spread)


def draws(seed: int, sequences: int, length: int, covariance: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(sequences, length, covariance.shape[0], dtype=torch.float64, generator=generator)
    return noise @ torch.linalg.cholesky(covariance).mT


@pytest.mark.parametrize(("sequences", "length"), [(200, 40), (400, 5)])
def test_independent_tokens_are_counted(sequences: int, length: int) -> None:
    system = random_system(0, 3)
    P, Q = real_gramians(system)
    # Tokens of a sequence of x are independent, those of an adjoint are all the same.
    x = draws(1, sequences, length, P)
    adjoints = draws(2, sequences, 1, Q + 1e-9 * torch.eye(6, dtype=torch.float64)).expand(-1, length, -1)
    tokens, single = gathered(x, adjoints, system).independent(system)
    assert float(tokens) == pytest.approx(sequences * length, rel=0.25)  # an estimate from so many sequences
    assert float(single) == pytest.approx(sequences, rel=0.25)


def test_sequences_of_different_weight_are_still_many() -> None:
    # Most sequences of a fitted model have small gradients, and some large ones. That is no lack of directions.
    system = random_system(0, 3)
    Q = real_gramians(system)[1]
    weights = torch.distributions.LogNormal(0.0, 0.5).sample((400, 1, 1)).double()
    adjoints = draws(2, 400, 30, Q) * weights
    _, count = gathered(draws(1, 400, 30, Q), adjoints, system).independent(system)
    assert float(count) > 200


def test_one_sequence_is_one_token() -> None:
    system = random_system(0, 3)
    x = draws(1, 1, 500, real_gramians(system)[0])
    assert [float(n) for n in gathered(x, x, system).independent(system)] == [1.0, 1.0]


def test_the_count_does_not_depend_on_the_scale_of_states() -> None:
    system = random_system(5, 3)
    x, adjoints = (draws(seed, 30, 20, gramian) for seed, gramian in zip((1, 2), real_gramians(system), strict=True))
    scale = torch.tensor([1e-3, 5.0, 1e4], dtype=torch.float64)
    other = DiagonalSystem(system.lam, system.B * scale[:, None], system.C / scale)
    both = torch.cat([scale, scale])
    before = gathered(x, adjoints, system).independent(system)
    after = gathered(x * both, adjoints / both, other).independent(other)
    torch.testing.assert_close(after, before)


def test_what_is_observed_again_adds_up_and_what_is_old_weighs_less() -> None:
    system = random_system(2, 2)
    x = draws(0, 6, 7, real_gramians(system)[0])
    parts = [gathered(x[i : i + 2], x[i : i + 2], system) for i in (0, 2, 4)]
    whole, summed = gathered(x, x, system), parts[0].plus(parts[1]).plus(parts[2])
    for name, value in whole.tensors().items():
        torch.testing.assert_close(summed.tensors()[name], value)
    assert whole.length == 7
    weighted = parts[0].plus(parts[1], 0.5)
    torch.testing.assert_close(weighted.P, (0.5 * parts[0].states + parts[1].states) / (0.5 * 14 + 14))
    # Weights 1/2 and 1, of two sequences each: worth (1/2 + 1/2 + 1 + 1)^2 / (1/4 + 1/4 + 1 + 1) sequences.
    assert float(weighted.sequences**2 / weighted.weights) == pytest.approx(9 / 2.5)


def test_shrinkage_is_the_mixture_with_white_noise_of_equal_power() -> None:
    system = random_system(3, 4)
    x, adjoints = draws(0, 9, 5, torch.eye(8, dtype=torch.float64)), draws(1, 9, 5, torch.eye(8, dtype=torch.float64))
    data = gathered(x, adjoints, system)
    white_P, white_Q = real_gramians(system)
    P, Q, *alphas = shrunk(system, data, 0.25)
    assert [float(alpha) for alpha in alphas] == [0.25, 0.25]
    power = torch.trace(data.P @ data.Q)
    torch.testing.assert_close(torch.trace(P @ data.Q), power)
    torch.testing.assert_close(torch.trace(data.P @ Q), power)
    torch.testing.assert_close((P - 0.75 * data.P) / (P - 0.75 * data.P).norm(), white_P / white_P.norm())
    torch.testing.assert_close((Q - 0.75 * data.Q) / (Q - 0.75 * data.Q).norm(), white_Q / white_Q.norm())
    counts = data.independent(system)
    for found, count in zip(shrunk(system, data)[2:], counts, strict=True):
        assert float(found) == pytest.approx(1 / (1 + float(count)))


def test_directions_that_the_data_have_not_shown_survive() -> None:
    system = random_system(4, 4)
    P, Q = real_gramians(system)
    x, adjoints = draws(0, 2, 1, P), draws(1, 2, 1, Q)  # two vectors in eight dimensions
    data = gathered(x, adjoints, system)
    bare, kept = balance_covariances(system, data, 0.0).hsv, balance_covariances(system, data).hsv
    assert float(bare[2]) <= 1e-6 * float(bare[0])
    assert float(kept[7]) >= 1e-4 * float(kept[0])


def test_states_that_nothing_reaches_count_as_one_token() -> None:
    system = random_system(0, 3)
    x = draws(1, 50, 20, real_gramians(system)[0])
    data = gathered(0 * x, x, system)
    nothing, many = data.independent(system)
    assert float(nothing) == 1
    assert float(many) > 100
    assert float(shrunk(system, data)[2]) == 0.5  # 1 / (N + 1)
