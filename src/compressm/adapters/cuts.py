"""The cuts that one layer can be given: computed, certified, and ready to be written. Nothing is written here.

What decides is the same for all layers, a number of states and a rule. What a cut is differs: a linear time-invariant
layer has its balanced system truncated, a selective one has states picked or mapped by what the data did in them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from compressm.adapters.changes import LayerChange
from compressm.errors import InvalidSystemError
from compressm.theory.balancing import Balancing, Reduction
from compressm.theory.certificate import Certificate
from compressm.theory.pruning import SCORES, Score, prune
from compressm.theory.ranks import Discards, RankRule, passes_gate
from compressm.theory.recurrence import ErrorEstimate, SelectiveBalancing, SelectiveReduction
from compressm.theory.ruled_truncation import truncate_by_rule
from compressm.theory.selection import Selection, reduce_selective
from compressm.theory.systems import DiagonalSystem


@dataclass(frozen=True)
class Proposal:
    """A cut of one layer that has been computed.

    Attributes:
        states: state dimension after it.
        change: what to write; None where the cut must not be made.
        certificate: what is known of the cut.
        reason: why it must not be made; empty if it may.
        energy_kept: share of the layer's Hankel energy that it keeps; None where states were taken out as they are.
        poles_before, poles_after: eigenvalues of a linear time-invariant layer.
    """

    states: int
    change: LayerChange | None
    certificate: Certificate | ErrorEstimate
    reason: str = ""
    energy_kept: float | None = None
    poles_before: tuple[complex, ...] = ()
    poles_after: tuple[complex, ...] = ()


class Cuts(ABC):
    """Cuts of one layer, as it is now, to any number of states.

    Attributes:
        discards: the Hankel energy that a cut to so many states discards, for `choose_ranks`; None where that is the
            sum of the smallest Hankel singular values, which no cut can undercut.
    """

    discards: Discards | None = None

    @abstractmethod
    def proposal(self, states: int, rule: RankRule) -> Proposal | None:
        """The cut to as many states as a rule chose.

        Args:
            states: at least 1.
            rule: a promise of it is kept by the cut itself, with more states where it needs them.

        Returns:
            the cut; None where the rule asks for none that is worth making.
        """


class LinearCuts(Cuts):
    """Cuts of a linear time-invariant layer.

    Args:
        values: the layer's parameters and buffers.
        balanced: the layer.
        selection: the largest Hankel singular values are kept, but for ``"smallest"`` and ``"random"``; the scores of
            `pruning` leave out states as they are.
        read, plan: of the layer's `Adapter`.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        balanced: Balancing,
        selection: Selection,
        read: Callable[[Mapping[str, Tensor]], DiagonalSystem],
        plan: Callable[[Mapping[str, Tensor], Reduction], LayerChange],
    ) -> None:
        self._values, self._balanced, self._read, self._plan = values, balanced, read, plan
        self._selection: Selection = selection

    def proposal(self, states: int, rule: RankRule) -> Proposal | None:
        """Truncate, check the certificate, then check what the layer makes of the system in its own dtype."""
        reduction = self._reduction(states, rule)
        if reduction is None or not passes_gate(self._balanced.system.n, reduction.system.n, rule):
            return None
        proposal = Proposal(reduction.system.n, None, reduction.certificate)
        if not proposal.certificate.valid:
            return replace(proposal, reason="; ".join(proposal.certificate.failures))
        change = self._plan(self._values, reduction)
        return self._checked(replace(proposal, change=change), reduction)

    def _reduction(self, states: int, rule: RankRule) -> Reduction | None:
        """The reduced system; None where there is none with fewer states."""
        if self._selection in SCORES:
            return prune(self._balanced.system, states, cast("Score", self._selection))
        if self._selection in ("smallest", "random"):  # for comparison: they cannot keep a promise
            return truncate_by_rule(self._balanced.rearranged(self._selection), states, rule, promises=False)
        return truncate_by_rule(self._balanced, states, rule)

    def _checked(self, proposal: Proposal, reduction: Reduction) -> Proposal:
        """The proposal, refused if the layer that is written would not compute the certified system.

        The layer rounds to its dtype and parametrisation.
        """
        assert proposal.change is not None
        assert isinstance(proposal.certificate, Certificate)
        try:
            written = self._read({**self._values, **proposal.change.values()})
            roundings = reduction.system.minus(written).h2_norm()
        except InvalidSystemError as error:
            return replace(proposal, change=None, reason=f"after rounding: {error}")
        certificate = replace(proposal.certificate, rounding_error=float(roundings.max()))
        if (excess := rounds_too_much(roundings, reduction, self._values)) is not None:
            reason = f"rounding to the layer's dtype adds an H2 error of {excess:.3g}, more than the truncation's own"
            return replace(proposal, change=None, certificate=certificate, reason=reason)
        before, after = (tuple(each.lam.flatten().tolist()) for each in (self._balanced.system, reduction.system))
        kept = self._energy_kept(reduction)
        return replace(proposal, certificate=certificate, energy_kept=kept, poles_before=before, poles_after=after)

    def _energy_kept(self, reduction: Reduction) -> float | None:
        if self._selection in SCORES:
            return None
        energy = float(self._balanced.hsv.sum())
        share = float(reduction.discarded.sum()) / energy if energy > 0 else 0.0  # of nothing, nothing goes
        return max(0.0, 1 - share)


