"""Selective and matrix-valued recurrences as values: a layer's signals, their second moments, and its reduction.

Mamba (S6), Mamba-2 (SSD), RetNet and linear attention are one recurrence, per channel ``c`` with a state of n entries:

    h_t = exp(-step_{t,c} rates_c) h_{t-1} + x_{t,c} B_t,    y_{t,c} = C_t . h_t

with ``B_t, C_t`` shared by the channels of a group. S6 has ``step = delta``, ``x = delta u`` and ``rates = -A``; with
one decay per head all rates are 1 and ``step = -log_decay``. Gated linear attention has a decay for every token and
state. The delta rule erases what is stored along ``B_t``: ``h_t = decay h_{t-1} (I - erase B_t B_t^T) + x_{t,c} B_t``.

Replacing ``h_t`` by ``out^T into h_t`` causes the output error ``C_t^T (I - out^T into) h_t``. If the state and the
output vector are uncorrelated beyond their second moments ``P = E[gain^2 h h^T]`` and ``W = E[C C^T]``, its power is

    tr W (I - out^T into) P (I - out^T into)^T

A lower bound for r states is ``sum_{i>r} sigma_i^2``, where ``sigma`` are the singular values of ``L_W^T L_P``, ``P =
L_P L_P^T``, ``W = L_W L_W^T``. With one decay per head, which commutes with every change of basis, the bound is
attained, and ``sigma`` are the Hankel singular values. P comes from the states themselves, so nothing is assumed about
how the input varies in time. The delta rule reads its state twice: the output along ``C_t``, the erasure along ``B_t``.
For it ``W = E[C C^T] + c E[B B^T]``, with c such that both terms have the same trace.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressm.errors import InvalidSystemError
from compressm.theory.balanced import Balanced, hankel_operator
from compressm.theory.sums import Sums

# Products of states are summed in float32 over this many steps, then in float64: long sums need more digits.
_FLOAT32_STEPS = 64


@dataclass(frozen=True)
class Signals:
    """The signals of one layer's recurrence while it reads some sequences.

    Attributes:
        x: the input, shape ``(batch, length, d)``: ``delta u`` in S6; heads and their entries flattened in SSD.
        step: advance of operational time, non-negative, shape ``(batch, length, d)``; or ``(batch, length, groups, n)``
            where every state of a group has a clock of its own, as in gated linear attention.
        rates: decay rates per unit of operational time, positive, shape ``(d, n)``; ones, shape ``(1, 1)``, for one
            decay per head or a clock per state.
        B, C: input and output vectors as the recurrence gets them, shape ``(batch, length, groups, n)``; channel ``c``
            uses group ``c // (d // groups)``. If C does not depend on time, it may be the rows of a matrix, shape
            ``(rows, groups, n)``.
        gain: factor between the recurrence's output and the layer's: the gate, and the norm of the channel's column in
            the output projection; shape ``(batch, length, d)``, or ``(batch, length, groups, n)`` where every state has
            a gate of its own, or None for ones.
        erase: for the delta rule, the share of the state along ``B_t`` that is erased before ``x_t`` is stored, shape
            ``(batch, length, groups)``, or ``(batch, length, d)`` where channels of a group erase differently, as heads
            of values that share a head of keys do; None for other recurrences.
        state: the initial state, shape ``(batch, d, n)``; None for zero.
        removed: a cut removes states, and nothing compensates for them: C must be known at every time. `moments` then
            also sums the products of single states' contributions; see `removal_costs`.
        substeps: how many steps of the recurrence stand for one token, where a token stores or reads several times.
            All lengths are then those of the substeps. A substep that reads nothing has a C and a gain of zero.
        squares: squares of the entries of B and C after division by their root mean square and before any weights, for
            layers whose norm of them a cut changes, shape ``(batch, tokens, 2, n)``. None for others.
    """

    x: Tensor
    step: Tensor
    rates: Tensor
    B: Tensor
    C: Tensor
    gain: Tensor | None = None
    erase: Tensor | None = None
    state: Tensor | None = None
    removed: bool = False
    substeps: int = 1
    squares: Tensor | None = None


@dataclass(frozen=True)
class Moments(Sums):
    """Moments of a recurrence under the data: sums over tokens, which add over batches and processes.

    Attributes:
        tokens: number of tokens, shape ``()``.
        P: sum of ``gain^2 h h^T`` over tokens and the channels of a group, shape ``(groups, n, n)``.
        W, V: sums of ``C C^T`` and ``B B^T`` over tokens, shape ``(groups, n, n)``. For the delta rule V, scaled to the
            same trace, is added to W: the output reads the state along C, and the erasure along B.
        B, C: sums over tokens, shape ``(groups, n)``.
        rates: ``tokens`` times the decay rates averaged over the channels of a group, shape ``(groups, n)``.
        reads, erasures: sums of ``gain^2 (C * h)(C * h)^T`` and ``erase^2 (B * h)(B * h)^T``, with products entry by
            entry, over tokens and the channels of a group, shape ``(groups, n, n)``. None unless `Signals.removed`.
        stored: sum of ``(x - erase B . h)^2``, what the delta rule really stores, shape ``(groups,)``; likewise.
        squares: sum of `Signals.squares` over tokens, shape ``(2, n)``; None without them.

    All are float64 on the CPU.
    """

    tokens: Tensor
    P: Tensor
    W: Tensor
    V: Tensor
    B: Tensor
    C: Tensor
    rates: Tensor
    reads: Tensor | None = None
    erasures: Tensor | None = None
    stored: Tensor | None = None
    squares: Tensor | None = None


class _LongSum:
    """A sum of outer products over many steps, shape ``(groups, n, n)``: float32 over some steps, then float64."""

    def __init__(self, groups: int, n: int, like: Tensor) -> None:
        self._block, self._steps = like.new_zeros(groups, n, n), 0
        self._total = torch.zeros(groups, n, n, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Add the products of vectors of shape ``(batch, groups, channels, n)``."""
        rows = vectors.transpose(0, 1).reshape(*self._block.shape[:1], -1, self._block.shape[-1])
        self._block = torch.baddbmm(self._block, rows.mT, rows)
        self._steps += 1
        if self._steps % _FLOAT32_STEPS == 0:
            self._total, self._block = self.total(), torch.zeros_like(self._block)

    def total(self) -> Tensor:
        """The sum up to now, float64 on the CPU."""
        return self._total + self._block.to("cpu", torch.float64)


