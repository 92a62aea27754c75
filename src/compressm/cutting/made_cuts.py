"""The cuts of all layers of a model, computed by their adapters and remembered.

Most selective layers select states, so a cut discards more than the smallest Hankel singular values. The discarded
energy is known only after the cut is computed. A rule about quality therefore tries some cuts, and the plan takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from compressm.adapters import Cuts, LayerAdapter, Proposal
from compressm.adapters.cuts import Pick
from compressm.cutting.matching import Matched
from compressm.theory.balanced import Balanced
from compressm.theory.energy_budget import Discards
from compressm.theory.fisher import MaskFisher
from compressm.theory.rank_rule import RankRule
from compressm.theory.selection import Selection


class MadeCuts:
    """Cuts of a model's layers, by name and number of states.

    Args:
        layers: the model's, from `find_layers`.
        balancings: of these layers as they are now.
        selection: how states are picked; see `plan_reduction`.
        fishers: Fisher matrices of the masks of selective layers, as far as they are known.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[nn.Module, LayerAdapter]],
        balancings: Mapping[str, Balanced],
        selection: Selection,
        fishers: Mapping[str, MaskFisher] | None = None,
    ) -> None:
        self._layers: dict[str, Cuts] = {
            name: adapter.cuts(layer, balancings[name], selection, (fishers or {}).get(name))
            for name, (layer, adapter) in layers.items()
        }
        self._matched: dict[tuple[str, int], Matched | None] = {}

    def proposal(self, name: str, states: int, rule: RankRule) -> Proposal | None:
        """The cut of a layer to ``states`` states; see `Cuts.proposal`."""
        return self._layers[name].proposal(states, rule)

    def picked(self, name: str, states: int, by: Pick) -> Proposal | None:
        """The cut of a layer whose states are picked by a criterion; see `Cuts.picked`."""
        return self._layers[name].picked(states, by)

    def matched(self, name: str, states: int, learn: Callable[[], Matched | None]) -> Matched | None:
        """What a layer cut to ``states`` states has learnt; it learns only the first time that this is asked.

        Several plans with layers of the same size are compared where quality decides how far a cut goes.

        Args:
            name: of the layer, which is linear.
            states: after the cut.
            learn: trains the layer that `proposal` cuts to these states.
        """
        if (name, states) not in self._matched:
            self._matched[name, states] = learn()
        return self._matched[name, states]

    def discards(self) -> dict[str, Discards]:
        """The energy that cuts discard, for `choose_ranks`, by name of those layers whose cuts are not optimal."""
        return {name: cuts.discards for name, cuts in self._layers.items() if cuts.discards is not None}


__all__ = ["MadeCuts"]
