"""`RankRule`: the user's choice of how many states to keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from compressm.errors import InvalidRankRuleError
from compressm.theory.targets import ONE_SIZE, Target

# The largest share of a layer's states that one cut removes under a rule about quality, unless the user says otherwise.
_HALF = 0.5


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
        InvalidRankRuleError: none or several of the six rules, a value out of range, a limit below ``multiple_of``, or
            ``min_reduction`` above ``max_reduction``.
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
        if self.min_reduction > self.max_reduction:
            raise InvalidRankRuleError(
                f"min_reduction={self.min_reduction:g} is more than max_reduction={self.max_reduction:g}, so no layer "
                "could be cut: lower min_reduction, or raise max_reduction"
            )
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
