"""How many states to keep: `RankRule` holds the user's choice, and `choose_ranks` computes the numbers.

Every rule reads the *Hankel energy* that a cut discards. If the smallest Hankel singular values are removed, this is
the sum of their energies ``s_1 >= s_2 >= ...`` (see `balancing.Balancing.energy`), and the truncation bound is twice as
much. If states are selected, the discarded energy is larger, and the rule computes it from the cuts themselves. Every
rule may answer "keep everything".
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError
from compressm.theory.budget import FLOOR, Offer, within_loss, within_states
from compressm.theory.targets import ONE_SIZE, Target

# Maps a number of states to the Hankel energy that a cut to it discards in each of a layer's systems, ``(*batch,)``.
Discards = Callable[[int], Tensor]
# The sizes that a target takes, by layer; see `targets.check_target`. Layers that are not named may have any size.
Legal = Mapping[str, Sequence[int]]
# The largest share of a layer's states that one cut removes under a rule about quality, unless the user says otherwise.
_HALF = 0.5
# How many cuts of a layer a budget computes, if the discarded energy does not follow from the singular values.
_SAMPLES = 8


@dataclass(frozen=True)
class RankRule:
    """The rule that decides the state dimensions. Pass exactly one of the first six arguments.

    ``tolerance``, ``max_error`` and ``max_loss`` promise a quality, and every cut keeps the promise. ``states``,
    ``fraction`` and ``total_states`` are upper limits. If requirements conflict, the earlier one in this list holds:

    1. ``max_reduction``: at most this share of a layer's states is removed.
    2. The promise or the limit. A layer that is already within its limit is not cut.
    3. Layers that share one state dimension (see ``per_layer``) get one that suits all of them.
    4. ``multiple_of``: a promise is rounded up to a multiple. A limit is rounded down, or up where ``max_reduction``
       forbids rounding down. A layer that has fewer states than ``multiple_of`` keeps them.
    5. ``min_reduction``: a cut that removes less is not made.

    A ``target`` stands above all of these: no layer is cut to a size that it does not take. A promise is rounded up to
    such a size, a limit down.

    A limit below ``multiple_of`` is refused: for ``states`` and ``total_states`` when the rule is made; for
    ``fraction``, or a ``total_states`` too small for all layers together, before any computation (`check_sizes`).

    Args:
        tolerance: the share of the Hankel energy that may be discarded in a layer (tau in the CompreSSM paper), and in
            each of its systems (channels, heads, groups) if it has several. In [0, 1). If the smallest Hankel singular
            values are removed, the rank is the smallest ``r`` with ``sum_{i<=r} s_i >= (1 - tolerance) sum_i s_i``. If
            states are selected, it is an ``r`` whose cut keeps this share while the cut to ``r - 1`` does not; see
            `SelectiveReduction.discarded`.
        states: at most this many states in every layer.
        fraction: at most this fraction of a layer's present states, in (0, 1], and at least one state or multiple.
        max_error: the H-infinity error allowed per layer, in the units of output per input: the smallest ``r`` with ``2
            sum_{i>r} s_i <= max_error``. Selective layers have no such bound; for them it is twice the Hankel energy
            that the cut discards, which is at least twice the root mean square of the recurrence's output error.
        total_states: a budget over all layers together. Where the rise of the loss is predicted, it is spent such that
            this rise is least. Otherwise the states with the largest share of their own layer's energy are kept, in
            whichever layer they are.
        max_loss: the rise of the loss, in nats per prediction, that a cut may cost over all layers together. It is
            predicted from data and gradients of the loss, see `compressm.observing.damage`. States are removed in
            whichever layer this costs least, and every layer keeps at least one state in sixteen.
        multiple_of: prefer state dimensions that are a multiple of this, for efficient hardware kernels; see above.
        min_reduction: cut a layer only if at least this share of its states is removed (0.05: the paper's 0.95 gate).
        max_reduction: remove at most this share of a layer's states, rounded down, whatever the rule says. In (0, 1].
        per_layer: let layers differ in their state dimension even if the model's own checkpoint format has only one for
            all, as in Hugging Face's; `compressm.save` and `compressm.load` support such models. Otherwise these layers
            share one state dimension: the smallest that keeps the promise in all of them, the largest within the limit
            of each, or an equal part of the budget.
        target: the kernels or the server that will run the model: ``"mamba_ssm"``, ``"vllm"``, ``"sglang"``,
            ``"flashinfer"``, ``"llama.cpp"`` or ``"transformers"``; see `compressm.theory.targets` for what each takes.

    Raises:
        InvalidRankRuleError: none or several of the six rules, a value out of range, or a limit below ``multiple_of``.
    """

    tolerance: float | None = None
    states: int | None = None
    fraction: float | None = None
    max_error: float | None = None
    total_states: int | None = None
    max_loss: float | None = None
    multiple_of: int = 1
    min_reduction: float = 0.05
    max_reduction: float = 1.0
    per_layer: bool = False
    target: Target | None = None

    def __post_init__(self) -> None:
        rules = ("tolerance", "states", "fraction", "max_error", "total_states", "max_loss")
        given = [name for name in rules if getattr(self, name) is not None]
        if len(given) != 1:
            got = ", ".join(f"{name}={getattr(self, name)}" for name in given) or "none"
            raise InvalidRankRuleError(f"give exactly one of {', '.join(rules)}; got {got}")
        _check("tolerance", self.tolerance, lambda v: 0 <= v < 1, "a share in [0, 1), for example 0.02")
        _check("states", self.states, lambda v: v >= 1 and v == int(v), "a whole number of at least 1")
        _check("fraction", self.fraction, lambda v: 0 < v <= 1, "a fraction in (0, 1], for example 0.25")
        _check("max_error", self.max_error, lambda v: v >= 0, "a number of at least 0")
        _check("total_states", self.total_states, lambda v: v >= 1 and v == int(v), "a whole number of at least 1")
        _check("max_loss", self.max_loss, lambda v: v >= 0, "a number of nats of at least 0, for example 0.01")
        _check("multiple_of", self.multiple_of, lambda v: v >= 1 and v == int(v), "a whole number of at least 1")
        _check("min_reduction", self.min_reduction, lambda v: 0 <= v < 1, "a share in [0, 1)")
        _check("max_reduction", self.max_reduction, lambda v: 0 < v <= 1, "a share in (0, 1]")
        if self.target is not None:
            check_choice("target", self.target, Target)
            if self.per_layer and self.target in ONE_SIZE:
                raise InvalidRankRuleError(
                    f"target={self.target!r} takes one state dimension for all layers: leave out per_layer, or target"
                )
        for name in ("states", "total_states"):
            limit = getattr(self, name)
            if limit is not None and limit < self.multiple_of:
                raise InvalidRankRuleError(
                    f"{name}={limit} is an upper limit, and less than multiple_of={self.multiple_of}: raise {name} or "
                    "lower multiple_of"
                )

    @property
    def guarantees_error(self) -> bool:
        """Whether the rule promises an error of each layer, which may need a state more, instead of a number of
        states."""
        return self.tolerance is not None or self.max_error is not None

    @property
    def promises_quality(self) -> bool:
        """Whether the rule limits the harm of each cut, instead of the number of states."""
        return self.guarantees_error or self.max_loss is not None


def largest_reduction(asked: float | None, *, size: bool) -> float:
    """The share of a layer's states that one cut may remove at most: what was asked for, or the default.

    Energies and metrics do not show everything that a large cut costs. Under a rule about quality (``tolerance``,
    ``max_error``, ``max_drop``) one cut therefore removes at most half of a layer's states. A rule about size
    (``states``, ``fraction``, ``total_states``) names its own end, and has no such limit.

    Args:
        asked: ``max_reduction`` as the user gave it.
        size: whether the rule is about size.
    """
    if asked is not None:
        return asked
    return 1.0 if size else _HALF


def check_choice(name: str, value: object, choices: Any) -> None:
    """Check that a value is one of a ``Literal``'s values.

    Raises:
        InvalidRankRuleError: it is none of them.
    """
    if value not in get_args(choices):
        known = ", ".join(map(repr, get_args(choices)))
        raise InvalidRankRuleError(f"{name} must be one of {known}; got {value!r}")


def _check(name: str, value: float | None, valid: Callable[[float], bool], expected: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not valid(value):
        raise InvalidRankRuleError(f"{name} must be {expected}; got {value!r}")


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
    _check_total(rule, present, alike, legal)
    groups = _groups(present, alike)
    sizes = [_sizes({name: present[name] for name in group}, rule, legal) for group in groups]
    made = discards or {}
    if rule.max_loss is not None or (rule.total_states is not None and set(damages or {}) >= set(energies)):
        chosen = _cheapest_in_loss(groups, sizes, present, rule, damages or {})
    elif rule.total_states is not None:
        chosen = _shared_budget(groups, sizes, energies, rule.total_states, made)
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


def check_sizes(
    rule: RankRule, present: Mapping[str, int], alike: Sequence[str] = (), legal: Legal | None = None
) -> None:
    """Refuse a limit that holds no size, before anything is computed: below ``multiple_of``, or below every size that
    the target takes.

    Args:
        rule: the user's rule.
        present: state dimension of every layer.
        alike: names of layers that share one.
        legal: as in `choose_ranks`.

    Raises:
        InvalidRankRuleError: such a limit.
    """
    _check_total(rule, present, alike, legal)
    _check_legal(rule, present, alike, legal)
    if rule.fraction is None or rule.multiple_of == 1:
        return
    for name, n in present.items():
        if (limit := _fraction(rule.fraction, n)) < min(rule.multiple_of, n):
            raise InvalidRankRuleError(
                f"fraction={rule.fraction:g} of the {n} states of {name!r} is {limit}, less than multiple_of="
                f"{rule.multiple_of}: raise fraction or lower multiple_of"
            )


def _check_legal(rule: RankRule, present: Mapping[str, int], alike: Sequence[str], legal: Legal | None) -> None:
    """Refuse a target whose sizes the rule does not reach, in any of the layers that share one size."""
    if legal is None:
        return
    free = replace(rule, max_reduction=1.0)
    for group in _groups(present, alike):
        dims = {name: present[name] for name in group}
        name, sizes = group[0], [size for size in _sizes(dims, free, legal) if size < max(dims.values())]
        if not sizes:
            raise InvalidRankRuleError(
                f"target={rule.target!r} takes no size below the {present[name]} states of {name!r} that is a multiple "
                f"of {rule.multiple_of} and suits all layers that share it: lower multiple_of, or leave target out"
            )
        limits = [limit for n in dims.values() if (limit := _limit(rule, n)) is not None]
        if limits and sizes[0] > min(limits) < max(dims.values()):
            which = f"fraction={rule.fraction:g}" if rule.states is None else f"states={rule.states}"
            raise InvalidRankRuleError(
                f"{which} is an upper limit, and target={rule.target!r} takes no size of {name!r} below {sizes[0]}: "
                f"ask for {', '.join(map(str, sizes[:4]))}{' or more' if len(sizes) > 4 else ''}, or another target"
            )


def _limit(rule: RankRule, present: int) -> int | None:
    """The most states that a rule of size leaves to a layer; None under other rules."""
    return rule.states if rule.fraction is None else _fraction(rule.fraction, present)


def _check_total(rule: RankRule, present: Mapping[str, int], alike: Sequence[str], legal: Legal | None = None) -> None:
    if rule.total_states is None:
        return
    least = sum(len(g) * _fewest_in_common({n: present[n] for n in g}, rule, legal) for g in _groups(present, alike))
    if rule.total_states >= least:
        return
    if rule.target is not None:
        raise InvalidRankRuleError(
            f"total_states={rule.total_states} is less than the {least} states that {len(present)} layers keep at "
            f"least with target={rule.target!r}: raise total_states, or choose another target"
        )
    if rule.multiple_of == 1:
        raise InvalidRankRuleError(
            f"total_states={rule.total_states} is less than one state for each of {len(present)} layers"
        )
    raise InvalidRankRuleError(
        f"total_states={rule.total_states} is less than the {least} states that {len(present)} layers keep at least "
        f"with multiple_of={rule.multiple_of}: raise total_states or lower multiple_of"
    )


def _groups(present: Mapping[str, int], alike: Sequence[str]) -> list[list[str]]:
    """Groups of layers: those that share one state dimension form one group, every other layer its own."""
    together = [name for name in present if name in alike]
    return [*([together] if together else []), *([name] for name in present if name not in alike)]


def fewest(present: int, rule: RankRule) -> int:
    """The fewest states that ``max_reduction`` leaves to a layer that has ``present``."""
    return max(1, present - math.floor(rule.max_reduction * present + 1e-9))


def _fewest_in_common(present: Mapping[str, int], rule: RankRule, legal: Legal | None) -> int:
    """The smallest size that layers can have in common, whatever ``max_reduction`` says."""
    if legal is None:
        return min(rule.multiple_of, *present.values())
    return min(_sizes(present, replace(rule, max_reduction=1.0), legal), default=min(present.values()))


def _sizes(present: Mapping[str, int], rule: RankRule, legal: Legal | None = None) -> list[int]:
    """Sizes that layers of these dimensions can have in common, ascending: multiples, and the least present dimension,
    as far as every layer has the size already or the target takes it. Empty if ``max_reduction`` keeps one layer larger
    than another layer is."""
    top = min(present.values())
    least = max(fewest(n, rule) for n in present.values())
    multiples = [*range(-(-least // rule.multiple_of) * rule.multiple_of, top + 1, rule.multiple_of)]
    sizes = multiples if top < least or top in multiples else [*multiples, top]
    if legal is None:
        return sizes
    return [size for size in sizes if all(size == n or size in legal.get(name, (size,)) for name, n in present.items())]


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
        limits = [_fraction(rule.fraction, n) for n in present]
    if not sizes or all(n <= limit for n, limit in zip(present, limits, strict=True)):
        return None
    return max((size for size in sizes if size <= min(limits)), default=sizes[0])


def _fraction(fraction: float, present: int) -> int:
    return max(1, math.floor(fraction * present + 1e-9))


def _tails(energy: Tensor) -> Tensor:
    """``sum_{i>r} s_i`` for r = 0..n, summed from the smallest up so that small tails keep their digits."""
    reversed_sums = energy.to(torch.float64).flip(-1).cumsum(-1).flip(-1)
    return torch.cat([reversed_sums, torch.zeros_like(reversed_sums[..., :1])], -1)


def _shared_budget(
    groups: Sequence[Sequence[str]],
    sizes: Sequence[Sequence[int]],
    energies: Mapping[str, Tensor],
    total: int,
    discards: Mapping[str, Discards],
) -> list[int | None]:
    """Sizes within the budget. Starting from the least sizes, the step with the largest gain per state is taken as long
    as one fits; a gain is a share of the layer's own energy."""
    alone = len(groups) == 1  # a single group gets the whole budget, so its gains need not be computed
    gains = [
        [0.0] * max(s, default=1)
        if alone
        else torch.stack([_shares(energies[n], discards.get(n))[: max(s, default=1)] for n in g]).mean(0).tolist()
        for g, s in zip(groups, sizes, strict=True)
    ]
    places = [0] * len(groups)
    spent = (
        len(g) * s[0] if s else sum(energies[name].shape[-1] for name in g)
        for g, s in zip(groups, sizes, strict=True)
    )  # fmt: skip
    left, waiting = total - sum(spent), list[tuple[float, int]]()

    def wait(index: int) -> None:
        if places[index] + 1 < len(sizes[index]):
            before, after = sizes[index][places[index] : places[index] + 2]
            heapq.heappush(waiting, (-sum(gains[index][before:after]) / (after - before), index))

    for index in range(len(groups)):
        wait(index)
    while waiting:
        _, index = heapq.heappop(waiting)
        before, after = sizes[index][places[index] : places[index] + 2]
        cost = len(groups[index]) * (after - before)
        if cost <= left:
            left -= cost
            places[index] += 1
            wait(index)
    return [s[place] if s else None for s, place in zip(sizes, places, strict=True)]


def _shares(energy: Tensor, discards: Discards | None) -> Tensor:
    """The share of a layer's energy that each state adds, the largest over the layer's systems, shape ``(n,)``."""
    energy = energy.to(torch.float64).reshape(-1, energy.shape[-1])
    total, n = energy.sum(-1, keepdim=True), energy.shape[-1]
    if discards is not None:
        tried = sorted({*torch.linspace(1, n, min(n, _SAMPLES)).round().int().tolist()})
        lost = torch.stack([total[:, 0], *(discards(states).reshape(-1) for states in tried)], -1)
        energy = torch.tensor([_gains([0, *tried], one) for one in lost.tolist()], dtype=torch.float64)
    share = energy / total.clamp_min(torch.finfo(torch.float64).tiny)
    return share.amax(0)


def _gains(sizes: Sequence[int], lost: Sequence[float]) -> list[float]:
    """The energy that each state adds, decreasing, from the losses of cuts to some sizes.

    The gains are the slopes of the lower convex hull, since one state may add little alone and much with the next one.
    """
    gains, here = list[float](), 0
    while here < len(sizes) - 1:
        slopes = [(lost[here] - lost[k]) / (sizes[k] - sizes[here]) for k in range(here + 1, len(sizes))]
        best = max(range(len(slopes)), key=lambda k: (slopes[k], k))
        gains += [max(0.0, slopes[best])] * (sizes[here + 1 + best] - sizes[here])
        here += 1 + best
    return gains
