"""How many states to keep: `rank_rule.RankRule` holds the user's choice, and `choose_ranks` computes the numbers.

Every rule reads the *Hankel energy* that a cut discards. If the smallest Hankel singular values are removed, this is
the sum of their energies ``s_1 >= s_2 >= ...`` (see `balancing.Balancing.energy`), and the truncation bound is twice as
much. If states are selected, the discarded energy is larger, and the rule computes it from the cuts themselves. Every
rule may answer "keep everything".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError
from compressm.theory.energy_budget import Discards, shared_budget
from compressm.theory.loss_budget import FLOOR, Offer, within_loss, within_states
from compressm.theory.possible_sizes import Legal, check_total, fraction_of, groups_of_one_size, sizes_in_common
from compressm.theory.rank_rule import RankRule


def choose_ranks(
    energies: Mapping[str, Tensor],
    rule: RankRule,
    *,
    discards: Mapping[str, Discards] | None = None,
    alike: Sequence[str] = (),
    damages: Mapping[str, Tensor] | None = None,
    legal: Legal | None = None,
) -> dict[str, int]:
    """The number of states that each layer keeps under a rule, before the gate; see `RankRule` for the precedence.

    Args:
        energies: per layer, the energy of each of its present states, decreasing, shape ``(n,)``, or ``(*batch, n)``
            where a layer holds a batch of systems that keep one common rank (the largest that any of them needs). No
            cut to r states discards less than the sum of those beyond the r-th.
        rule: the user's rule.
        discards: the energy that cuts discard, for the layers where it is more than that sum.
        alike: names of layers that share one state dimension.
        damages: per layer, the predicted rise of the loss if 0, 1, ..., n states are kept, in nats per prediction,
            shape ``(n + 1,)``. ``max_loss`` needs it, and ``total_states`` uses it if there is one for every layer.
        legal: sizes that the rule's target takes, ascending, by layer; a layer may also keep its own.

    Returns:
        per layer a number in ``1..n``; ``n`` means that nothing may be cut.

    Raises:
        InvalidRankRuleError: a budget of fewer states than the layers must keep, or ``max_loss`` without ``damages``.
    """
    present = {name: energy.shape[-1] for name, energy in energies.items()}
    check_total(rule, present, alike, legal)
    groups = groups_of_one_size(present, alike)
    sizes = [sizes_in_common({name: present[name] for name in group}, rule, legal) for group in groups]
    made = discards or {}
    if rule.max_loss is not None or (rule.total_states is not None and set(damages or {}) >= set(energies)):
        chosen = _cheapest_in_loss(groups, sizes, present, rule, damages or {})
    elif rule.total_states is not None:
        chosen = shared_budget(groups, sizes, energies, rule.total_states, made)
    elif rule.guarantees_error:
        chosen = [_promised(g, s, energies, rule, made) for g, s in zip(groups, sizes, strict=True)]
    else:
        chosen = [_limited([present[n] for n in g], s, rule) for g, s in zip(groups, sizes, strict=True)]
    ranks = dict(present)
    for group, size in zip(groups, chosen, strict=True):
        ranks |= {} if size is None else dict.fromkeys(group, size)
    return ranks


def _cheapest_in_loss(
    groups: Sequence[Sequence[str]],
    sizes: Sequence[Sequence[int]],
    present: Mapping[str, int],
    rule: RankRule,
    damages: Mapping[str, Tensor],
) -> list[int | None]:
    """Sizes by the predicted rise of the loss: at most ``max_loss``, or as little as a budget allows."""
    if missing := [name for name in present if name not in damages]:
        raise InvalidRankRuleError(
            f"max_loss={rule.max_loss} needs a prediction for every layer, and there is none for {missing[0]!r}: "
            "pass gramians='loss' and data; if its effect on the loss of one sequence cannot be observed (see "
            "docs/loss.md), leave it out with exclude=, or choose another rule"
        )
    floor = FLOOR
    if rule.total_states is not None:  # a smaller budget than the floors leaves each layer half of its part
        floor = min(FLOOR, rule.total_states / (2 * sum(present.values())))
    free = [index for index, one in enumerate(sizes) if one]

    def offers(floor: float) -> list[Offer]:
        return [Offer.of([damages[name] for name in groups[index]], sizes[index], floor) for index in free]

    if rule.max_loss is not None:
        found = within_loss(offers(floor), rule.max_loss)
    else:
        assert rule.total_states is not None
        fixed = sum(present[name] for group, one in zip(groups, sizes, strict=True) if not one for name in group)
        left, asked = rule.total_states - fixed, offers(floor)
        if _least(asked) > left:  # floors and multiples are rounded up, and the budget comes first
            asked = offers(0.0)
        found = within_states(asked, max(_least(asked), left))
    chosen: list[int | None] = [None] * len(groups)
    for index, size in zip(free, found, strict=True):
        chosen[index] = size
    return chosen


def _least(offers: Sequence[Offer]) -> int:
    """The fewest states that all layers together can keep."""
    return sum(offer.layers * offer.sizes[0] for offer in offers)


def passes_gate(present: int, proposed: int, rule: RankRule) -> bool:
    """Whether the proposed cut removes at least the share `min_reduction` of the states, and at least one state."""
    return proposed < present and present - proposed >= rule.min_reduction * present


def keeps_promise(discarded: Tensor, energy: Tensor, rule: RankRule) -> bool:
    """Whether a cut discards no more than a rule about quality allows, in every system of a layer.

    Args:
        discarded: Hankel energy that the cut discards, shape ``(*batch,)``. Excess by rounding is allowed.
        energy: as in `choose_ranks`.
        rule: with ``tolerance`` or ``max_error``.
    """
    total = _tails(energy)[..., 0]
    if rule.tolerance is not None:
        allowed = rule.tolerance * total
    else:
        assert rule.max_error is not None
        allowed = torch.full_like(total, rule.max_error / 2)
    rounding = energy.shape[-1] * torch.finfo(torch.float64).eps * total
    return bool((discarded <= allowed * (1 + 1e-12) + rounding).all())


def _promised(
    group: Sequence[str],
    sizes: Sequence[int],
    energies: Mapping[str, Tensor],
    rule: RankRule,
    discards: Mapping[str, Discards],
) -> int | None:
    """A size at which all layers of a group keep the promise, while at the next smaller one they do not."""

    def at_best(states: int) -> bool:
        return all(keeps_promise(_tails(energies[n])[..., states], energies[n], rule) for n in group)

    def made(states: int) -> bool:
        return all(keeps_promise(discards[n](states), energies[n], rule) for n in group if n in discards)

    sizes = sizes[bisect_left(sizes, True, key=at_best) :]
    # With selected states a larger cut nearly always discards more, but not always. The size that bisection finds has
    # been tried, and so has the size below it, unless no cut to that size can keep the promise.
    found = bisect_left(sizes, True, key=made)
    return sizes[found] if found < len(sizes) else None


def _limited(present: Sequence[int], sizes: Sequence[int], rule: RankRule) -> int | None:
    """The largest size within the limit of every layer of a group, or the least size if none is within it."""
    limits = [n if rule.states is None else rule.states for n in present]
    if rule.fraction is not None:
        limits = [fraction_of(rule.fraction, n) for n in present]
    if not sizes or all(n <= limit for n, limit in zip(present, limits, strict=True)):
        return None
    return max((size for size in sizes if size <= min(limits)), default=sizes[0])


def _tails(energy: Tensor) -> Tensor:
    """``sum_{i>r} s_i`` for r = 0..n, summed from the smallest up so that small tails keep their digits."""
    reversed_sums = energy.to(torch.float64).flip(-1).cumsum(-1).flip(-1)
    return torch.cat([reversed_sums, torch.zeros_like(reversed_sums[..., :1])], -1)
