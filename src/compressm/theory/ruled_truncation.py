"""The truncation of a linear layer that satisfies a rank rule.

A truncation may have another number of states than the rule chose, since a real eigenvalue takes a whole complex state.
"""

from __future__ import annotations

from compressm.theory.balancing import Balancing, Reduction
from compressm.theory.possible_sizes import fewest
from compressm.theory.rank_rule import RankRule
from compressm.theory.ranks import keeps_promise


def truncate_by_rule(ordered: Balancing, states: int, rule: RankRule, promises: bool = True) -> Reduction | None:
    """Truncate a linear layer's systems as a rule asks.

    Args:
        ordered: the balanced layer; its first states are kept.
        states: the number that the rule chose, from 1 to n.
        rule: if it promises a quality, the result is the smallest cut to ``states`` or more states that keeps the
            promise. It may need more for real eigenvalues without a partner, or where equal Hankel singular values
            cannot be separated. Under any other rule the result has at most ``states``, or more where it would
            otherwise remove more than ``rule.max_reduction``. States that do nothing are added up to a multiple of
            ``rule.multiple_of``.
        promises: whether to keep the rule's promise. Pass False for comparisons that keep other states than the best
            ones: the same number of them cannot keep it.

    Returns:
        the cut; None if no cut has fewer states than the layer has now.
    """
    if not rule.guarantees_error:
        reduction = ordered.truncated(states)
        if states % rule.multiple_of == 0 and rule.multiple_of > 1:
            return reduction.padded(states)
        return reduction if reduction.system.n >= fewest(ordered.system.n, rule) else _with_more(ordered, states)
    more = 0
    while states + more < ordered.system.n:
        reduction = _in_multiples(ordered, ordered.truncated(states + more, exceed=True), rule.multiple_of)
        if reduction.system.n >= ordered.system.n:
            return None
        if not promises or keeps_promise(reduction.discarded, ordered.energy, rule):
            return reduction
        more = max(rule.multiple_of, 2 * more)
    return None


def _with_more(ordered: Balancing, states: int) -> Reduction | None:
    """The cut to ``states`` or more states; None if it has no fewer than the layer has now."""
    reduction = ordered.truncated(states, exceed=True)
    return reduction if reduction.system.n < ordered.system.n else None


def _in_multiples(ordered: Balancing, reduction: Reduction, multiple_of: int) -> Reduction:
    """The same or a better cut with the next multiple of states, if the layer has at least that many now."""
    states = min(-(-reduction.system.n // multiple_of) * multiple_of, max(ordered.system.n, reduction.system.n))
    if states == reduction.system.n:
        return reduction
    better = ordered.truncated(states)
    if bool((better.discarded <= reduction.discarded).all()):
        reduction = better
    return reduction.padded(states)


__all__ = ["truncate_by_rule"]
