"""The truncation that a rank rule really asks for.

A linear cut loses what its Hankel singular values say, but may come out in another number of states than was asked for:
a real eigenvalue takes a whole complex state.
"""

from __future__ import annotations

from compressm.theory.balancing import Balancing, Reduction, truncate
from compressm.theory.ranks import RankRule, keeps_promise


def truncate_by_rule(ordered: Balancing, states: int, rule: RankRule, promises: bool = True) -> Reduction | None:
    """The truncation of a linear layer's systems that a rule asks for.

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


__all__ = ["truncate_by_rule"]
