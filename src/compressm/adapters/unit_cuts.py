"""Cuts of selective layers whose states can only be kept or removed together; see `compressm.theory.units`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from compressm.adapters.changes import LayerChange
from compressm.adapters.cuts import Pick, Proposal, SelectiveCuts
from compressm.theory.fisher import MaskFisher
from compressm.theory.rank_rule import RankRule
from compressm.theory.recurrence import SelectiveBalancing, SelectiveReduction
from compressm.theory.selection import Selection
from compressm.theory.units import Units, select_units, select_units_by_fisher


class UnitCuts(SelectiveCuts):
    """Cuts to whole units. Other numbers of states are rounded down to them, and what is less than one up.

    Args:
        values, balanced, selection, plan, fisher: as of `SelectiveCuts`; the mask is one on states that all groups
            share.
        units: of the layer.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        balanced: SelectiveBalancing,
        selection: Selection,
        plan: Callable[[Mapping[str, Tensor], SelectiveReduction], LayerChange],
        fisher: MaskFisher | None,
        units: Units,
    ) -> None:
        super().__init__(values, balanced, selection, (False, False, False), plan, fisher)
        self._units = units

    def proposal(self, states: int, rule: RankRule) -> Proposal:
        """Reduce to whole units, and check the estimate."""
        return super().proposal(self._units.rounded(states), rule)

    def _by(self, states: int, by: Pick) -> SelectiveReduction:
        if by in ("moments", "powers"):
            return super()._by(states, by)
        assert self._fisher is not None
        fisher = self._fisher if by == "fisher" else self._fisher.diagonal()
        return select_units_by_fisher(fisher, self._units, self._units.rounded(states), self._balanced)

    def _by_moments(self, states: int, selection: Selection) -> SelectiveReduction:
        return select_units(self._balanced, self._units, self._units.rounded(states), selection)


def first_units(reduction: SelectiveReduction, units: Units) -> SelectiveReduction:
    """A placeholder as `compressm.theory.recurrence.first_states` makes it, with whole units."""
    classes, count, _ = units.members.shape
    numbers = torch.arange(reduction.states // units.least).clamp_max(count - 1)
    kept = units.kept(numbers.expand(classes, -1))
    return replace(reduction, kept=kept.expand(reduction.into.shape[0], -1))


__all__ = ["UnitCuts", "first_units"]
