"""States that can only be kept or removed together, and alike in all groups of a recurrence.

In Mamba-3 pairs of states rotate by one angle, which all heads share, and a fixed share of the pairs rotates. A cut
therefore removes pairs, the same ones in every head, and as many that rotate as it has to. Two costs are known of a
set of states: what it contributes to the output, and what the mask's Fisher matrix says. Both are sums over pairs of
states, so they are sums over pairs of units too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError
from compressm.theory.fisher import MaskEstimate, MaskFisher, least_costly
from compressm.theory.recurrence import SelectiveBalancing, SelectiveReduction, removal_costs
from compressm.theory.selection import Selection, is_score, reduction_by_maps, removal_power, scores


@dataclass(frozen=True)
class Units:
    """The units of a recurrence, in classes of which equal numbers stay.

    Attributes:
        members: the states of every unit, int64, shape ``(classes, units, states of a unit)``. No state is in two.
    """

    members: Tensor

    @property
    def least(self) -> int:
        """The fewest states that a cut can keep: one unit of every class. All sizes are multiples of it."""
        return self.members.shape[0] * self.members.shape[2]

    @property
    def states(self) -> int:
        """State dimension n."""
        return self.members.numel()

    def rounded(self, states: int) -> int:
        """The largest size that is possible and at most ``states``; never below `least`."""
        return min(max(states // self.least, 1) * self.least, self.states)

    def kept(self, units: Tensor) -> Tensor:
        """The states of units, ascending, shape ``(r,)``, from their numbers in every class, shape ``(classes, r /
        least)``."""
        chosen = [every[own] for every, own in zip(self.members, units, strict=True)]
        return torch.cat(chosen).flatten().sort().values

    def joint(self, cost: Tensor) -> Tensor:
        """The joint costs of units, shape ``(classes * units, classes * units)``, from those of states, ``(n, n)``."""
        rows = self.members.flatten(0, 1)
        return cost[rows[:, None, :, None], rows[None, :, None, :]].sum((2, 3))

    def chosen(self, cost: Tensor, states: int) -> Tensor:
        """The states to keep such that the others have the least joint cost; ascending, shape ``(states,)``.

        Args:
            cost: of pairs of states, symmetric, float64, shape ``(n, n)``.
            states: a multiple of `least`.
        """
        classes, units, _ = self.members.shape
        stays = least_costly(self.joint(cost), classes, units, states // self.least)
        return self.kept(stays.view(classes, units).nonzero()[:, 1].view(classes, -1))


def select_units(
    balancing: SelectiveBalancing, units: Units, states: int, selection: Selection = "hankel"
) -> SelectiveReduction:
    """As `compressm.theory.selection.reduce_selective` for a recurrence that takes no maps and has units.

    Args:
        balancing: the moments, of all groups.
        units: of every group.
        states: how many to keep, a multiple of `Units.least`.
        selection: see there. Scores of states are summed over a unit and over the groups.

    Raises:
        InvalidRankRuleError: fewer than one state.
    """
    if states < 1:
        raise InvalidRankRuleError(f"states must be at least 1; got {states}")
    if is_score(selection):
        cost = torch.diag(scores(balancing, selection).sum(0))
    else:
        costs = removal_costs(balancing)
        powers = [removal_power(balancing, selection, group, costs) for group in range(len(balancing.P))]
        cost = torch.stack(powers).sum(0)
    return _reduction(balancing, units.chosen(cost, states))


def select_units_by_fisher(
    fisher: MaskFisher, units: Units, states: int, balancing: SelectiveBalancing
) -> SelectiveReduction:
    """As `compressm.theory.fisher.reduce_by_fisher` for a recurrence that takes no maps and has units.

    Args:
        fisher: of a mask on the states that all groups share, so of one group.
        units: of every group.
        states: how many to keep, a multiple of `Units.least`.
        balancing: the moments, of all groups.
    """
    F = fisher.shrunk()
    kept = units.chosen(F, states)
    gone = torch.ones(units.states, dtype=torch.float64).index_fill(0, kept, 0.0)
    made = _reduction(balancing, kept)
    estimate = MaskEstimate(
        **vars(made.estimate), predicted_damage=max(0.0, float(gone @ F @ gone) / 2), shrinkage=fisher.shrinkage()
    )
    return replace(made, estimate=estimate)


def _reduction(balancing: SelectiveBalancing, kept: Tensor) -> SelectiveReduction:
    groups, n = balancing.P.shape[:2]
    every = kept.expand(groups, -1)
    chosen = torch.eye(n, dtype=torch.float64)[every]
    return reduction_by_maps(balancing, chosen, chosen, every)


__all__ = ["Units", "select_units", "select_units_by_fisher"]
