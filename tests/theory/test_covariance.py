from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressm.adapters import LRUAdapter
from compressm.adapters.changes import layer_values, write
from compressm.errors import InvalidRankRuleError, InvalidSystemError
from compressm.theory.balancing import balance, truncate
from compressm.theory.covariance import (
    CovarianceCertificate,
    balance_covariances,
    dominating,
    predicted_damage,
    truncate_covariances,
)
from compressm.theory.evidence import Covariances
from compressm.theory.gramians import real_gramians
from compressm.theory.systems import DiagonalSystem
from helpers import lru, random_system, real_matrices


def evidence(P: torch.Tensor, Q: torch.Tensor, length: int = 50, sequences: int = 20) -> Covariances:
    """Moments as of so many sequences that do not differ."""
    tokens = torch.tensor(float(length * sequences), dtype=torch.float64)
    count = torch.tensor(float(sequences), dtype=torch.float64)
    nothing = torch.zeros(P.shape[:-2], dtype=torch.float64)
    return Covariances(tokens, count, count, P * tokens, Q * tokens, nothing, nothing)


def covariance(seed: int, m: int, rank: int | None = None, decades: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(m, rank or m, dtype=torch.float64, generator=generator)
    scale = 10 ** (-decades * torch.rand(rank or m, dtype=torch.float64, generator=generator))
    return (factor * scale) @ factor.mT


def simulate(system: DiagonalSystem, u: torch.Tensor, left: torch.Tensor | None = None) -> torch.Tensor:
    """Outputs of a system, one step after the other."""
    A, B, C = (torch.from_numpy(x) for x in real_matrices(system))
    x, outputs = torch.zeros(u.shape[0], A.shape[0], dtype=torch.float64), []
    for now in u.unbind(1):
        x = x @ A.mT + now @ B.mT
        outputs.append(x @ C.mT)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("seed", range(5))
def test_gramians_as_moments_give_balanced_truncation(seed: int) -> None:
    system = random_system(seed, n=9)
    white, data = balance(system), balance_covariances(system, evidence(*real_gramians(system)))
    # Factors by eigenvectors keep amplitudes to 1e-6 of the largest; see CLIP.
    torch.testing.assert_close(data.hsv, white.hsv, rtol=1e-7, atol=1e-9 * float(white.hsv[0]))
    expected, found = truncate(white, 4), truncate_covariances(data, 4)
    omega = torch.linspace(0, math.pi, 40, dtype=torch.float64)
    torch.testing.assert_close(
        found.system.transfer_function(omega), expected.system.transfer_function(omega), rtol=1e-6, atol=1e-6
    )
    assert found.certificate.valid


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), decades=st.floats(-4, 4))
def test_singular_values_do_not_depend_on_the_basis(seed: int, n: int, decades: float) -> None:
    system = random_system(seed, n)
    P, Q = covariance(seed, 2 * n), covariance(seed + 1, 2 * n)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.polar(
        10 ** (decades * torch.rand(n, dtype=torch.float64, generator=generator)),
        6 * torch.rand(n, dtype=torch.float64, generator=generator),
    )
    order = torch.randperm(n, generator=generator)
    # x' = (scale x)[order] in stacked real coordinates; adjoints change by the inverse transpose.
    T = torch.cat(
        [
            torch.cat([torch.diag(scale.real), -torch.diag(scale.imag)], 1),
            torch.cat([torch.diag(scale.imag), torch.diag(scale.real)], 1),
        ]
    )[torch.cat([order, n + order])]
    back = torch.linalg.inv(T)
    other = DiagonalSystem(
        system.lam[order], (system.B * scale[:, None])[order], (system.C / scale)[:, order], real_output=True
    )
    moved = evidence(T @ P @ T.mT, back.mT @ Q @ back)
    for alpha in (0.0, 0.3):
        before = balance_covariances(system, evidence(P, Q), alpha).hsv
        after = balance_covariances(other, moved, alpha).hsv
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7 * float(before[0]))
    dense = torch.linalg.eigvals(P @ Q).real.clamp_min(0).sqrt().sort(descending=True).values
    torch.testing.assert_close(
        balance_covariances(system, evidence(P, Q), 0.0).hsv, dense, rtol=1e-5, atol=1e-6 * float(dense[0])
    )


