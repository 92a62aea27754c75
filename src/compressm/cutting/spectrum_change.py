"""The change between two snapshots of a layer's Hankel spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compressm.theory.balanced import Balanced


@dataclass(frozen=True)
class SpectrumChange:
    """The change of a layer's Hankel spectrum between two snapshots.

    Attributes:
        weyl_bound: ``max |eig(H' - H)|`` with ``H = (P^1/2 Q P^1/2)^1/2``. By Weyl's inequality no Hankel singular
            value moved by more. In units of the largest value of the first snapshot.
        largest_move: the largest change of a value, in the same units.
        rank_correlation: Spearman's, between the ranks of the state directions before and after.
        share_moved: total change of the values over their sum.
        bottom_share_before, bottom_share_after: energy share of the smallest half of the values.
        crossings: share of all pairs of state directions that changed their order. Directions (eigenvectors of ``H``)
            are matched between the snapshots such that their total overlap is largest.
    """

    weyl_bound: float
    largest_move: float
    rank_correlation: float
    share_moved: float
    bottom_share_before: float
    bottom_share_after: float
    crossings: float

    def settled(self, threshold: float) -> bool:
        """Whether the spectrum has settled: little energy moved, and the bottom half's share barely changed."""
        return self.share_moved <= threshold and abs(self.bottom_share_after - self.bottom_share_before) <= threshold


def compare(before: Balanced, after: Balanced) -> SpectrumChange:
    """Compare two snapshots of one layer, of the same state dimension and method.

    The values are compared in decreasing order, as in Weyl's inequality; this is also the matching with the least total
    change. Directions are matched by their overlap (`scipy.optimize.linear_sum_assignment`).

    Raises:
        ValueError: snapshots of different order.
    """
    a, b = (snapshot.hsv.flatten().sort(descending=True).values for snapshot in (before, after))
    if a.shape != b.shape:
        raise ValueError(f"snapshots of different order: {a.shape[-1]} and {b.shape[-1]} Hankel singular values")
    scale = float(a[0]) or 1.0
    old, new = before.hankel_operator(), after.hankel_operator()
    # Imported here, since they take as long as the rest of the library and are rarely needed.
    from scipy.optimize import linear_sum_assignment
    from scipy.stats import spearmanr

    half = a.shape[0] // 2
    overlap = (torch.linalg.eigh(old).eigenvectors.mH @ torch.linalg.eigh(new).eigenvectors).abs().square()
    _, places = linear_sum_assignment(overlap.reshape(-1, *overlap.shape[-2:]).sum(0).numpy(), maximize=True)
    correlation: Any = spearmanr(range(len(places)), places) if len(places) > 1 else None
    return SpectrumChange(
        weyl_bound=float(torch.linalg.eigvalsh(new - old).abs().max()) / scale,
        largest_move=float((a - b).abs().max()) / scale,
        rank_correlation=1.0 if correlation is None else float(correlation.statistic),
        share_moved=float((a - b).abs().sum() / a.sum().clamp_min(1e-300)),
        bottom_share_before=float(a[half:].sum() / a.sum().clamp_min(1e-300)),
        bottom_share_after=float(b[half:].sum() / b.sum().clamp_min(1e-300)),
        crossings=_crossings(places.tolist()),
    )


def _crossings(places: Sequence[int]) -> float:
    """Share of the pairs whose order differs from the order of their places."""
    order = torch.tensor(places)
    inverted = (order[:, None] > order[None, :]).triu(1).sum()
    return float(inverted) / max(1, len(places) * (len(places) - 1) // 2)


__all__ = ["SpectrumChange", "compare"]
