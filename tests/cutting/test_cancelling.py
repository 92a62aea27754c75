"""Systems whose modes cancel each other: what is zero but for rounding is treated as zero, and nothing else is."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import compressm
from compressm.adapters import find_layers
from compressm.adapters.changes import layer_values
from compressm.adapters.cuts import rounds_too_much
from compressm.layers import LRU, S4D, S5, GatedLinearAttention, LinearAttention, Mamba, Mamba2
from compressm.theory.balancing import Method, balance, truncate
from compressm.theory.certificate import certify
from compressm.theory.rank_rule import RankRule
from compressm.theory.ranks import choose_ranks
from compressm.theory.systems import DiagonalSystem
from helpers import random_system

METHODS: tuple[Method, ...] = ("real", "complex")


def silent(seed: int, n: int = 9, closest: float = 0.99, real_share: float = 0.0) -> DiagonalSystem:
    """Real eigenvalues and inputs, and imaginary outputs, but for a share: ``Re(C x)`` is zero, or as small."""
    generator = torch.Generator().manual_seed(seed)
    lam = closest * (2 * torch.rand(n, dtype=torch.float64, generator=generator) - 1)
    B = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    C = torch.randn(3, n, dtype=torch.float64, generator=generator)
    return DiagonalSystem(lam + 0j, B + 0j, C * (real_share + 1j))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("closest", [0.9, 0.999, 1 - 1e-7])
def test_an_output_that_is_identically_zero_is_cut_and_not_refused(method: Method, closest: float) -> None:
    for seed in range(30):
        system = silent(seed, n=3 + seed % 10, closest=closest)
        assert float(system.kernel(50).abs().max()) < 1e-14 * float(system.mode_energy())
        balancing = balance(system, method)
        for states in (1, system.n // 2, system.n):
            certificate = truncate(balancing, states).certificate
            assert certificate.valid, certificate.failures
            assert certificate.h2_norm == certificate.relative_h2_error == 0
        if method == "real":
            assert not balancing.hsv.any()
            assert choose_ranks({"": balancing.energy}, RankRule(tolerance=0.02)) == {"": 1}


@pytest.mark.parametrize("share", [1e-3, 1e-6, 1e-9])
def test_what_is_small_is_not_zero(share: float) -> None:
    for seed in range(10):
        loud, quiet = silent(seed, real_share=1.0), silent(seed, real_share=share)
        full, small = balance(loud).hsv, balance(quiet).hsv  # the imaginary part is not heard
        kept = full > 1e-6 * full.max()
        torch.testing.assert_close(small[kept], share * full[kept], rtol=1e-4, atol=0.0)
        assert truncate(balance(quiet), 4).certificate.valid


def certificate_of(system: DiagonalSystem, lam: torch.Tensor, B: torch.Tensor, C: torch.Tensor, bound: float) -> Any:
    return certify(system, lam, B, C, bound, float(system.mode_energy()), 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_reduction_is_still_refused(method: Method) -> None:
    for seed in range(20):
        system = random_system(seed, n=10)
        reduction = truncate(balance(system, method), 5)
        good, reduced = reduction.certificate, reduction.system
        assert certificate_of(system, reduced.lam, reduced.B, reduced.C, good.bound).valid
        # The error on the closest frequency is a lower estimate, and a bound a millionth below it is broken.
        close = certificate_of(system, reduced.lam, reduced.B, reduced.C, good.hinf_error * (1 - 1e-6))
        assert "above its bound" in close.failures[0]
        # One more state, with the gain of three bounds at all frequencies, leaves at least two of them.
        B, C = torch.zeros(1, 3, dtype=torch.complex128), torch.zeros(2, 1, dtype=torch.complex128)
        B[0, 0], C[1, 0] = 1.0, 3 * good.bound
        lam, B, C = (
            torch.cat([reduced.lam, 0 * reduced.lam[:1]]),
            torch.cat([reduced.B, B]),
            torch.cat([reduced.C, C], 1),
        )
        assert "above its bound" in certificate_of(system, lam, B, C, good.bound).failures[0]


def test_a_reduction_of_a_silent_system_that_is_heard_is_refused() -> None:
    for seed in range(20):
        system = silent(seed)
        for loudness in (1e-3, 1e-6, 1e-9):
            B = system.B[:1] / system.B[0].norm()
            C = loudness * torch.ones(3, 1, dtype=torch.complex128)
            assert not certificate_of(system, system.lam[:1], B, C, 0.0).valid
        nothing = torch.zeros(1, dtype=torch.complex128)
        assert certificate_of(system, nothing, 0 * system.B[:1], 0 * system.C[:, :1], 0.0).valid


@torch.no_grad()
def silenced(layer: Any, name: str) -> Any:
    """Zero C, zero B, or a real output of zero."""
    for suffix in ("re", "im"):
        if hasattr(layer, f"{name}_{suffix}"):
            getattr(layer, f"{name}_{suffix}").zero_()
    return layer


@pytest.mark.parametrize("rule", [{"tolerance": 0.02}, {"states": 3}, {"max_error": 1e-3}, {"total_states": 5}])
@pytest.mark.parametrize(
    ("make", "name"), [(LRU, "B"), (LRU, "C"), (S5, "B"), (S5, "C"), (S4D, "C")]
)  # fmt: skip
def test_a_layer_without_input_or_output_is_cut_to_any_size(make: Any, name: str, rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = silenced(make(4, 12), name)
    u = torch.randn(2, 20, 4)
    before = layer(u)
    (report,) = compressm.compress(layer, **rule).layers
    assert report.outcome == "cut", report.reason
    assert report.energy_kept == 1.0  # of nothing, nothing goes
    torch.testing.assert_close(layer(u), before)
    assert report.states_after == 1


@torch.no_grad()
def imaginary(layer: Any, channels: Any) -> Any:
    """Channels of an S4D whose output is identically zero: real poles and imaginary output vectors."""
    layer.frequency[channels] = 0
    layer.C_re[channels] = 0
    return layer


def test_a_channel_that_is_zero_asks_for_no_states() -> None:
    torch.manual_seed(1)
    layer: Any = S4D(4, 16, dt_min=1e-2).double()
    with torch.no_grad():  # three channels that need few states
        layer.C_re[:, 3:] *= 1e-5
        layer.C_im[:, 3:] *= 1e-5
    free = copy.deepcopy(layer)
    imaginary(layer, slice(0, 1))
    adapter: Any = next(iter(find_layers(layer).values()))[1]
    assert float(adapter.read(layer_values(layer)).kernel(40)[0].abs().max()) == 0
    u = torch.randn(2, 40, 4, dtype=torch.float64)
    before = layer(u)
    (other,), (report,) = (compressm.compress(one, tolerance=0.02).layers for one in (free, layer))
    assert report.outcome == "cut", report.reason
    assert report.states_after <= other.states_after
    assert report.energy_kept is not None
    assert report.energy_kept >= 0.98
    assert bool((layer(u) - before).norm() < 0.1 * before.norm())
    whole = imaginary(S4D(4, 16).double(), slice(0, 4))
    (report,) = compressm.compress(whole, tolerance=0.02).layers
    assert (report.outcome, report.states_after, report.energy_kept) == ("cut", 1, 1.0)


def test_rounding_is_held_against_the_channel_that_it_is_made_in() -> None:
    # A loud channel of two equal modes, of which nothing is lost, but whose sum is rounded to a ten millionth. That is
    # more than the whole error of a quiet one, which has the larger error by truncation.
    torch.manual_seed(0)
    layer: Any = S4D(2, 8, dt_min=1e-2)
    with torch.no_grad():
        for poles in (layer.log_decay, layer.frequency):
            poles[0, 1] = poles[0, 0]
        for part in (layer.C_re, layer.C_im):
            part[0, :2] = 1e9 * torch.randn(2)
            part[0, 2:] = 0
            part[1] *= 0.1
    (report,) = compressm.compress(layer, states=2).layers
    assert report.outcome == "cut", report.reason
    assert report.certificate.rounding_error > report.certificate.h2_error  # type: ignore[union-attr]


def test_rounding_that_spoils_a_channel_is_still_refused() -> None:
    torch.manual_seed(0)
    layer: Any = S4D(2, 8, dt_min=1e-2)
    adapter: Any = next(iter(find_layers(layer).values()))[1]
    values = layer_values(layer)
    reduction = truncate(balance(adapter.read(values)), 4)
    first, second = reduction.certificates
    assert rounds_too_much(torch.zeros(2), reduction, values) is None
    for index, one in enumerate((first, second)):
        roundings = torch.zeros(2, dtype=torch.float64)
        roundings[index] = 2 * max(one.h2_error, 1e-3 * one.h2_norm)
        assert rounds_too_much(roundings, reduction, values) == pytest.approx(float(roundings[index]))
    # An error of the same size is nothing beside a channel that is a billion times louder.
    louder = replace(reduction, certificates=(first, replace(second, h2_norm=1e9 * first.h2_norm)))
    roundings = torch.tensor([2 * max(first.h2_error, 1e-3 * first.h2_norm), 0.0], dtype=torch.float64)
    assert rounds_too_much(roundings, louder, values) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mamba(4, 8),
        lambda: Mamba2(4, 8, head_dim=4),
        lambda: LinearAttention(4, 8, 2),
        lambda: GatedLinearAttention(4, 8, 2),
    ],
)
@pytest.mark.parametrize("rule", [{"tolerance": 0.02}, {"max_error": 1e-3}, {"total_states": 2}, {"states": 3}])
def test_a_selective_layer_that_stores_nothing_is_cut_to_any_size(make: Any, rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer: nn.Module = make()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("x_proj", "k_proj", "conv1d")):
                parameter.zero_()
    u = torch.randn(2, 12, 4)
    before = layer(u)
    (report,) = compressm.compress(layer, data=[u], max_reduction=1.0, **rule).layers
    assert report.outcome == "cut", report.reason
    assert report.states_after == rule.get("states", rule.get("total_states", 1))
    assert report.energy_kept == 1.0
    torch.testing.assert_close(layer(u), before)