@pytest.mark.parametrize("seed", range(5))
def test_full_rank_is_exact(seed: int) -> None:
    layer = lru(seed, d_model=4, d_state=12, r_min=0.2).double()
    adapter = LRUAdapter()
    system = adapter.read(layer_values(layer))
    data = evidence(covariance(seed, 24), covariance(seed + 50, 24))
    reduction = truncate_covariances(balance_covariances(system, data), 12, exceed=True)
    u = torch.randn(3, 60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before = layer(u).detach()
    write(layer, adapter.plan(layer_values(layer), reduction))
    assert reduction.certificate.valid
    assert (layer(u) - before).norm() <= 1e-6 * before.norm()  # a phase is written to 1e-8
    certificate = reduction.certificate
    assert isinstance(certificate, CovarianceCertificate)
    assert certificate.predicted_damage <= 1e-12 * float(balance_covariances(system, data).damage.sum())


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 10),
    closest=st.floats(0.5, 5.0),
    rank_P=st.floats(0.1, 1),
    rank_Q=st.floats(0.1, 1),
    share=st.floats(0, 1),
    exceed=st.booleans(),
)
def test_every_cut_is_stable(
    seed: int, n: int, closest: float, rank_P: float, rank_Q: float, share: float, exceed: bool
) -> None:
    system = random_system(seed, n, radius=(0.3, 1 - 10**-closest))
    ranks = [max(1, round(rank * 2 * n)) for rank in (rank_P, rank_Q)]
    data = evidence(covariance(seed, 2 * n, ranks[0], 6.0), covariance(seed + 1, 2 * n, ranks[1], 6.0))
    states = max(1, round(share * n))
    reduction = truncate_covariances(balance_covariances(system, data, 0.0), states, exceed)
    certificate = reduction.certificate
    assert isinstance(certificate, CovarianceCertificate)
    assert certificate.spectral_radius < 1, certificate
    assert float(reduction.system.lam.abs().max()) == certificate.spectral_radius
    assert exceed or reduction.system.n <= states
    assert certificate.valid or all("ill conditioned" in failure for failure in certificate.failures)


def unstable_example() -> tuple[DiagonalSystem, Covariances]:
    """States of two modes that move together, as under an input that the data never vary."""
    for seed in range(200):
        system = random_system(seed, 4, radius=(0.9, 0.999))
        data = evidence(covariance(seed, 8, 2, 0.5), covariance(seed + 1, 8, 2, 0.5))
        plain = truncate(balance_covariances(system, data, 0.0), 2, lower=False)
        if plain.certificate.spectral_radius >= 1:
            return system, data
    raise AssertionError("no example")


def test_the_fallback_is_named_and_one_matrix_is_enough() -> None:
    system, data = unstable_example()
    reduction = truncate_covariances(balance_covariances(system, data, 0.0), 2)
    certificate = reduction.certificate
    assert isinstance(certificate, CovarianceCertificate)
    assert certificate.valid
    assert certificate.fallback in ("states", "adjoints")
    assert certificate.predicted_damage > 0


@pytest.mark.parametrize("seed", range(6))
def test_the_dominating_matrix_solves_its_stein_equation(seed: int) -> None:
    system, P = random_system(seed, 5), covariance(seed, 10)
    A = torch.from_numpy(real_matrices(system)[0])
    for lam, matrix in ((system.lam, A), (system.lam.conj(), A.mT)):
        X = dominating(lam, P)
        M = P - matrix @ P @ matrix.mT
        values, vectors = torch.linalg.eigh(M)
        positive = (vectors * values.clamp_min(0)) @ vectors.mT
        torch.testing.assert_close(X - matrix @ X @ matrix.mT, positive, atol=1e-9 * float(X.norm()), rtol=0)
        assert float(torch.linalg.eigvalsh(X - P)[0]) >= -1e-9 * float(X.norm())
    # A Gramian is its own.
    gramian = real_gramians(system)[0]
    torch.testing.assert_close(dominating(system.lam, gramian), gramian)


@pytest.mark.parametrize("seed", range(4))
def test_predicted_damage_is_the_discarded_squares(seed: int) -> None:
    system = random_system(seed, 8)
    data = evidence(*real_gramians(system), length=37)
    balancing = balance_covariances(system, data, 0.0)
    reduction = truncate_covariances(balancing, 3)
    order = int((reduction.left.norm(dim=1) > 0).sum())
    certificate = reduction.certificate
    assert isinstance(certificate, CovarianceCertificate)
    expected = 37 / 2 * float(balancing.hsv[order:].square().sum())
    assert certificate.predicted_damage == pytest.approx(expected, rel=1e-6)
    assert float(balancing.damage.sum()) == pytest.approx(37 / 2 * float(balancing.hsv.square().sum()))
    assert float(predicted_damage(data, reduction.left, reduction.right)) == pytest.approx(expected, rel=1e-6)


