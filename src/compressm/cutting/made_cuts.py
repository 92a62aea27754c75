"""The cuts of all layers of a model that can really be made, as their adapters make them.

States of most selective layers are selected, so that a cut loses more than the smallest Hankel singular values. What it
loses is not known before it is made. A rule about quality therefore tries some cuts, and the plan takes one of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compressm.adapters import Cuts, LayerAdapter, Proposal
from compressm.theory.balanced import Balanced
from compressm.theory.ranks import Discards, RankRule
from compressm.theory.selection import Selection


class MadeCuts:
    """Cuts of a model's layers, by name and number of states.

    Args:
        layers: the model's, from `find_layers`.
        balancings: of these layers as they are now.
        selection: how states are picked; see `plan_reduction`.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[nn.Module, LayerAdapter]],
        balancings: Mapping[str, Balanced],
        selection: Selection,
    ) -> None:
        self._layers: dict[str, Cuts] = {
            name: adapter.cuts(layer, balancings[name], selection) for name, (layer, adapter) in layers.items()
        }

    def proposal(self, name: str, states: int, rule: RankRule) -> Proposal | None:
        """The cut of a layer to so many states; see `Cuts.proposal`."""
        return self._layers[name].proposal(states, rule)

    def discards(self) -> dict[str, Discards]:
        """What cuts of each layer discard, for `choose_ranks`: of those layers whose cuts are not the best possible."""
        return {name: cuts.discards for name, cuts in self._layers.items() if cuts.discards is not None}


__all__ = ["MadeCuts"]