@torch.no_grad()
def moments(signals: Signals, present: Tensor | None = None, *, padding_enters: bool = False) -> Moments:
    """Run the recurrence step by step and sum its moments, in ``O(batch length d n^2)`` operations.

    Args:
        signals: of the layer's recurrence.
        present: 1 for tokens and 0 for padding, shape ``(batch, length)``. Padding does not enter the state, and
            outputs at padding do not count. None for no padding.
        padding_enters: let padding enter the state like any input; outputs at padding still do not count.
    """
    x, step, B, C = (value.float() for value in (signals.x, signals.step, signals.B, signals.C))
    (batch, length, d), (groups, n) = x.shape, B.shape[2:]
    rates = signals.rates.float().expand(d, n).reshape(groups, -1, n)
    present = x.new_ones(batch, length // signals.substeps) if present is None else present.to(x)
    tokens = float(present.sum())
    squares = None if signals.squares is None else torch.einsum("bl,blvn->vn", present, signals.squares.float())
    present = present.repeat_interleave(signals.substeps, 1)
    x = (x if padding_enters else x * present[..., None]).reshape(batch, length, groups, -1, 1)
    keys, B = B, B * present[..., None, None]
    C = C if C.ndim == 3 else C * present[..., None, None]
    if step.ndim == 4:
        mean = (step * present[..., None, None]).sum((0, 1)) / max(tokens, 1.0)
        step, rates = step[:, :, :, None], rates * mean[:, None]
        decays = (torch.exp(-now) for now in step.unbind(1))
    else:
        step = step.reshape(x.shape)
        decays = (torch.exp(-now * rates) for now in step.unbind(1))
    gain = torch.ones_like(x) if signals.gain is None else signals.gain.float()
    gain = gain[:, :, :, None] if gain.ndim == 4 else gain.reshape(x.shape)
    gain = gain * present[..., None, None, None]
    erase = None if signals.erase is None else signals.erase.float().reshape(batch, length, groups, -1, 1)
    h = torch.zeros_like(x[:, 0] * rates)
    h = h if signals.state is None else signals.state.to(h).reshape(h.shape)
    P, reads, erasures = (_LongSum(groups, n, x) for _ in range(3))
    stored = torch.zeros(groups, dtype=torch.float64)
    for t, decay in enumerate(decays):
        h, key, new = decay * h, (keys if padding_enters else B)[:, t, :, None], x[:, t]
        if erase is not None:
            recalled = h * key
            new = new - erase[:, t] * recalled.sum(-1, keepdim=True)
            if signals.removed:
                erasures.add(erase[:, t] * recalled)
        h = h + new * key
        P.add(h * gain[:, t])
        if signals.removed:
            reads.add(h * gain[:, t] * C[:, t, :, None])
            stored += new.square().sum((0, 2, 3)).to(stored)
    B, C = (vectors.to("cpu", torch.float64).reshape(-1, groups, n) for vectors in (B, C))
    W, V = (vectors.mT @ vectors for vectors in (v.transpose(0, 1) for v in (C, B)))
    if erase is not None:
        W = W + V * (_trace(W) / _trace(V).clamp_min(1e-300))
    weight = tokens if signals.C.ndim == 3 else 1.0
    sums = (P.total(), weight * W, V, B.sum(0), weight * C.sum(0), tokens * rates.mean(1).to("cpu", torch.float64))
    squares = None if squares is None else squares.to("cpu", torch.float64)
    found = Moments(torch.tensor(tokens, dtype=torch.float64), *sums, squares=squares)
    if not signals.removed:
        return found
    return replace(found, reads=reads.total(), erasures=erasures.total(), stored=stored)


def _trace(matrices: Tensor) -> Tensor:
    """Traces, shape ``(groups, 1, 1)``, of matrices of shape ``(groups, n, n)``."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


@dataclass(frozen=True)
class SelectiveBalancing(Balanced):
    """The moments of a recurrence and its Hankel singular values.

    Attributes:
        P, W: mean moments of the states and of the output vectors, symmetric, float64, shape ``(groups, n, n)``.
        hsv: Hankel singular values (see the module's text), decreasing, shape ``(groups, n)``.
        moments: the sums from which P and W were computed.
    """

    P: Tensor
    W: Tensor
    hsv: Tensor
    moments: Moments

    @property
    def energy(self) -> Tensor:
        """Hankel energy per state, decreasing, shape ``(groups, n)``."""
        return self.hsv

    def hankel_operator(self) -> Tensor:
        """``(P^1/2 W P^1/2)^1/2`` in the layer's own coordinates, shape ``(groups, n, n)``."""
        return hankel_operator(self.P, root(self.W))

    def state(self) -> dict[str, Tensor]:
        """The moments, by name."""
        return self.moments.tensors()


def balance_selective(moments: Moments) -> SelectiveBalancing:
    """Hankel singular values from moments.

    Raises:
        InvalidSystemError: moments that are not finite.
    """
    bad = [name for name, value in moments.tensors().items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise InvalidSystemError(
            f"the moments {', '.join(bad)} of a selective layer are not finite: the data that they were gathered from "
            "are not finite, or the layer has diverged; look at the data first, then go back to a checkpoint from "
            "before that, or lower the learning rate"
        )
    P, W = moments.P / moments.tokens, moments.W / moments.tokens
    return SelectiveBalancing(P, W, torch.linalg.svdvals(root(W).mT @ root(P)), moments)


def removal_costs(balancing: SelectiveBalancing) -> Tensor | None:
    """Costs of removing states without compensation, shape ``(groups, n, n)``; None if they were not gathered.

    Removing the set R of a group's states changes the output by ``sum_{i in R} C_i h_i``. The power of this is the sum
    over i, j in R of ``reads_ij``, exactly, however states and output vectors are correlated. A delta rule also fails
    to erase ``erase sum_{i in R} B_i h_i`` and so stores a value that is wrong by as much. The output is linear in what
    is stored, so its relative error is about that of the stored values. Both errors are added, relative to the output.
    """
    m = balancing.moments
    if m.reads is None or m.erasures is None or m.stored is None:
        return None
    power = m.reads.sum((-2, -1)) / m.stored.clamp_min(1e-300)
    return (m.reads + power[:, None, None] * m.erasures) / m.tokens


def root(matrix: Tensor) -> Tensor:
    """``L`` with ``L L^T = matrix``, for symmetric positive semidefinite matrices ``(*batch, n, n)``."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt()[..., None, :]


@dataclass(frozen=True)
class ErrorEstimate:
    """The error of a cut of a selective layer, predicted from second moments of the data.

    Attributes:
        states_before, states_after: state dimension.
        relative_error: root mean square of the error in the recurrence's output, relative to that of the output itself.
            It is the expectation under the moments, before the norm and the projection that follow.
            `LayerReport.error_on_data` is the measured error of the layer's output.
        least_error: the same for the best linear map to as many states; no cut to this size has a smaller error.
        failures: reasons why the cut must not be made; empty if there are none.
        energy_kept: share of the layer's Hankel energy that the cut keeps, over all groups; see
            `SelectiveReduction.discarded`. None if it was not computed.
    """

    states_before: int
    states_after: int
    relative_error: float
    least_error: float
    failures: tuple[str, ...] = ()
    energy_kept: float | None = None

    @property
    def valid(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    def errors(self) -> tuple[float, float | None, float | None]:
        """As `Certificate.errors`; no H-infinity error is known of a selective layer."""
        return self.relative_error, None, None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {**asdict(self), "failures": list(self.failures)}


@dataclass(frozen=True)
class SelectiveReduction:
    """A smaller recurrence: ``h' = into h``, hence ``B' = into B``, and ``C' = out C``.

    Attributes:
        into, out: float64, shape ``(groups, r, n)``, one map per group of B and C.
        kept: the kept states, ascending, shape ``(groups, r)``, if ``into`` selects rows; each keeps its decay rates.
            None if ``into`` mixes states, which requires that all states decay alike.
        estimate: the predicted error of the cut.
        moments: from which it was computed; None if the maps only give shapes (see `first_states`).
        discarded: the Hankel energy that the cut discards in each group, shape ``(groups,)``: the sum of the singular
            values of ``L_W^T (I - out^T into) L_P``. The singular values of ``L_W^T L_P`` are the Hankel singular
            values, so an exact cut discards the sum of the smallest ones. No cut to as many states discards less
            (Mirsky 1960), and one that selects states nearly always discards more. The value is at least the root mean
            square of the error in the recurrence's output. None if the maps only give shapes.
    """

    into: Tensor
    out: Tensor
    kept: Tensor | None
    estimate: ErrorEstimate
    moments: Moments | None = None
    discarded: Tensor | None = None

    @property
    def states(self) -> int:
        """State dimension r."""
        return self.into.shape[-2]


def first_states(n: int, states: int, groups: int = 1) -> SelectiveReduction:
    """A placeholder that keeps the first ``states`` of n states; if ``states > n``, it adds states that do nothing.

    It gives a layer the right shapes before weights are loaded; do not compute with its maps."""
    keep = torch.eye(states, n, dtype=torch.float64).expand(groups, states, n)
    kept = torch.arange(states).clamp_max(n - 1).expand(groups, states)
    return SelectiveReduction(keep, keep, kept, ErrorEstimate(n, states, float("nan"), float("nan")))
