"""Damage or noise: the loss by a cut, and its standard error, from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from compressm.training.noise import Look, Loss, estimate, foreseen, quantile

STEPS_BEFORE, STEPS_AFTER = (2, 4, 6, 8), (12, 14, 16)


def looks(steps: tuple[int, ...], values: np.ndarray) -> list[Look]:
    return [Look(step, float(value)) for step, value in zip(steps, values, strict=True)]


def test_a_constant_metric_has_no_noise_and_any_loss_counts() -> None:
    loss = estimate(looks((1, 2, 3), np.full(3, 0.75)), [Look(5, 0.5)])
    assert loss == Loss(0.25, 0.75, 0.0, 0.0, 1, 0)
    assert not loss.exceeds(0.25, 0.999)
    assert loss.exceeds(0.2499, 0.999)


def test_a_rising_metric_must_go_on_rising_and_a_falling_one_may_fall() -> None:
    times = np.array(STEPS_BEFORE)
    for slope in (0.01, -0.01):
        before = looks(STEPS_BEFORE, 0.5 + slope * (times - 8))
        (_, still), (_, on) = [
            (after, estimate(before, [Look(12, after)])) for after in (0.5, 0.5 + 4 * slope)
        ]  # the metric stands still after the cut, or goes on as before
        assert still.reference == pytest.approx(0.5 + 0.7 * 4 * slope)
        assert still.value == pytest.approx(0.7 * 4 * slope)  # a loss under a rising metric, a gain under a falling one
        assert on.value == pytest.approx(-0.3 * 4 * slope)
        assert still.training == pytest.approx(0.6 * 4 * abs(slope))  # there is no noise but that of the trend
        assert not on.exceeds(0.0, 0.95)


def test_the_standard_error_is_that_of_least_squares_with_twice_the_variance() -> None:
    """Independent: the covariance of ordinary least squares, at points where Theil and Sen's line is the same."""
    residuals = np.array([0.01, -0.01, -0.01, 0.01])
    slope = 0.002
    values = 0.5 + slope * np.array(STEPS_BEFORE) + residuals
    after = np.array([0.50, 0.52, 0.50])
    loss = estimate(looks(STEPS_BEFORE, values), looks(STEPS_AFTER, after))
    design = np.stack([np.ones(4), np.array(STEPS_BEFORE)], 1)
    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    line = loss.reference - (coefficients[0] + coefficients[1] * (8 + 0.7 * 6))
    # The median level of these residuals is their mean, and the median slope that of least squares.
    assert line == pytest.approx(0.0, abs=1e-12)
    flat = after - np.median(after)
    variance = 2 * ((residuals**2).sum() + (flat**2).sum()) / (2 + 1)
    place = np.array([1.0, 8 + 0.7 * 6])
    forecast = variance * (place @ np.linalg.inv(design.T @ design) @ place + 1 / 3)
    assert loss.freedom == 3
    trend = (0.6 * coefficients[1] * 6) ** 2 + (0.5 * (0 - coefficients[1]) * 6) ** 2  # the slope afterwards is 0
    assert loss.training == pytest.approx(math.sqrt(forecast + trend))


def test_one_wild_evaluation_does_not_move_the_reference() -> None:
    steps = tuple(range(1, 7))
    values = 0.8 + 0.001 * np.array(steps)
    wild = values.copy()
    wild[3] -= 0.5
    one, other = (estimate(looks(steps, v), [Look(9, 0.8)]) for v in (values, wild))
    assert abs(one.reference - other.reference) < 1e-3
    assert other.training is not None
    assert one.training is not None
    assert other.training > 100 * one.training + 0.1  # but it does say that there is noise


def test_pairs_judge_the_sampling_error_by_the_differences_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(400, generator=generator) < 0.7).float()
    changed = right.clone()
    changed[:12] = 1 - changed[:12]
    before = [Look(step, float(right.mean()), right) for step in (1, 2, 3)]
    loss = estimate(before, [Look(5, float(changed.mean()), changed)])
    difference = (right - changed).numpy()
    assert loss.examples == 400
    assert loss.value == pytest.approx(difference.mean())
    assert loss.sampling == pytest.approx(stats.sem(difference))
    unpaired = math.sqrt(2 * 0.7 * 0.3 / 400)
    assert loss.sampling < unpaired / 3
    assert loss.error == pytest.approx(math.hypot(loss.training or 0.0, loss.sampling))


