"""Which state dimensions layers can have under a rule, and which rules leave none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from compressm.errors import InvalidRankRuleError
from compressm.theory.rank_rule import RankRule

# The sizes that a target takes, by layer; see `targets.check_target`. Layers that are not named may have any size.
Legal = Mapping[str, Sequence[int]]


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
    check_total(rule, present, alike, legal)
    _check_legal(rule, present, alike, legal)
    if rule.fraction is None or rule.multiple_of == 1:
        return
    for name, n in present.items():
        if (limit := fraction_of(rule.fraction, n)) < min(rule.multiple_of, n):
            raise InvalidRankRuleError(
                f"fraction={rule.fraction:g} of the {n} states of {name!r} is {limit}, less than multiple_of="
                f"{rule.multiple_of}: raise fraction or lower multiple_of"
            )


def _check_legal(rule: RankRule, present: Mapping[str, int], alike: Sequence[str], legal: Legal | None) -> None:
    """Refuse a target whose sizes the rule does not reach, in any of the layers that share one size, and a limit below
    the sizes that layers can have."""
    if legal is None:
        return
    no_size = f"target={rule.target!r} takes no size" if rule.target is not None else "there is no size"
    free = replace(rule, max_reduction=1.0)
    for group in groups_of_one_size(present, alike):
        dims = {name: present[name] for name in group}
        name, sizes = group[0], [size for size in sizes_in_common(dims, free, legal) if size < max(dims.values())]
        if not sizes and rule.target is None:
            continue  # such layers stay as they are
        if not sizes:
            raise InvalidRankRuleError(
                f"{no_size} below the {present[name]} states of {name!r} that is a multiple "
                f"of {rule.multiple_of} and suits all layers that share it: lower multiple_of, or leave target out"
            )
        limits = [limit for n in dims.values() if (limit := limit_of(rule, n)) is not None]
        if limits and sizes[0] > min(limits) < max(dims.values()):
            which = f"fraction={rule.fraction:g}" if rule.states is None else f"states={rule.states}"
            raise InvalidRankRuleError(
                f"{which} is an upper limit, and {no_size} of {name!r} below {sizes[0]}: ask for "
                f"{', '.join(map(str, sizes[:4]))}{' or more' if len(sizes) > 4 else ''}"
                f"{', or another target' if rule.target is not None else ''}"
            )


def limit_of(rule: RankRule, present: int) -> int | None:
    """The most states that ``states`` or ``fraction`` leaves to a layer; None under other rules."""
    return rule.states if rule.fraction is None else fraction_of(rule.fraction, present)


def above_limit(rule: RankRule, present: Mapping[str, int], chosen: Mapping[str, int]) -> set[str]:
    """The layers that keep more states than a rule of size asks for; of a budget, all layers if it is exceeded.

    Args:
        rule: of size; under any other the set is empty.
        present: state dimension of every layer before the cut.
        chosen: and after it.
    """
    if rule.total_states is not None:
        return set(chosen) if sum(chosen.values()) > rule.total_states else set()
    limits = {name: limit_of(rule, present[name]) for name in chosen}
    return {name for name, limit in limits.items() if limit is not None and chosen[name] > limit}


def check_total(rule: RankRule, present: Mapping[str, int], alike: Sequence[str], legal: Legal | None = None) -> None:
    if rule.total_states is None:
        return
    least = sum(
        len(g) * _fewest_in_common({n: present[n] for n in g}, rule, legal) for g in groups_of_one_size(present, alike)
    )
    if rule.total_states >= least:
        return
    if rule.target is not None:
        raise InvalidRankRuleError(
            f"total_states={rule.total_states} is less than the {least} states that {len(present)} layers keep at "
            f"least with target={rule.target!r}: raise total_states, or choose another target"
        )
    if rule.multiple_of == 1 and legal is not None:
        raise InvalidRankRuleError(
            f"total_states={rule.total_states} is less than the {least} states that {len(present)} layers keep at "
            "least, which can have some sizes only: raise total_states"
        )
    if rule.multiple_of == 1:
        raise InvalidRankRuleError(
            f"total_states={rule.total_states} is less than one state for each of {len(present)} layers"
        )
    raise InvalidRankRuleError(
        f"total_states={rule.total_states} is less than the {least} states that {len(present)} layers keep at least "
        f"with multiple_of={rule.multiple_of}: raise total_states or lower multiple_of"
    )


def groups_of_one_size(present: Mapping[str, int], alike: Sequence[str]) -> list[list[str]]:
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
    return min(sizes_in_common(present, replace(rule, max_reduction=1.0), legal), default=min(present.values()))


def sizes_in_common(present: Mapping[str, int], rule: RankRule, legal: Legal | None = None) -> list[int]:
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


def fraction_of(fraction: float, present: int) -> int:
    return max(1, math.floor(fraction * present + 1e-9))
