"""The possible cuts of one layer: computed, certified, and ready to be written. Nothing is written here.

Every cut is asked for by a number of states and a rule. In a linear time-invariant layer it truncates the balanced
system; in a selective layer it selects or maps states by their moments on data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from compressm.adapters.changes import LayerChange
from compressm.errors import InvalidSystemError
from compressm.theory.balancing import Balancing, Reduction
from compressm.theory.certificate import Certificate
from compressm.theory.energy_budget import Discards
from compressm.theory.fisher import MaskEstimate, MaskFisher, reduce_by_fisher
from compressm.theory.pruning import SCORES, Score, prune
from compressm.theory.rank_rule import RankRule
from compressm.theory.ranks import passes_gate
from compressm.theory.recurrence import ErrorEstimate, SelectiveBalancing, SelectiveReduction
from compressm.theory.ruled_truncation import truncate_by_rule
from compressm.theory.selection import Selection, reduce_selective
from compressm.theory.systems import DiagonalSystem

# Nats per prediction. Above it a prediction of second order fails, and so do selections by it. On Mamba-2 they did less
# damage than those by second moments below it, and often more above it (results/after_the_cut.json, "fisher").
SECOND_ORDER = 0.05
_SELECTIONS: dict[str, Selection] = {"moments": "hankel", "powers": "gramians"}


# Criteria by which states can be picked where the layer takes no map of them: the Fisher matrix of a mask, its diagonal
# alone, second moments of states and output vectors, or the product of their mean powers (GHOST, arXiv 2602.11408).
Pick = Literal["fisher", "saliency", "moments", "powers"]
PICKS: tuple[Pick, ...] = get_args(Pick)


@dataclass(frozen=True)
class Proposal:
    """A cut of one layer that has been computed.

    Attributes:
        states: state dimension after it.
        change: what to write; None if the cut must not be made.
        certificate: its errors and checks.
        reason: why the cut must not be made; empty if it may be made.
        energy_kept: share of the layer's Hankel energy that the cut keeps; None if states were pruned without a change
            of basis.
        poles_before, poles_after: eigenvalues of a linear time-invariant layer.
        reduction: the reduced system or recurrence.
    """

    states: int
    change: LayerChange | None
    certificate: Certificate | ErrorEstimate
    reason: str = ""
    energy_kept: float | None = None
    poles_before: tuple[complex, ...] = ()
    poles_after: tuple[complex, ...] = ()
    reduction: Reduction | SelectiveReduction | None = None


class Cuts(ABC):
    """Cuts of one layer, in its present state, to any number of states.

    Attributes:
        discards: maps a number of states to the Hankel energy that the cut to it discards, for `choose_ranks`. None if
            this is the sum of the smallest Hankel singular values, the least that any cut can discard.
    """

    discards: Discards | None = None

    @abstractmethod
    def proposal(self, states: int, rule: RankRule) -> Proposal | None:
        """The cut to the number of states that a rule chose.

        Args:
            states: at least 1.
            rule: if it promises a quality, the cut keeps the promise, with more states if needed.

        Returns:
            the cut; None if the rule asks for none or its gate rejects it.
        """

    def picked(self, states: int, by: Pick) -> Proposal | None:
        """The cut to as many states, picked by a criterion of the caller's choice.

        Returns:
            None for a layer in which one way is always best, since maps of B or C can be folded in, and where the
            mask's Fisher matrix is not known.
        """
        del states, by


class LinearCuts(Cuts):
    """Cuts of a linear time-invariant layer.

    Args:
        values: the layer's parameters and buffers.
        balanced: the layer.
        selection: ``"smallest"`` and ``"random"`` keep the states with those Hankel singular values; the scores of
            `pruning` remove states without a change of basis; all others keep the largest Hankel singular values.
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
        """Truncate, check the certificate, then check the system that the layer computes in its own dtype."""
        reduction = self._reduction(states, rule)
        if reduction is None or not passes_gate(self._balanced.system.n, reduction.system.n, rule):
            return None
        proposal = Proposal(reduction.system.n, None, reduction.certificate, reduction=reduction)
        if not proposal.certificate.valid:
            return replace(proposal, reason="; ".join(proposal.certificate.failures))
        change = self._plan(self._values, reduction)
        return self._checked(replace(proposal, change=change), reduction)

    def _reduction(self, states: int, rule: RankRule) -> Reduction | None:
        """The reduced system; None if there is none with fewer states."""
        if self._selection in SCORES:
            return prune(self._balanced.system, states, cast("Score", self._selection))
        if self._selection in ("smallest", "random"):  # selections for comparison, which cannot keep a promise
            return truncate_by_rule(self._balanced.rearranged(self._selection), states, rule, promises=False)
        return truncate_by_rule(self._balanced, states, rule)

    def _checked(self, proposal: Proposal, reduction: Reduction) -> Proposal:
        """The proposal, refused if the written layer would not compute the certified system.

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
        share = float(reduction.discarded.sum()) / energy if energy > 0 else 0.0  # a zero system loses nothing
        return max(0.0, 1 - share)


def rounds_too_much(roundings: Tensor, reduction: Reduction, values: Mapping[str, Tensor]) -> float | None:
    """The first entry of ``roundings`` that is too large; None if there is none.

    ``roundings``, shape ``(*batch,)``, are H2 errors by rounding. One is too large if it exceeds the H2 error of the
    same system's cut, a thousandth of that system's norm, and the rounding error of the layer's largest system."""
    eps = max(torch.finfo(value.dtype).eps for value in values.values() if value.is_floating_point())
    least = eps * max(one.h2_norm for one in reduction.certificates)
    for rounding, one in zip(roundings.reshape(-1).tolist(), reduction.certificates, strict=True):
        if rounding > max(1e-3 * one.h2_norm, one.h2_error, least):
            return rounding
    return None


