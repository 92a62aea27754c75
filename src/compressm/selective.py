"""Selective and matrix-valued recurrences as values: what goes through a layer, its second moments, a smaller layer.

Mamba (S6), Mamba-2 (SSD), RetNet, linear attention are one recurrence, per channel ``c`` with a state of n entries:

    h_t = exp(-step_{t,c} rates_c) h_{t-1} + x_{t,c} B_t,    y_{t,c} = C_t . h_t

with ``B_t, C_t`` shared by the channels of a group. In operational time, which advances by ``step``, its dynamics do
not vary; only the vectors B_t and C_t do. S6 has ``step = delta``, ``x = delta u`` and ``rates = -A``; with one decay
per head all rates are 1 and ``step = -log_decay``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Signals:
    """What goes through one layer's recurrence while it reads some sequences.

    Attributes:
        x: what enters, shape ``(batch, length, d)``: ``delta u`` in S6; heads and their entries flattened in SSD.
        step: advance of operational time, non-negative, shape ``(batch, length, d)`` or ``(batch, length, 1)``.
        rates: decay rates per unit of operational time, positive, shape ``(d, n)``; ones, shape ``(1, 1)``, for one
            decay per head.
        B, C: input and output vectors as the recurrence gets them, shape ``(batch, length, groups, n)``; channel ``c``
            uses group ``c // (d // groups)``.
        gain: factor between the recurrence's output and the layer's: the gate, and the norm of the channel's column in
            the output projection; shape ``(batch, length, d)``, or None for ones.
    """

    x: Tensor
    step: Tensor
    rates: Tensor
    B: Tensor
    C: Tensor
    gain: Tensor | None = None


@dataclass(frozen=True)
class ErrorEstimate:
    """What a cut of a selective layer is expected to do, from second moments of the data.

    Attributes:
        states_before, states_after: state dimension.
        relative_error: root of the recurrence's mean squared output error, relative to that of its output. Expected
            under the moments; inputs that are not like the data can do worse.
        failures: why the cut must not be made; empty if it may.
    """

    states_before: int
    states_after: int
    relative_error: float
    failures: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {**asdict(self), "failures": list(self.failures)}


@dataclass(frozen=True)
class SelectiveReduction:
    """A smaller recurrence: ``B' = into B`` and ``C' = out C``, with the decay rates of the new states.

    Attributes:
        into, out: float64, shape ``(groups, r, n)``, one map per group of B and C (one group in S6).
        rates: decay rates of the new states, positive, float64, shape ``(d, r)``; ``(1, 1)`` for one decay per head.
        kept: the states that were kept, ascending, shape ``(groups, r)``, where ``into`` is a selection of rows
            (``out`` may still mix, and then makes up for the states that went); None where it is not.
        mixes_out: whether ``out`` is more than the same selection.
        estimate: what the cut is expected to do.
    """

    into: Tensor
    out: Tensor
    rates: Tensor
    kept: Tensor | None
    mixes_out: bool
    estimate: ErrorEstimate

    @property
    def states(self) -> int:
        """State dimension r."""
        return self.into.shape[-2]


def first_states(rates: Tensor, groups: int, n: int, states: int) -> SelectiveReduction:
    """The first ``states`` of n states, or all of them and new ones with rate 1 that do nothing: shapes to load
    weights over, not a reduction to compute with.

    Args:
        rates: shape ``(d, n)``, or ``(1, 1)`` for one decay per head.
        groups: number of groups of B and C.
        n, states: state dimension before and after.
    """
    keep = torch.eye(states, n, dtype=torch.float64).expand(groups, states, n)
    if rates.shape != (1, 1):
        rates = torch.nn.functional.pad(rates.detach().to("cpu", torch.float64), (0, states), value=1.0)[:, :states]
    kept = torch.arange(min(n, states)).expand(groups, -1)
    return SelectiveReduction(keep, keep, rates, kept, False, ErrorEstimate(n, states, float("nan")))
