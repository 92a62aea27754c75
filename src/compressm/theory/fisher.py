"""Selection of states by the Fisher matrix of a mask on them, for recurrences whose states can only be kept or removed.

Multiply state i of a layer by ``m_i``, at all times. To second order around ``m = 1``, with ``g = d loss / d m`` of one
sequence and targets drawn from the model's own prediction,

    KL(m) = 1/2 (m - 1)^T F (m - 1),    F = E_seq[g g^T]     nats per sequence

so removing the set R costs ``1/2 sum_{i,j in R} F_ij``. F includes how contributions at different times add up or
cancel; the second moments of states and output vectors do not. If the output vectors can be scaled, the kept states can
compensate: the cost is then minimised over their masks too (optimal brain surgeon: Hassibi, Stork, NIPS 1992).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError, InvalidSystemError
from compressm.theory.recurrence import ErrorEstimate, Moments, SelectiveReduction, balance_selective
from compressm.theory.selection import compensation, reduction_by_maps
from compressm.theory.sums import Sums

EXCHANGES = 10
# Share of the largest diagonal entry that is added to the diagonal before a linear system is solved.
_RIDGE = 1e-6


@dataclass(frozen=True)
class MaskFisher(Sums):
    """Second moments of the mask's gradients, as sums that add over batches and processes; float64 on the CPU.

    Attributes:
        sequences: number of sequences, shape ``()``.
        weights: sum of the squares of their weights, shape ``()``.
        products: sum of ``g g^T``, shape ``(groups, n, groups, n)``.
        squares: sum of the squares of the entries of ``g g^T``, same shape.
    """

    quadratic = frozenset({"weights", "squares"})

    sequences: Tensor
    weights: Tensor
    products: Tensor
    squares: Tensor

    @classmethod
    def of(cls, gradients: Tensor) -> MaskFisher:
        """The sums over some sequences, from the gradients of each one's own loss, shape ``(sequences, groups, n)``."""
        g = gradients.detach().to("cpu", torch.float64)
        flat, shape = g.flatten(1), (*g.shape[1:], *g.shape[1:])
        count = torch.tensor(float(len(g)), dtype=torch.float64)
        squares = flat.square()
        return cls(count, count, (flat.mT @ flat).view(shape), (squares.mT @ squares).view(shape))

    def per(self, predictions: float) -> MaskFisher:
        """The same for the loss of one prediction instead of a sequence's, which is the sum over so many."""
        return replace(self, products=self.products / predictions, squares=self.squares / predictions**2)

    @property
    def F(self) -> Tensor:
        """``E_seq[g g^T]``, shape ``(groups, n, groups, n)``."""
        return self.products / self.sequences

    def diagonal(self) -> MaskFisher:
        """The same with zeros off the diagonal: states are then kept by the mean square of their mask's gradient."""
        groups, n = self.products.shape[:2]
        eye = torch.eye(groups * n, dtype=torch.float64).view(groups, n, groups, n)
        return replace(self, products=self.products * eye)

    def shrinkage(self) -> float:
        """The share alpha by which to shrink the off-diagonal entries, in [0, 1].

        With at most as many sequences as states F is singular, and some sets of states seem to cost nothing. The
        expected squared error of ``(1 - alpha) F + alpha diag(F)`` is least at

            alpha = sum_{i != j} Var(F_ij) / sum_{i != j} F_ij^2

        (Ledoit, Wolf 2004; Schäfer, Strimmer 2005), with the variances estimated from the sequences.
        """
        once = float(self.weights / self.sequences**2)
        if once >= 1:
            return 1.0
        off = 1 - torch.eye(self.products[..., 0, 0].numel(), dtype=torch.float64)
        F = self.F.flatten(2).flatten(0, 1)
        second = self.squares.flatten(2).flatten(0, 1) / self.sequences**2
        variance = ((second - once * F.square()) / (1 - once) * off).sum()
        size = (F.square() * off).sum()
        return float((variance / size).clamp(0, 1)) if float(size) > 0 else 0.0

    def shrunk(self) -> Tensor:
        """F with the entries off its diagonal shrunk, shape ``(groups * n, groups * n)``.

        Raises:
            InvalidSystemError: no sequences, or gradients that are not finite.
        """
        if not float(self.sequences) > 0 or not bool(torch.isfinite(self.products).all()):
            raise InvalidSystemError(
                f"the mask's Fisher matrix is of {float(self.sequences):g} sequences and must be finite: pass data "
                "through the model, or go back to a checkpoint from before it diverged"
            )
        F, alpha = self.F.flatten(2).flatten(0, 1), self.shrinkage()
        return (1 - alpha) * F + alpha * torch.diag(F.diagonal())


@dataclass(frozen=True)
class MaskSelection:
    """Which states stay.

    Attributes:
        kept: their indices in each group, ascending, shape ``(groups, r)``.
        gains: factors of the kept states, shape ``(groups, r)``; ones if they do not compensate for the others.
        damage: predicted rise of a sequence's loss, in nats.
    """

    kept: Tensor
    gains: Tensor
    damage: float


def select_by_fisher(fisher: MaskFisher, states: int, gains: bool = False) -> MaskSelection:
    """The states of every group to keep: greedy removal, then exchanges one at a time while the cost falls.

    Args:
        fisher: of the layer.
        states: how many to keep in each group, from 1 to n.
        gains: let the kept states compensate for the others, by one factor each.

    Raises:
        InvalidRankRuleError: fewer than one state asked for.
        InvalidSystemError: see `MaskFisher.shrunk`.
    """
    groups, n = fisher.products.shape[:2]
    if states < 1:
        raise InvalidRankRuleError(f"states must be at least 1; got {states}")
    F = fisher.shrunk()
    stays = least_costly(F, groups, n, min(states, n))
    kept = stays.view(groups, n).nonzero()[:, 1].view(groups, -1)
    factors = _gains(F, stays) if gains else torch.ones(int(stays.sum()), dtype=torch.float64)
    change = -torch.ones(groups * n, dtype=torch.float64)
    change[stays] = factors - 1
    return MaskSelection(kept, factors.view(kept.shape), max(0.0, float(change @ F @ change) / 2))