def test_the_output_error_of_static_states_is_the_predicted_one() -> None:
    # Without memory the projection of the states is all that a cut does: the prediction is then the simulated error.
    system = random_system(3, 6, p=12)
    system = DiagonalSystem(torch.full((6,), 1e-12), system.B, system.C)
    u = torch.randn(40, 50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A, B, _ = real_matrices(system)
    x = (u @ torch.from_numpy(B).mT).flatten(0, 1)
    data = evidence(x.mT @ x / len(x), covariance(4, 12))
    reduction = truncate_covariances(balance_covariances(system, data, 0.0), 3)
    certificate = reduction.certificate
    assert isinstance(certificate, CovarianceCertificate)
    y, y_r = simulate(system, u), simulate(reduction.system, u)
    measured = float((y - y_r).square().sum() / y.square().sum())
    assert 0.01 < measured == pytest.approx(certificate.relative_output_error, rel=1e-6)
    assert A.shape == (12, 12)


def test_batches_of_systems_fall_back_one_by_one() -> None:
    system, data = unstable_example()
    calm = DiagonalSystem(system.lam, system.B, system.C)
    P, Q = real_gramians(calm)
    batch = DiagonalSystem(*(torch.stack([getattr(calm, x)] * 2) for x in ("lam", "B", "C")))
    both = evidence(torch.stack([P, data.P]), torch.stack([Q, data.Q]))
    reduction = truncate_covariances(balance_covariances(batch, both, 0.0), 2)
    first, second = reduction.certificates
    assert isinstance(first, CovarianceCertificate)
    assert isinstance(second, CovarianceCertificate)
    assert first.fallback == "none"
    assert second.fallback != "none"
    alone = truncate_covariances(balance_covariances(system, data, 0.0), 2)
    torch.testing.assert_close(reduction.system.kernel(9)[1], alone.system.kernel(9))


def test_the_certificate_is_plain_json_and_promises_no_bound() -> None:
    system = random_system(0, 5)
    certificate = truncate_covariances(balance_covariances(system, evidence(*real_gramians(system))), 2).certificate
    stored = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))
    assert stored["bound"] is None
    assert stored["predicted_damage"] > 0
    assert stored["fallback"] == "none"
    assert 0 < stored["h2_error"] < stored["h2_norm"]


def test_a_cut_that_is_only_tried_is_the_same() -> None:
    for system, data in ((random_system(1, 6), None), unstable_example()):
        seen = evidence(*real_gramians(system)) if data is None else data
        balancing = balance_covariances(system, seen, 0.0)
        full, quick = truncate_covariances(balancing, 2), truncate_covariances(balancing, 2, quick=True)
        assert torch.equal(full.system.B, quick.system.B)
        for name in ("spectral_radius", "condition", "predicted_damage", "fallback", "valid"):
            assert getattr(full.certificate, name) == getattr(quick.certificate, name)
        assert math.isnan(quick.certificate.h2_error)


def test_bad_evidence_is_refused() -> None:
    system = random_system(0, 4)
    good = evidence(*real_gramians(system))
    broken = good.states.clone()
    broken[0, 0] = math.nan
    cases = [
        (replace(good, states=torch.eye(6, dtype=torch.float64)), "4 states needs"),
        (replace(good, states=broken), "states are not finite"),
        (replace(good, adjoints=-good.adjoints), "positive semidefinite"),
        (replace(good, tokens=torch.zeros(())), "at least one"),
    ]
    for bad, message in cases:
        with pytest.raises(InvalidSystemError, match=message):
            balance_covariances(system, bad)
    with pytest.raises(InvalidSystemError, match=r"share in \[0, 1\]"):
        balance_covariances(system, good, 1.5)
    with pytest.raises(InvalidSystemError, match="real output"):
        balance_covariances(replace(system, real_output=False), good)
    with pytest.raises(InvalidRankRuleError, match="at least 1"):
        truncate_covariances(balance_covariances(system, good), 0)


def test_white_noise_alone_is_balanced_truncation_up_to_a_factor() -> None:
    # alpha = 1 leaves of the data only their power: P and Q are Gramians, each times a number.
    system = random_system(2, n=5)
    data = evidence(covariance(1, 10), covariance(2, 10))
    white, mixed = balance(system), balance_covariances(system, data, 1.0)
    torch.testing.assert_close(mixed.hsv / mixed.hsv[0], white.hsv / white.hsv[0], rtol=1e-6, atol=1e-9)
    assert (float(mixed.alpha_P), float(mixed.alpha_Q)) == (1.0, 1.0)
    bare = balance_covariances(system, data, 0.0)
    torch.testing.assert_close(bare.P, data.P)
    torch.testing.assert_close(bare.Q, data.Q)
    for alpha in (-1e-9, 1 + 1e-9):
        with pytest.raises(InvalidSystemError, match="alpha"):
            balance_covariances(system, data, alpha)