def test_with_too_few_evaluations_it_is_said_that_the_noise_is_not_known() -> None:
    alone = estimate([Look(4, 0.9)], [Look(6, 0.8)])
    assert (alone.training, alone.error, alone.noise(0.99)) == (None, None, 0.0)
    assert alone.exceeds(0.05, 0.99)  # compared plainly
    scores = torch.tensor([1.0] * 9 + [0.0])
    paired = estimate([Look(4, 0.9, scores)], [Look(6, 0.8, scores.roll(1) * scores)])
    assert paired.training is None
    assert paired.error == paired.sampling > 0
    two = estimate([Look(2, 0.9), Look(4, 0.8)], [Look(6, 0.85)])  # trend or noise: taken for noise
    assert (two.reference, two.freedom) == (pytest.approx(0.85), 1)
    assert two.training == pytest.approx(math.sqrt(2 * 0.005 * 1.5))


@pytest.mark.parametrize("freedom", [1, 2, 5, 40])
def test_confidence_is_students(freedom: int) -> None:
    assert quantile(0.95, freedom) == pytest.approx(float(stats.t.ppf(0.95, freedom)))
    assert quantile(0.95, 0) == pytest.approx(float(stats.norm.ppf(0.95)))


def test_a_look_is_shifted_in_time_in_value_or_in_both() -> None:
    one = Look(3, 0.5)
    assert one.shifted(steps=2) == Look(5, 0.5)
    assert one.shifted(loss=0.25) == Look(3, 0.25)
    assert one.shifted(2, 0.25) == Look(5, 0.25)


def test_only_the_last_evaluations_count() -> None:
    old = looks((1, 2, 3), np.array([0.1, 0.9, 0.2]))
    recent = looks((10, 12, 14, 16, 18, 20), np.linspace(0.5, 0.6, 6))
    assert estimate([*old, *recent], [Look(24, 0.6)]) == estimate(recent, [Look(24, 0.6)])


def test_what_is_foreseen_is_what_is_found_when_nothing_changes() -> None:
    random = np.random.default_rng(0)
    before = looks(STEPS_BEFORE, 0.8 + 0.01 * random.standard_normal(4))
    one = estimate(before, [Look(14, 0.8)])
    assert one.training is not None
    seen, again = foreseen(before, STEPS_AFTER), foreseen(before, (14,))
    assert again.training == pytest.approx(one.training)
    assert seen.training is not None
    assert seen.freedom == one.freedom == 2
    # Three examinations instead of one: the variance of their mean is a third of one's.
    values = np.array([look.value for look in before])
    slope, level, *_ = stats.theilslopes(values, STEPS_BEFORE, method="joint")
    variance = 2 * ((values - level - slope * np.array(STEPS_BEFORE)) ** 2).sum() / 2
    assert one.training**2 - seen.training**2 == pytest.approx(variance * (1 - 1 / 3))


def test_the_error_is_what_it_says_on_noise_of_known_size() -> None:
    """Independent noise: the loss divided by its error spreads less than Student's distribution does by the square root
    of 1/2, since the variance is doubled for correlated noise, and a slope found by chance counts as uncertain, too."""
    random = np.random.default_rng(1)
    ratios, exceeded = [], 0
    for _ in range(2000):
        before = looks(STEPS_BEFORE, 0.8 + 0.01 * random.standard_normal(4))
        loss = estimate(before, looks(STEPS_AFTER, 0.8 + 0.01 * random.standard_normal(3)))
        assert loss.error is not None
        ratios.append(loss.value / loss.error)
        exceeded += loss.exceeds(0.0, 0.95)
    # Few degrees of freedom make the tails heavy, so the middle half of the values is compared.
    middle = np.quantile(np.abs(ratios), 0.5)
    assert 0.5 < middle * math.sqrt(2) / stats.t.ppf(0.75, 3) < 1
    assert exceeded / 2000 < 0.05
