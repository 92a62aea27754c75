"""Formulas against cases counted by hand, or by running the textbook loops and counting what they do."""

from __future__ import annotations

import math

import pytest

from compressm.lab.bench.roofline import (
    FLOAT,
    Rates,
    Work,
    delta_training,
    gla_training,
    lru_training_step,
    lti_training,
    measure_rates,
    reduction,
    selective_training,
    ssd_training,
    token,
)


def test_the_limit_is_the_slower_of_computing_and_moving() -> None:
    rates = Rates(gflops=2.0, gexps=0.5, gbytes=10.0)
    assert rates.limit_ms(Work(flops=4e6)) == pytest.approx(2.0)
    assert rates.limit_ms(Work(flops=4e6, exps=1e6)) == pytest.approx(4.0)
    assert rates.limit_ms(Work(flops=4e6, exps=1e6, bytes=50e6)) == pytest.approx(5.0)
    assert 3 * (Work(1, 2, 3) + Work(1, 1, 1)) == Work(6, 9, 12)


def test_selective_scan_by_hand() -> None:
    # One sequence, step, channel and state: 16 multiply-adds and 2 exponentials. Floats: u, delta, y, B, C; and u,
    # delta, gradients of y, u, delta, B, C, gradients of B, C.
    assert selective_training(1, 1, 1, 1) == Work(flops=32, exps=2, bytes=FLOAT * (5 + 9))


def test_a_token_by_hand() -> None:
    # Two sequences, 10 weights, 3 numbers of state, width 4: weights once, state twice, input and output.
    assert token(10, 3, 4, 2) == Work(flops=2 * 2 * (10 + 9), bytes=FLOAT * (10 + 2 * (2 * 3 + 2 * 4)))


def test_recurrence_counts_every_entry_of_the_matrices() -> None:
    """A wide, long system with few sequences: only the recurrence is cheap. Count its loops."""
    batch, length, n, p, q = 1, 1000, 3, 16, 16
    multiply_adds = 0
    for _ in range(batch * length):
        multiply_adds += 2 * n * p + 2 * q * n  # real times complex; real part of complex times complex
        multiply_adds += 4 * n  # complex times complex
    assert lti_training(batch, length, n, p, q).flops == 3 * 2 * multiply_adds


def test_short_sequences_are_cheapest_as_one_matrix() -> None:
    batch, length, n = 1000, 4, 64
    lower_triangle = sum(1 for t in range(length) for s in range(length) if s <= t)
    kernel = length * 2 * n  # multiply-adds: the real part of c lam^j b is a product of 2 n real numbers
    assert lti_training(batch, length, n, 1, 1).flops == 3 * 2 * (batch * lower_triangle + kernel)


def test_many_states_in_a_narrow_layer_are_cheapest_by_fourier_transforms() -> None:
    """There the cost of a sequence does not depend on n: doubling n adds only to the kernel."""
    batch, length, p = 64, 1024, 8
    once, twice = (lti_training(batch, length, n, p, p).flops for n in (2048, 4096))
    assert twice - once == 3 * 4 * 2048 * p * p * length
    per_step = (twice - 2 * (twice - once)) / (batch * length)
    assert per_step == 2 * 5 * 11 * 16 + 3 * 8 * 64


def test_training_step_adds_up() -> None:
    """Twice the blocks are twice the work, but for encoder, decoder and optimizer."""
    one, two, three = (lru_training_step(4, 32, 16, 8, layers) for layers in (1, 2, 3))
    assert two.flops - one.flops == three.flops - two.flops
    assert one.exps == 4 * 4 * 32 * 8
    # A layer with hardly any states: the GLU's products (3 passes of 2 * 8 * 16) are still there.
    assert lru_training_step(4, 32, 1, 8, 1).flops > 3 * 2 * 8 * 16 * 4 * 32


@pytest.mark.parametrize(("p", "n"), [(1, 1), (4, 2)])
def test_ssd_of_one_step_needs_no_state(p: int, n: int) -> None:
    # One step, one head: a score (n multiply-adds) and its product with x (p), forward and twice backward.
    work = ssd_training(1, 1, 1, p, n)
    assert work.flops == 3 * 2 * (n + p)
    assert work.bytes == FLOAT * (5 * p + 3 + 6 * n)


def test_ssd_never_exceeds_the_recurrence() -> None:
    """The recurrence: three multiply-adds for each entry of the state, in every step."""
    batch, length, heads, p, n = 2, 512, 4, 64, 128
    recurrence = 3 * 2 * 3 * batch * length * heads * p * n
    best = ssd_training(batch, length, heads, p, n).flops
    assert recurrence / 2 < best < recurrence


def test_gated_linear_attention_and_delta_rule_of_one_step_by_hand() -> None:
    """Of one step only the recurrence remains: its loops over the state, forward and twice backward."""
    p, n = 4, 3
    of_state = 2 * p * n  # a multiply-add, or what takes as long, for each entry
    # Decay, write, read.
    assert gla_training(1, 1, 1, p, n) == Work(flops=3 * 3 * of_state, exps=2 * n, bytes=FLOAT * (5 * p + 9 * n))
    # Read, write, read; decay.
    plain, gated = (delta_training(1, 1, 1, p, n, gated) for gated in (False, True))
    assert plain == Work(flops=3 * 3 * of_state, bytes=FLOAT * (5 * p + 6 * n + 3))
    assert gated == Work(flops=3 * 4 * of_state, bytes=FLOAT * (5 * p + 6 * n + 6))


def test_chunks_pay_for_the_delta_rule_only_with_a_decay() -> None:
    """Reading and writing the state costs the same in any chunk; only its decay is shared by the chunk's steps."""
    sizes = (2, 512, 4, 64, 128)
    recurrence = 3 * 2 * 3 * 2 * 512 * 4 * 64 * 128
    assert delta_training(*sizes, gated=False).flops == recurrence
    assert recurrence < delta_training(*sizes, gated=True).flops < 8 / 6 * recurrence


def test_reduction_grows_with_the_cube() -> None:
    assert reduction(64, 16).flops == 8 * reduction(32, 8).flops
    assert reduction(1, 1).flops == 2 * (41 * 8 + 4 * 4 * 2 + 25 * 8)


def test_rates_of_this_machine_are_plausible() -> None:
    rates = measure_rates(seconds=0.02)
    assert all(math.isfinite(rate) and rate > 0.01 for rate in rates.to_dict().values())
    assert rates.gflops / rates.gexps <= 20.0 * (1 + 1e-9)  # never below a polynomial at the product's rate
