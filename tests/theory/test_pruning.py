from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressm.cutting import compress
from compressm.errors import InvalidRankRuleError
from compressm.layers import SequenceClassifier
from compressm.theory.pruning import SCORES, Score, prune
from compressm.theory.systems import DiagonalSystem
from helpers import random_system

ALL = tuple(SCORES)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from(ALL), st.booleans())
def test_what_is_kept_is_untouched_and_the_bound_holds(seed: int, states: int, score: Score, real: bool) -> None:
    system = random_system(seed, real_output=real)
    reduction = prune(system, states, score)
    left, right = reduction.left, reduction.right
    torch.testing.assert_close(left @ right, torch.eye(2 * states, dtype=torch.float64))
    stacked = torch.cat([system.B.real, system.B.imag])
    torch.testing.assert_close((left @ stacked)[:states], reduction.system.B.real)
    assert set(reduction.system.lam.tolist()) <= set(system.lam.tolist())
    certificate = reduction.certificate
    assert certificate.valid
    assert certificate.hinf_error <= certificate.bound * (1 + 1e-9) + 1e-11
    if states == system.n:
        assert certificate.bound == 0
        torch.testing.assert_close(reduction.system.kernel(9), system.kernel(9))


@pytest.mark.parametrize("score", [score for score in ALL if score != "random_modes"])
def test_scores_equal_brute_force(score: Score) -> None:
    """The mode's energy and gain from its impulse response and frequency response."""
    system = random_system(3, radius=(0.3, 0.9), real_output=False)
    values = SCORES[score](system).numpy()
    for i in range(system.n):
        one = DiagonalSystem(system.lam[i : i + 1], system.B[i : i + 1], system.C[:, i : i + 1], False)
        kernel = one.kernel(2000).numpy()
        expected = {
            "modal": abs(complex(system.lam[i])),
            "hinf": np.linalg.norm(one.transfer_function(torch.angle(one.lam)).numpy()[0], 2),
            "energy": (np.abs(kernel) ** 2).sum(),
        }[score]
        assert values[i] == pytest.approx(expected, rel=1e-9)


def test_random_modes_are_drawn_alike_from_one_system_and_anew_from_another() -> None:
    one, other = random_system(1), random_system(2)
    chosen = [prune(system, 4, "random_modes").system.lam for system in (one, one, other)]
    assert torch.equal(chosen[0], chosen[1])
    places = [
        [system.lam.tolist().index(value) for value in lam.tolist()]
        for system, lam in zip((one, other), chosen[1:], strict=True)
    ]
    assert places[0] != places[1]
    # Not by any score: over many systems every place is drawn about as often.
    counts = torch.zeros(8)
    for seed in range(400):
        system = random_system(seed)
        counts += torch.isin(system.lam.abs(), prune(system, 4, "random_modes").system.lam.abs())
    assert counts.min() > 150
    assert counts.max() < 250


@pytest.mark.parametrize("score", ALL)
def test_a_model_is_pruned_in_place(score: Score) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, d_model=6, d_state=16, norm="layer").eval()
    before = copy.deepcopy(model)
    report = compress(model, states=5, selection=score)
    assert report.layers[0].states_after == 5
    old, new = before.get_submodule("blocks.0.ssm"), model.get_submodule("blocks.0.ssm")
    left = {round(value, 5) for value in old.get_parameter("nu_log").tolist()}
    assert {round(value, 5) for value in new.get_parameter("nu_log").tolist()} <= left


@pytest.mark.parametrize("score", ["energy", "random_modes"])
def test_batches(score: Score) -> None:
    batch = [random_system(seed, p=1, q=1) for seed in (1, 2)]
    system = DiagonalSystem(*(torch.stack([getattr(one, name) for one in batch]) for name in ("lam", "B", "C")))
    reduction = prune(system, 3, score)
    for index, one in enumerate(batch):
        alone = prune(one, 3, score)
        torch.testing.assert_close(reduction.system.lam[index], alone.system.lam)
        torch.testing.assert_close(reduction.left[index], alone.left)
        assert reduction.certificates[index].bound == pytest.approx(alone.certificate.bound)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InvalidRankRuleError, match="states must be from 1 to 8; got 9"):
        prune(random_system(0), 9, "modal")
    with pytest.raises(
        InvalidRankRuleError, match="score must be one of modal, hinf, energy, random_modes; got 'best'"
    ):
        prune(random_system(0), 2, "best")  # type: ignore[arg-type]
