"""How far a cut goes: derives the rule for one cut from the rule that the user gave."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from compressm.theory.possible_sizes import Legal
from compressm.theory.rank_rule import RankRule, largest_reduction
from compressm.theory.ranks import choose_ranks, passes_gate
from compressm.theory.targets import Target

# The rule if only max_drop is given. In the paper a tolerance of 0.02 costs 0.4 points on sequential MNIST, 0.04 costs
# 1.4.
_CAUTIOUS_TOLERANCE = 0.02


def wanted_rule(
    *,
    tolerance: float | None = None,
    states: int | None = None,
    fraction: float | None = None,
    max_error: float | None = None,
    total_states: int | None = None,
    max_loss: float | None = None,
    multiple_of: int = 1,
    min_reduction: float = 0.05,
    max_reduction: float | None = None,
    per_layer: bool = False,
    target: Target | None = None,
) -> RankRule:
    """The rule that the arguments of `Compressor` ask for.

    Without any of the first six, a cut discards at most 2 % of a layer's Hankel energy. `largest_reduction` says how
    many of its states a cut removes at most.

    Raises:
        InvalidRankRuleError: several of the first six, or a value out of range.
    """
    cautious = all(value is None for value in (tolerance, states, fraction, max_error, total_states, max_loss))
    return RankRule(
        tolerance=_CAUTIOUS_TOLERANCE if cautious else tolerance,
        states=states,
        fraction=fraction,
        max_error=max_error,
        total_states=total_states,
        max_loss=max_loss,
        multiple_of=multiple_of,
        min_reduction=min_reduction,
        max_reduction=largest_reduction(max_reduction, size=(states, fraction, total_states) != (None, None, None)),
        per_layer=per_layer,
        target=target,
    )


class GoalWarning(UserWarning):
    """The size that was asked for is not reached, or the model has it already."""


@dataclass(frozen=True)
class Goal:
    """The aim of all cuts together.

    A rule about quality (``tolerance``, ``max_error``, ``max_loss``) holds for every cut. A target size (``states``,
    ``fraction``, ``total_states``) is reached with the last cut, and the cuts before it approach the target
    geometrically: with k cuts left, a cut from n states towards m multiplies n by ``(m / n)^(1 / k)``.

    ``mildness`` is 1 at first and is halved by every roll-back. It scales the quantity that a cut may discard, or the
    exponent ``1 / k``.

    Attributes:
        rule: the rule that the user gave.
        initial_states: states of all layers together before the first cut; ``fraction`` is relative to these.
    """

    rule: RankRule
    initial_states: int

    def rule_now(self, dims: Collection[int], cuts_left: int, mildness: float = 1.0) -> RankRule:
        """The rule for the cut that is due.

        Args:
            dims: present state dimensions of all layers.
            cuts_left: how many cuts are still to come, this one included.
            mildness: in (0, 1].
        """
        rule = self.rule
        if rule.promises_quality:
            return self._promise(mildness)
        share = mildness / cuts_left  # share of the remaining way, in the logarithm of the size
        if rule.fraction is not None:
            left = rule.fraction * self.initial_states / sum(dims)
            return replace(rule, fraction=min(1.0, left) ** share)
        if rule.states is not None:
            return replace(rule, states=towards(max(dims), rule.states, share))
        assert rule.total_states is not None
        return replace(rule, total_states=towards(sum(dims), rule.total_states, share))

    def _promise(self, mildness: float) -> RankRule:
        rule = replace(self.rule, max_reduction=self.rule.max_reduction * mildness)
        if rule.tolerance is not None:
            return replace(rule, tolerance=rule.tolerance * mildness)
        if rule.max_loss is not None:
            return replace(rule, max_loss=rule.max_loss * mildness)
        assert rule.max_error is not None
        return replace(rule, max_error=rule.max_error * mildness)

    @property
    def size(self) -> str:
        """The size that a rule of size asks for, as the user gave it; empty under a rule of quality."""
        given = {name: getattr(self.rule, name) for name in ("states", "fraction", "total_states")}
        return next((f"{name}={value:g}" for name, value in given.items() if value is not None), "")

    def arrived(self, dims: Collection[int]) -> bool:
        """Whether layers of these state dimensions have the size that was asked for; a rule of quality asks for none.

        A layer of one state is as small as can be, whatever a fraction says.
        """
        rule = self.rule
        if rule.states is not None:
            return max(dims) <= rule.states
        if rule.fraction is not None:
            return sum(states for states in dims if states > 1) <= rule.fraction * self.initial_states + 1e-9
        return rule.total_states is None or sum(dims) <= rule.total_states

    def smaller_than(self, states: int) -> bool:
        """Whether the size that was asked for may be missed because a layer has so many states.

        Under a rule for all layers together no layer is small enough before it has one state.
        """
        return states > (self.rule.states or 1)

    def measured(self, dims: Collection[int]) -> str:
        """State dimensions in words, counted as the rule counts them."""
        if self.rule.total_states is not None:
            return f"{sum(dims)} states of all layers"
        least, most = min(dims), max(dims)
        return f"{most} states a layer" if least == most else f"{least} to {most} states a layer"

    def foreseen(
        self, dims: Mapping[str, int], cuts: int, alike: Sequence[str] = (), legal: Legal | None = None
    ) -> dict[str, int]:
        """The state dimensions after all cuts, if the rule is of size, none is undone, and all states matter alike.

        Args:
            dims: state dimension of every layer before the first cut.
            cuts: how many are made.
            alike, legal: as in `choose_ranks`.
        """
        for left in range(cuts, 0, -1):
            rule = self.rule_now(dims.values(), left)
            equal = {name: torch.ones(states, dtype=torch.float64) for name, states in dims.items()}
            ranks = choose_ranks(equal, rule, alike=alike, legal=legal)
            dims = {name: ranks[name] if passes_gate(n, ranks[name], rule) else n for name, n in dims.items()}
        return dict(dims)

    def obstacle(
        self, dims: Mapping[str, int], cuts: int, alike: Sequence[str] = (), legal: Legal | None = None
    ) -> str:
        """Why all cuts together will not arrive at the size that was asked for, or none is needed; empty if they may.

        Args:
            dims, cuts, alike, legal: as in `foreseen`.
        """
        if self.size and self.arrived(dims.values()):
            return f"{self.size} cuts nothing: there are {self.measured(dims.values())} already; ask for fewer"
        if not self.size or self.arrived((ends := self.foreseen(dims, cuts, alike, legal)).values()):
            return ""
        rule, remedies = self.rule, ("raise max_reduction", "lower min_reduction")
        least, most = f"min_reduction={rule.min_reduction:g}", f"max_reduction={rule.max_reduction:g}"
        looser = (replace(rule, max_reduction=1.0), replace(rule, min_reduction=0.0))
        helps = [replace(self, rule=one).foreseen(dims, cuts, alike, legal) for one in looser]
        useful = [one for one, dims in zip(remedies, helps, strict=True) if self.arrived(dims.values())]
        return (
            f"{self.size} is out of reach: {cuts} cuts of {least} to {most} of a layer's states end at "
            f"{self.measured(ends.values())}; {' or '.join(useful or remedies)}, or ask for a size within reach"
        )

    def too_mild(self, mildness: float) -> bool:
        """Whether the largest cut of this mildness would remove less than ``min_reduction`` of the states."""
        return self.rule.max_reduction * mildness < self.rule.min_reduction


_at_the_start: ContextVar[Mapping[str, int] | None] = ContextVar("state dimensions at the start", default=None)


@contextmanager
def started_with(dims: Mapping[str, int] | None) -> Generator[None]:
    """Let `Compressor` take these as the state dimensions before the first cut, while it is built in this block.

    A host that resumes a training loads weights first, so the model has already the size after some cuts.

    Args:
        dims: state dimension of every layer before the first cut; None for those of the model.
    """
    token = _at_the_start.set(dims)
    try:
        yield
    finally:
        _at_the_start.reset(token)


def initial_dims(present: Mapping[str, int]) -> dict[str, int]:
    """State dimensions before the first cut: those of `started_with` if they are of this model, else the present."""
    known = _at_the_start.get()
    return dict(known if known is not None and set(known) == set(present) else present)


def initial_dims_of(state: Mapping[str, Any]) -> dict[str, int]:
    """State dimensions before the first cut, from a compressor's `state_dict`.

    States of earlier versions do not store them. There the first planned cut in the history tells.
    """
    if "initial_dims" in state:
        return {name: int(states) for name, states in state["initial_dims"].items()}
    first = next((event["layers"] for event in state["history"] if event.get("layers")), ())
    return {**state["state_dims"], **{layer["name"]: int(layer["states_before"]) for layer in first}}


def towards(present: int, target: int, share: float) -> int:
    """The size after a share of the way from the present size to the target, geometrically: n (m / n)^share."""
    return present if target >= present else max(target, round(present * (target / present) ** share))


__all__ = ["Goal", "GoalWarning", "initial_dims", "initial_dims_of", "started_with", "towards", "wanted_rule"]