@dataclass(frozen=True)
class MaskEstimate(ErrorEstimate):
    """The predicted effect of a cut by the mask's Fisher matrix.

    Attributes:
        predicted_damage: rise of a sequence's loss, in nats.
        shrinkage: the share by which off-diagonal entries were shrunk; see `MaskFisher.shrinkage`.
    """

    predicted_damage: float = math.nan
    shrinkage: float = math.nan


def reduce_by_fisher(
    fisher: MaskFisher,
    states: int,
    moments: Moments,
    takes_over: Literal["nobody", "gains", "least_squares"] = "nobody",
) -> SelectiveReduction:
    """Reduce a selective recurrence to the states that `select_by_fisher` keeps.

    Args:
        fisher: of the layer.
        states: how many to keep in each group, at most n.
        moments: of the layer, from `selective.moments`.
        takes_over: how the kept states compensate for the others, if the layer can take maps of C: not at all; by one
            factor each (see `select_by_fisher`); or by the least squares estimate of the other states, which the
            predicted damage does not account for.

    Raises:
        InvalidRankRuleError, InvalidSystemError: see `select_by_fisher`; or moments of another layer.
    """
    if fisher.products.shape[:2] != moments.P.shape[:2]:
        raise InvalidSystemError(
            f"the mask has {tuple(fisher.products.shape[:2])} groups and states, and the moments "
            f"{tuple(moments.P.shape[:2])}: observe both on the model as it is"
        )
    selection = select_by_fisher(fisher, states, gains=takes_over == "gains")
    balancing = balance_selective(moments)
    P, n = (balancing.P + balancing.P.mT) / 2, moments.P.shape[-1]
    into = torch.eye(n, dtype=torch.float64)[selection.kept]
    out = into * selection.gains[..., None]
    if takes_over == "least_squares":
        out = torch.stack([compensation(one, kept) for one, kept in zip(P, selection.kept, strict=True)])
    reduction = reduction_by_maps(balancing, into, out, selection.kept)
    added: dict[str, Any] = {"predicted_damage": selection.damage, "shrinkage": fisher.shrinkage()}
    return replace(reduction, estimate=MaskEstimate(**vars(reduction.estimate), **added))


def least_costly(F: Tensor, groups: int, n: int, states: int) -> Tensor:
    """Which of n states stay in each group, such that ``sum_ij F_ij`` over the removed ones is small: greedy removal,
    then exchanges. Bool, shape ``(groups * n,)``, from a symmetric F, float64, of that size twice."""
    stays = torch.ones(groups * n, dtype=torch.bool)
    stays[_exchanged(F, _removed(F, groups, n, states), n)] = False
    return stays


def removal_rounds(fisher: MaskFisher) -> Tensor:
    """The states of every group in the order in which greedy removal takes them, int64, shape ``(groups, n)``.

    In every round each group loses the state whose removal costs least then.
    """
    groups, n = fisher.products.shape[:2]
    gone = torch.tensor(_removed(fisher.shrunk(), groups, n, 0))
    return torch.stack([gone[gone // n == group] % n for group in range(groups)])


def _removed(F: Tensor, groups: int, n: int, states: int) -> list[int]:
    """The removed states in their order: in every round each group loses the state whose removal costs least then."""
    gone, cost = list[int](), F.diagonal().clone()
    for _ in range(n - states):
        open_groups = torch.ones(groups, dtype=torch.bool)
        for _ in range(groups):
            allowed = cost.masked_fill(~open_groups.repeat_interleave(n), torch.inf)
            j = int(allowed.argmin())
            gone.append(j)
            open_groups[j // n] = False
            cost = cost + 2 * F[j]
            cost[j] = torch.inf
    return gone


def _exchanged(F: Tensor, gone: list[int], n: int) -> list[int]:
    """The removed states after exchanges with kept states of the same group, as long as an exchange lowers the cost."""
    gone, diagonal = list(gone), F.diagonal()
    group = torch.arange(F.shape[0]) // n
    away = torch.zeros(F.shape[0], dtype=torch.bool)
    away[gone] = True
    cost = diagonal + 2 * F[:, gone].sum(1)  # of each state together with all removed ones
    for _ in range(EXCHANGES if gone else 0):
        changed = False
        for position, j in enumerate(gone):
            alone = cost - 2 * F[j]  # together with all removed ones except j
            candidates = alone.masked_fill(away | (group != j // n), torch.inf)
            best = int(candidates.argmin())
            if candidates[best] < alone[j] - 1e-6 * diagonal[j].abs():
                gone[position], changed = best, True
                away[j], away[best] = False, True
                cost = alone + 2 * F[best]
        if not changed:
            break
    return gone


def _gains(F: Tensor, stays: Tensor) -> Tensor:
    """``1 + F_SS^-1 F_SR 1``, the masks of the kept states that minimise the cost."""
    inner = F[stays][:, stays]
    ridge = _RIDGE * inner.diagonal().max().clamp_min(1e-300)
    pulled = F[stays][:, ~stays].sum(1)
    return 1 + torch.linalg.solve(inner + ridge * torch.eye(len(inner), dtype=F.dtype), pulled)


__all__ = [
    "MaskEstimate",
    "MaskFisher",
    "MaskSelection",
    "least_costly",
    "reduce_by_fisher",
    "removal_rounds",
    "select_by_fisher",
]