def rounds_too_much(roundings: Tensor, reduction: Reduction, values: Mapping[str, Tensor]) -> float | None:
    """The first H2 error by rounding, shape ``(*batch,)``, that is more than its own system's cut and than a thousandth
    of that system, and than what rounding does to the largest system of the layer; None where there is none."""
    eps = max(torch.finfo(value.dtype).eps for value in values.values() if value.is_floating_point())
    least = eps * max(one.h2_norm for one in reduction.certificates)
    for rounding, one in zip(roundings.reshape(-1).tolist(), reduction.certificates, strict=True):
        if rounding > max(1e-3 * one.h2_norm, one.h2_error, least):
            return rounding
    return None


class SelectiveCuts(Cuts):
    """Cuts of a selective layer. Each is made once, however often it is asked for.

    Args:
        values: the layer's parameters and buffers.
        balanced: the layer.
        selection: see `compressm.theory.selection.reduce_selective`.
        maps: ``folds_into``, ``folds_out`` and ``rotates`` of the layer, see `SelectiveAdapter.maps`.
        plan: of the layer's `SelectiveAdapter`.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        balanced: SelectiveBalancing,
        selection: Selection,
        maps: tuple[bool, bool, bool],
        plan: Callable[[Mapping[str, Tensor], SelectiveReduction], LayerChange],
    ) -> None:
        self._values, self._balanced, self._maps, self._plan = values, balanced, maps, plan
        self._selection: Selection = selection
        self._made: dict[int, SelectiveReduction] = {}
        best_possible = maps[0] and selection in ("hankel", "least_squares")
        self.discards = None if best_possible else self._discarded

    def proposal(self, states: int, rule: RankRule) -> Proposal:
        """Reduce, and check the estimate."""
        del rule  # ranks were chosen by what these cuts discard
        reduction = self._reduction(states)
        estimate = reduction.estimate
        if not estimate.valid:
            return Proposal(reduction.states, None, estimate, "; ".join(estimate.failures))
        change = self._plan(self._values, reduction)
        return Proposal(reduction.states, change, estimate, energy_kept=estimate.energy_kept)

    def _reduction(self, states: int) -> SelectiveReduction:
        if states not in self._made:
            into, out, rotates = self._maps
            made = reduce_selective(self._balanced, states, into, out, self._selection, rotates=rotates)
            self._made[states] = made
        return self._made[states]

    def _discarded(self, states: int) -> Tensor:
        found = self._reduction(states).discarded
        assert found is not None
        return found


__all__ = ["Cuts", "LinearCuts", "Proposal", "SelectiveCuts", "rounds_too_much"]
