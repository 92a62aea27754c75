"""A corpus of hard systems through every way of cutting, each certificate checked in 50 digits.

    python benchmarks/hard_systems.py [--systems 2000] [--exact 200] [--json results/hard_systems.json]

Drawn by seed: crowded and repeated poles, poles up to 1 - 1e-9, entries from 1e-12 to 1e12, input and output matrices
without full rank, nearly cancelling modes, up to 600 states. Every system is balanced and truncated by both methods at
several sizes and by every rank rule. A violation is: an exception that is not one of compressm's own; a certificate
that calls itself valid and holds something not finite; an H-infinity error above bound and allowance at any frequency
tried; an H2 error that mpmath does not confirm. For a sample all of it is computed again in 50 digits.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mpmath
import torch
from rich.progress import track
from stored import store
from torch import Tensor

from compressm.errors import CompressmError
from compressm.theory.balancing import Method, Reduction, balance, truncate
from compressm.theory.rank_rule import RankRule
from compressm.theory.ranks import choose_ranks
from compressm.theory.systems import DiagonalSystem

KINDS = ("crowded", "edge", "scaled", "deficient", "cancelling", "repeated", "real", "huge")
RULES = (
    RankRule(tolerance=0.02), RankRule(tolerance=0.5), RankRule(states=1), RankRule(fraction=0.5),
    RankRule(max_error=1.0), RankRule(total_states=3), RankRule(tolerance=1e-6, multiple_of=4),
)  # fmt: skip
FREQUENCIES = 24


def hard_system(seed: int) -> tuple[str, DiagonalSystem]:
    """A system and its kind."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.complex128, generator=generator)

    kind = KINDS[seed % len(KINDS)]
    if kind == "huge" and seed % (25 * len(KINDS)) != KINDS.index("huge"):
        kind = "edge"  # few of them: they take seconds each
    n = 600 if kind == "huge" else int(torch.randint(1, 25, (), generator=generator))
    p, q = (int(torch.randint(1, 4, (), generator=generator)) for _ in range(2))
    closest = float(uniform(0.05, 9 if kind == "edge" else 4))
    radius, phase = 1 - 10 ** -uniform(0.01, closest, n), uniform(0, 2 * math.pi, n)
    B, C = normal(n, p), normal(q, n)
    if kind == "crowded":
        width = 10 ** float(uniform(-15, -2))
        phase = phase[0] + width * uniform(-1, 1, n)
        radius = radius[0] * (1 - width * uniform(0, 1, n))
    elif kind == "scaled":
        B, C = B * 10 ** uniform(-12, 12, n)[:, None], C * 10 ** uniform(-12, 12, n)
    elif kind == "deficient":
        B = normal(n, 1) @ normal(1, p)
        C = torch.zeros_like(C) if seed % 3 == 0 else normal(q, 1) @ normal(1, n)
        B[: n // 2] = 0
    elif kind == "cancelling" and n > 1:  # two modes that all but cancel each other
        half = n // 2
        radius[half : 2 * half], phase[half : 2 * half] = radius[:half] * (1 - 1e-8), phase[:half]
        B[half : 2 * half], C[:, half : 2 * half] = B[:half], -C[:, :half] * (1 + 1e-8)
    elif kind == "repeated":
        radius, phase = radius[:1].expand(n).clone(), phase[:1].expand(n).clone()
    lam = torch.polar(radius, phase)
    if kind == "real":
        lam = (radius * torch.where(phase > math.pi, -1.0, 1.0)).to(torch.complex128)
    return kind, DiagonalSystem(lam, B, C, real_output=seed % 5 != 0)


def truncations(system: DiagonalSystem) -> Iterator[tuple[str, Method, int]]:
    """Every way of cutting: its name, the method and the number of states."""
    methods: tuple[Method, ...] = ("real", "complex") if system.real_output else ("complex",)
    for method in methods:
        energy = balance(system, method).energy
        for rule in RULES:
            yield repr(rule), method, choose_ranks({"": energy}, rule)[""]
        for states in sorted({1, system.n // 3, system.n - 1, system.n} - {0}):
            yield f"{states} states", method, states


def problems(system: DiagonalSystem, reduction: Reduction, exact: bool) -> list[str]:
    """What is wrong with a reduction whose certificate calls itself valid."""
    certificate, found = reduction.certificate, []
    figures = (certificate.bound, certificate.hinf_error, certificate.h2_error, certificate.spectral_radius)
    tensors = (reduction.system.lam, reduction.system.B, reduction.system.C, reduction.left, reduction.right)
    if not all(map(math.isfinite, figures)) or not all(bool(t.isfinite().all()) for t in tensors):
        return ["valid, but not finite"]
    if not certificate.spectral_radius < 1:
        found.append("valid, but not stable")
    allowed = certificate.bound * (1 + 1e-9) + certificate.rounding_allowance
    error = system.minus(reduction.system)
    # Where errors peak: at the angles of slow poles.
    omega = torch.cat([torch.linspace(0, 2 * math.pi, FREQUENCIES), system.lam[:FREQUENCIES].angle()]).double()
    peak = float(torch.linalg.matrix_norm(error.transfer_function(omega), 2).max())
    if peak > allowed * (1 + 1e-9):
        found.append(f"error {peak:.6g} above bound and allowance {allowed:.6g}")
    if exact:
        peak = max(exact_gain(error, w) for w in [*omega[::4].tolist(), certificate.hinf_frequency])
        if peak > allowed * (1 + 1e-9):
            found.append(f"exact error {peak:.6g} above bound and allowance {allowed:.6g}")
        h2 = exact_h2(error)
        # The certificate's is the root of a difference: half the digits of what the parts would be without cancelling.
        slack = 1e-6 * h2 + 1e-7 * certificate.h2_norm + certificate.rounding_allowance
        if abs(h2 - certificate.h2_error) > slack:
            found.append(f"exact H2 error {h2:.9g}, certified {certificate.h2_error:.9g}")
    return found


def _modes(system: DiagonalSystem) -> tuple[list, list[list], list[list]]:
    lam, B, C = (x.tolist() for x in system.modes())
    exact = lambda rows: [[mpmath.mpc(v) for v in row] for row in rows]  # noqa: E731
    return [mpmath.mpc(v) for v in lam], exact(B), exact(C)


def exact_gain(system: DiagonalSystem, omega: float) -> float:
    """The largest singular value of the transfer function at a frequency, in 50 digits."""
    with mpmath.workdps(50):
        lam, B, C = _modes(system)
        z = mpmath.expj(mpmath.mpf(omega))
        G = mpmath.matrix(len(C), len(B[0]))
        for i, pole in enumerate(lam):
            gain = z / (z - pole)
            for row in range(len(C)):
                for column in range(len(B[0])):
                    G[row, column] += C[row][i] * gain * B[i][column]
        return float(max(mpmath.svd_c(G, compute_uv=False)))


def exact_h2(system: DiagonalSystem) -> float:
    """``sqrt(sum_ij (C* C)_ij (B B*)_ji / (1 - conj(lam_i) lam_j))``, in 50 digits."""
    with mpmath.workdps(50):
        lam, B, C = _modes(system)
        total = mpmath.mpf(0)
        for i in range(len(lam)):
            for j in range(len(lam)):
                seen = mpmath.fsum(mpmath.conj(row[i]) * row[j] for row in C)
                reached = mpmath.fsum(b * mpmath.conj(a) for a, b in zip(B[i], B[j], strict=True))
                total += mpmath.re(seen * reached / (1 - mpmath.conj(lam[i]) * lam[j]))
        return float(mpmath.sqrt(max(total, 0)))


def examine(seed: int, exact: bool) -> tuple[str, Counter[str], list[str]]:
    """A system through all truncations: its kind, what was counted, and the violations."""
    kind, system = hard_system(seed)
    counts, violations = Counter[str](), list[str]()
    try:
        for name, method, states in truncations(system):
            counts["truncations"] += 1
            reduction = truncate(balance(system, method), states)
            if not reduction.certificate.valid:
                counts["refused"] += 1
                continue
            counts["certificates"] += 1
            counts["certificates checked in 50 digits"] += exact
            violations += [f"{kind} {seed} {method} {name}: {p}" for p in problems(system, reduction, exact)]
    except CompressmError:
        counts["named errors"] += 1
    except Exception as error:
        violations.append(f"{kind} {seed}: {type(error).__name__}: {error}")
    return kind, counts, violations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", type=int, default=2000)
    parser.add_argument("--exact", type=int, default=200, help="systems checked in 50 digits")
    parser.add_argument("--json", type=Path, default=Path("results/hard_systems.json"))
    arguments = parser.parse_args()
    kinds, counts, violations = Counter[str](), Counter[str](), list[str]()
    every = max(1, arguments.systems // max(1, arguments.exact))
    for seed in track(range(arguments.systems), "systems"):
        huge = hard_system(seed)[1].n > 100
        kind, counted, wrong = examine(seed, exact=not huge and seed % every == 0)
        kinds[kind] += 1
        counts.update(counted)
        violations += wrong
        for line in wrong:
            print(line)
    store(
        arguments.json, systems=arguments.systems, kinds=dict(kinds), counts=dict(counts), violations=len(violations),
        examples=violations[:20],
    )  # fmt: skip
    print(f"{arguments.systems} systems, {dict(counts)}: {len(violations)} violations")


if __name__ == "__main__":
    main()
