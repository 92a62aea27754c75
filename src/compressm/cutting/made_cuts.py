"""The cuts that are really made: what a rule asks for, held against what the cut does.

States of most selective layers are selected, so that a cut loses more than the smallest Hankel singular values. What it
loses is not known before it is made. A rule about quality therefore tries some cuts, and the plan takes one of them.

A linear cut loses what its Hankel singular values say, but may come out in another number of states than was asked for:
a real eigenvalue takes a whole complex state.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from compressm.adapters import LayerAdapter, SelectiveAdapter
from compressm.cutting.spectrum import AnyBalancing
from compressm.theory.balancing import Balancing, Reduction, truncate
from compressm.theory.ranks import Discards, RankRule, keeps_promise
from compressm.theory.recurrence import SelectiveBalancing, SelectiveReduction
from compressm.theory.selection import Selection, reduce_selective


class MadeCuts:
    """Cuts of a model's selective layers, by name and number of states.

    Args:
        layers: the model's, from `find_layers`.
        balancings: of these layers as they are now.
        selection: how states are picked; see `reduce_selective`.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[nn.Module, LayerAdapter]],
        balancings: Mapping[str, AnyBalancing],
        selection: Selection,
    ) -> None:
        self.selection: Selection = selection
        self._layers: dict[str, tuple[SelectiveBalancing, tuple[bool, bool, bool]]] = {}
        for name, (layer, adapter) in layers.items():
            balancing = balancings[name]
            if isinstance(adapter, SelectiveAdapter) and isinstance(balancing, SelectiveBalancing):
                self._layers[name] = balancing, adapter.maps(layer)
        self._made: dict[tuple[str, int], SelectiveReduction] = {}

    def reduction(self, name: str, states: int) -> SelectiveReduction:
        """The cut of a layer to so many states."""
        if (name, states) not in self._made:
            balancing, (into, out, rotates) = self._layers[name]
            made = reduce_selective(balancing, states, into, out, self.selection, rotates=rotates)
            self._made[name, states] = made
        return self._made[name, states]

    def discards(self) -> dict[str, Discards]:
        """What cuts of each layer discard, for `choose_ranks`: of those layers whose cuts are not the best possible."""

        def of(name: str) -> Discards:
            def discarded(states: int) -> Tensor:
                found = self.reduction(name, states).discarded
                assert found is not None
                return found

            return discarded

        best = self.selection in ("hankel", "least_squares")
        return {name: of(name) for name, (_, (folds_into, *_)) in self._layers.items() if not (best and folds_into)}


def linear_cut(ordered: Balancing, states: int, rule: RankRule, promises: bool = True) -> Reduction | None:
    """The cut of a linear layer that a rule asks for.

    Args:
        ordered: the balanced layer; its first states are kept.
        states: as many as the rule chose, from 1 to n.
        rule: if it promises a quality, the smallest cut from so many states on that keeps the promise. It may need more
            of them for left-over real eigenvalues, or where equal Hankel singular values cannot be cut apart. Otherwise
            at most ``states``. Where that is no multiple of ``rule.multiple_of``, states that do nothing fill it up.
        promises: whether a promise is to be kept. For comparisons other states are kept than the best, in the same
            number, and then it cannot.

    Returns:
        the cut; None where there is none below the present number of states.
    """
    if not rule.guarantees_error:
        reduction = truncate(ordered, states)
        return reduction.padded(states) if states % rule.multiple_of == 0 and rule.multiple_of > 1 else reduction
    more = 0
    while states + more < ordered.system.n:
        reduction = _in_multiples(ordered, truncate(ordered, states + more, exceed=True), rule.multiple_of)
        if reduction.system.n >= ordered.system.n:
            return None
        if not promises or keeps_promise(reduction.discarded, ordered.energy, rule):
            return reduction
        more = max(rule.multiple_of, 2 * more)
    return None


def _in_multiples(ordered: Balancing, reduction: Reduction, multiple_of: int) -> Reduction:
    """The same or a better cut in the next multiple of states, if that is not above the present number of them."""
    states = min(-(-reduction.system.n // multiple_of) * multiple_of, max(ordered.system.n, reduction.system.n))
    if states == reduction.system.n:
        return reduction
    better = truncate(ordered, states)
    if bool((better.discarded <= reduction.discarded).all()):
        reduction = better
    return reduction.padded(states)


__all__ = ["MadeCuts", "linear_cut"]
