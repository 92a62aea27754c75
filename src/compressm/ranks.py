"""How many states to keep: one value that says what the user asked for, and one function that answers.

Every rule reads the *energy per state* ``s_1 >= s_2 >= ...`` of a layer (see `balancing.Balancing.energy`), of which
the truncation bound is twice the discarded sum. "Keep everything" is an ordinary answer of every rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from compressm.errors import InvalidRankRuleError


@dataclass(frozen=True)
class RankRule:
    """What decides the state dimension. Exactly one of the first five is given.

    Args:
        tolerance: the share of the Hankel energy that may be discarded in a layer (tau in the CompreSSM paper): the
            smallest ``r`` with ``sum_{i<=r} s_i >= (1 - tolerance) sum_i s_i``. In [0, 1).
        states: at most this many states in every layer.
        fraction: at most this fraction of a layer's present states, in (0, 1].
        max_error: the H-infinity error allowed per layer, in the units of output per input: the smallest ``r`` with ``2
            sum_{i>r} s_i <= max_error``.
        total_states: a budget over all layers together: those states with the largest share of their own layer's
            energy are kept, wherever they are.
        multiple_of: round the result up to a multiple (what the hardware likes), never above the present dimension.
        min_reduction: cut a layer only if this share of its states goes (0.05: the paper's 0.95 gate).
        max_reduction: of a layer's states at most this share goes, rounded down, whatever the rule says. In (0, 1].
        per_layer: let layers differ in their state dimension even where the model's own checkpoint format has only one
            for all, as in Hugging Face's; `compressm.save` and `compressm.load` keep such a model. Otherwise these
            layers all get the largest dimension that the rule gives any of them (under ``total_states``, the mean).

    Raises:
        InvalidRankRuleError: none or several of the five rules, or a value out of range.
    """

    tolerance: float | None = None
    states: int | None = None
    fraction: float | None = None
    max_error: float | None = None
    total_states: int | None = None
    multiple_of: int = 1
    min_reduction: float = 0.05
    max_reduction: float = 1.0
    per_layer: bool = False

    def __post_init__(self) -> None:
        rules = ("tolerance", "states", "fraction", "max_error", "total_states")
        given = [name for name in rules if getattr(self, name) is not None]
        if len(given) != 1:
            got = ", ".join(f"{name}={getattr(self, name)}" for name in given) or "none"
            raise InvalidRankRuleError(f"give exactly one of {', '.join(rules)}; got {got}")
        _check("tolerance", self.tolerance, lambda v: 0 <= v < 1, "a share in [0, 1), for example 0.02")
        _check("states", self.states, lambda v: v >= 1 and v == int(v), "a whole number of at least 1")
        _check("fraction", self.fraction, lambda v: 0 < v <= 1, "a fraction in (0, 1], for example 0.25")
        _check("max_error", self.max_error, lambda v: v >= 0, "a number of at least 0")
        _check("total_states", self.total_states, lambda v: v >= 1 and v == int(v), "a whole number of at least 1")
        _check("multiple_of", self.multiple_of, lambda v: v >= 1 and v == int(v), "a whole number of at least 1")
        _check("min_reduction", self.min_reduction, lambda v: 0 <= v < 1, "a share in [0, 1)")
        _check("max_reduction", self.max_reduction, lambda v: 0 < v <= 1, "a share in (0, 1]")

    @property
    def guarantees_error(self) -> bool:
        """Whether the rule promises an error (so that a state more is allowed) rather than a number of states."""
        return self.tolerance is not None or self.max_error is not None


def check_choice(name: str, value: object, choices: Any) -> None:
    """One of a ``Literal``'s values.

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


def choose_ranks(energies: Mapping[str, Tensor], rule: RankRule) -> dict[str, int]:
    """The number of states that each layer keeps under a rule, before the gate.

    Args:
        energies: per layer, the energy of each of its present states, decreasing, shape ``(n,)``, or ``(*batch, n)``
            where a layer holds a batch of systems that keep one common rank (the largest that any of them needs).
        rule: what was asked for.

    Returns:
        per layer a number in ``1..n``; ``n`` means that nothing may be cut.
    """
    if rule.total_states is not None:
        ranks = _shared_budget(energies, rule.total_states)
    else:
        ranks = {name: _layer_rank(energy, rule) for name, energy in energies.items()}
    return {name: _round(ranks[name], energy.shape[-1], rule) for name, energy in energies.items()}


def passes_gate(present: int, proposed: int, rule: RankRule) -> bool:
    """Whether the proposed cut is worth making: it takes at least `min_reduction` of the states, and at least one."""
    return proposed < present and present - proposed >= rule.min_reduction * present


def _layer_rank(energy: Tensor, rule: RankRule) -> int:
    n = energy.shape[-1]
    if rule.states is not None:
        return min(rule.states, n)
    if rule.fraction is not None:
        return max(1, math.floor(rule.fraction * n + 1e-9))
    tails = _tails(energy)
    if rule.tolerance is not None:
        allowed = rule.tolerance * tails[..., :1]
    else:
        assert rule.max_error is not None
        allowed = torch.full_like(tails[..., :1], rule.max_error / 2)
    # The first index whose tail is within what is allowed; the last tail is exactly zero, so there always is one.
    return int((tails <= allowed).int().argmax(-1).max())


def _tails(energy: Tensor) -> Tensor:
    """``sum_{i>r} s_i`` for r = 0..n, summed from the smallest up so that small tails keep their digits."""
    reversed_sums = energy.to(torch.float64).flip(-1).cumsum(-1).flip(-1)
    return torch.cat([reversed_sums, torch.zeros_like(reversed_sums[..., :1])], -1)


def check_total(total: int, layers: int) -> None:
    """A budget of at least one state for every layer.

    Raises:
        InvalidRankRuleError: it is less.
    """
    if total < layers:
        raise InvalidRankRuleError(f"total_states={total} is less than one state for each of {layers} layers")


def _shared_budget(energies: Mapping[str, Tensor], total: int) -> dict[str, int]:
    check_total(total, len(energies))
    ranks = dict.fromkeys(energies, 1)
    candidates: list[tuple[float, str]] = []
    for name, energy in energies.items():
        share = energy.to(torch.float64) / energy.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        share = share.reshape(-1, share.shape[-1]).amax(0)
        candidates += [(float(value), name) for value in share[1:]]
    candidates.sort(key=lambda pair: -pair[0])
    for _, name in candidates[: total - len(energies)]:
        ranks[name] += 1
    return ranks


def _round(rank: int, present: int, rule: RankRule) -> int:
    least = present - math.floor(rule.max_reduction * present + 1e-9)
    rank = math.ceil(max(rank, least, 1) / rule.multiple_of) * rule.multiple_of
    return min(rank, present)
