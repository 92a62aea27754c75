"""Pruning of the states of a diagonal system, without a change of basis: methods of other authors, for comparison.

Every state of ``y = C (I - diag(lam)/z)^-1 B u`` is a mode of its own, with the transfer function
``c_i b_i / (1 - lam_i / z)``. The modes with the largest score are kept. The scores are

- ``"modal"``: ``|lam_i|``. Modal truncation keeps the modes that decay most slowly (Davison 1966).
- ``"hinf"``: ``||c_i|| ||b_i|| / (1 - |lam_i|)``, the H-infinity norm of the mode, the score of layer-adaptive state
  pruning (Gwak et al., NeurIPS 2024, arXiv 2411.02824).
- ``"energy"``: ``||c_i||^2 ||b_i||^2 / (1 - |lam_i|^2)``, the energy of its impulse response, as in AIRE-Prune (Padhy
  et al., ICLR 2026, arXiv 2602.00534).
- ``"random_modes"``: a random number, from a generator seeded by the modes' magnitudes (`generator_from`). The
  CompreSSM paper's published code keeps random states in this way.

The papers on ``"hinf"`` and ``"energy"`` also compare scores across layers; here the number of states of every layer is
given. No score accounts for modes that cancel or repeat each other, as Hankel singular values do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError
from compressm.runtime.random_state import generator_from
from compressm.theory.balancing import Reduction
from compressm.theory.certificate import Certificate, certify
from compressm.theory.systems import DiagonalSystem

Score = Literal["modal", "hinf", "energy", "random_modes"]


def _modal(system: DiagonalSystem) -> Tensor:
    return system.lam.abs()


def _hinf(system: DiagonalSystem) -> Tensor:
    return _gain(system) / (1 - system.lam.abs())


def _energy(system: DiagonalSystem) -> Tensor:
    return _gain(system).square() / (1 - system.lam.abs().square())


def _random_modes(system: DiagonalSystem) -> Tensor:
    magnitudes = system.lam.abs()
    rows = magnitudes.reshape(-1, system.n)
    return torch.stack([torch.rand(system.n, generator=generator_from(row)) for row in rows]).reshape_as(magnitudes)


SCORES: dict[str, Callable[[DiagonalSystem], Tensor]] = {
    "modal": _modal, "hinf": _hinf, "energy": _energy, "random_modes": _random_modes,
}  # fmt: skip


def _gain(system: DiagonalSystem) -> Tensor:
    return system.B.norm(dim=-1) * system.C.norm(dim=-2)


def prune(system: DiagonalSystem, states: int, score: Score) -> Reduction:
    """Keep the ``states`` modes with the largest score, unchanged.

    The certificate's bound is the sum of the H-infinity norms of the removed modes.

    Args:
        system: the system, shape ``(*batch,)``.
        states: how many to keep, from 1 to n.
        score: see the module's text.

    Raises:
        InvalidRankRuleError: no such number of states, or an unknown score.
    """
    if not 1 <= states <= system.n:
        raise InvalidRankRuleError(f"states must be from 1 to {system.n}; got {states}")
    if score not in SCORES:
        raise InvalidRankRuleError(f"score must be one of {', '.join(SCORES)}; got {score!r}")
    order = torch.argsort(SCORES[score](system), dim=-1, descending=True, stable=True)
    kept, n = order[..., :states].sort(-1).values, system.n
    rows = torch.nn.functional.one_hot(kept, n).to(torch.float64)  # (*batch, r, n)
    zeros = torch.zeros_like(rows)
    left = torch.cat([torch.cat([rows, zeros], -1), torch.cat([zeros, rows], -1)], -2)
    reduced = DiagonalSystem(
        system.lam.gather(-1, kept),
        rows.to(torch.complex128) @ system.B,
        system.C @ rows.mT.to(torch.complex128),
        system.real_output,
    )
    norms = _hinf(system)
    bounds = norms.gather(-1, order[..., states:]).sum(-1)

    def certificate(index: int) -> Certificate:
        before, after = (_one(each, index) for each in (system, reduced))
        scale = float(norms.reshape(-1, n)[index].sum())
        return certify(before, after.lam, after.B, after.C, float(bounds.reshape(-1)[index]), scale, 1.0)

    return Reduction(reduced, left, left.mT, tuple(map(certificate, range(bounds.numel()))))


def _one(system: DiagonalSystem, index: int) -> DiagonalSystem:
    axes = len(system.batch_shape)
    lam, B, C = (x.reshape(-1, *x.shape[axes:])[index] for x in (system.lam, system.B, system.C))
    return DiagonalSystem(lam, B, C, system.real_output)


__all__ = ["SCORES", "Score", "prune"]