class SelectiveCuts(Cuts):
    """Cuts of a selective layer. Each one is computed once and remembered.

    Args:
        values: the layer's parameters and buffers.
        balanced: the layer.
        selection: see `compressm.theory.selection.reduce_selective`.
        maps: ``folds_into``, ``folds_out`` and ``rotates`` of the layer, see `SelectiveAdapter.maps`.
        plan: of the layer's `SelectiveAdapter`.
        fisher: Fisher matrix of a mask on the states, per prediction, of a layer that leaves a choice. It picks the
            states if ``selection`` is ``"hankel"``, and the rise of the loss that it predicts is at most
            `SECOND_ORDER`. Where C can compensate for removed states, least squares do less damage (measured on S6).
        gated: whether the states are also what the gates of the recurrence read, as in Griffin's block. Second moments
            do not see that the gates lose the removed states, and the mask does. So its Fisher matrix picks the states
            in the same range, and the kept ones compensate by one factor each. A half of the channels then costs a
            sixth to a half of what it costs by second moments and least squares (results/after_the_cut.json).
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        balanced: SelectiveBalancing,
        selection: Selection,
        maps: tuple[bool, bool, bool],
        plan: Callable[[Mapping[str, Tensor], SelectiveReduction], LayerChange],
        fisher: MaskFisher | None = None,
        gated: bool = False,
    ) -> None:
        self._values, self._balanced, self._maps, self._plan = values, balanced, maps, plan
        self._fisher = fisher if selection == "hankel" else None
        self._gated = gated
        self._selection: Selection = selection
        self._made: dict[tuple[int, Pick | None], SelectiveReduction] = {}
        best_possible = maps[0] and selection in ("hankel", "least_squares")
        self.discards = None if best_possible else self._discarded

    def proposal(self, states: int, rule: RankRule) -> Proposal:
        """Reduce, and check the estimate."""
        del rule  # `discards` already let the rule choose the rank by the energy that these cuts discard
        return self._proposed(self._reduction(states))

    def picked(self, states: int, by: Pick) -> Proposal | None:
        """The cut by a criterion, whatever the Fisher matrix predicts."""
        return None if self._fisher is None else self._proposed(self._reduction(states, by))

    def _proposed(self, reduction: SelectiveReduction) -> Proposal:
        estimate = reduction.estimate
        if not estimate.valid:
            return Proposal(reduction.states, None, estimate, "; ".join(estimate.failures))
        change = self._plan(self._values, reduction).in_files()
        return Proposal(reduction.states, change, estimate, energy_kept=estimate.energy_kept, reduction=reduction)

    def _reduction(self, states: int, by: Pick | None = None) -> SelectiveReduction:
        """By a criterion, or by the one that fits this layer."""
        if (states, by) not in self._made:
            self._made[states, by] = self._fitting(states) if by is None else self._by(states, by)
        return self._made[states, by]

    def _fitting(self, states: int) -> SelectiveReduction:
        if self._fisher is None:
            return self._by_moments(states, self._selection)
        made = self._reduction(states, "fisher")
        assert isinstance(made.estimate, MaskEstimate)
        return made if made.estimate.predicted_damage <= SECOND_ORDER else self._reduction(states, "moments")

    def _by(self, states: int, by: Pick) -> SelectiveReduction:
        if by in _SELECTIONS:
            return self._by_moments(states, _SELECTIONS[by])
        assert self._fisher is not None
        fisher = self._fisher if by == "fisher" else self._fisher.diagonal()
        takes_over = "gains" if self._gated else "nobody"
        return reduce_by_fisher(fisher, states, self._balanced.moments, takes_over)

    def _by_moments(self, states: int, selection: Selection) -> SelectiveReduction:
        into, out, rotates = self._maps
        return reduce_selective(self._balanced, states, into, out, selection, rotates=rotates)

    def _discarded(self, states: int) -> Tensor:
        found = self._reduction(states).discarded
        assert found is not None
        return found


__all__ = ["PICKS", "Cuts", "LinearCuts", "Pick", "Proposal", "SelectiveCuts", "rounds_too_much"]
