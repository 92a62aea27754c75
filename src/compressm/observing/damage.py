"""The damage of a cut, that is, the rise of the loss, predicted from some sequences before anything is written.

A cut changes the output of a layer by ``dy_t``. To first order the loss of a sequence changes by ``d = sum_t g_t .
dy_t``, with ``g_t`` the gradient at the layer's output. If targets are drawn from the model's own prediction, the
predictions of the cut model differ from those of the uncut one by the Kullback-Leibler divergence

    1/2 E_seq[(sum over layers of d)^2]     nats per sequence

There is no other assumption: ``dy`` is computed by running the reduced recurrence on the layer's own input. The formula
of `covariance`, ``1/2 L sum_{i>r} sigma_i^2``, also assumes that states and adjoints of different tokens are
uncorrelated. It ranks states well, but its value may be far off: on MNIST, read pixel by pixel, it is about fifteen
times too large (benchmarks/loss_aware_oneshot.py).

The quality of the prediction depends on the sequences. With 400 of them and gradients from `labels.fisher_probes` it is
within a factor of two between 0.002 and 0.1 nats, for most families (results/after_the_cut.json, docs/loss.md). Beyond
that the second order does not suffice. With 50 sequences and the data's own labels the measured divergence was up to
nine times the predicted one (benchmarks/loss_aware_oneshot.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressm.observing.adjoints import readings, run
from compressm.theory.balanced import Balanced
from compressm.theory.balancing import Reduction
from compressm.theory.covariance import CovarianceBalancing, truncate_covariances
from compressm.theory.loss_budget import calibrated, linear_curve
from compressm.theory.recurrence import SelectiveReduction
from compressm.theory.systems import DiagonalSystem

# Largest number of entries in one tensor of states: 16 MB of float32.
_BLOCK = 2**22


@dataclass(frozen=True)
class LinearSample:
    """One call of a linear layer: its input, and the gradient of every sequence's own loss at its output.

    Attributes:
        u, g: shape ``(sequences, length, d_model)``.
        lengths: lengths of the sequences, within which a layer with two directions reversed each one, shape
            ``(sequences,)``; None for the whole row.
    """

    u: Tensor
    g: Tensor
    lengths: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """The attributes, for a checkpoint."""
        return [self.u, self.g, self.lengths]

    def part(self, rows: slice) -> LinearSample:
        """Some of the sequences."""
        return LinearSample(self.u[rows], self.g[rows], None if self.lengths is None else self.lengths[rows])


@torch.no_grad()
def linear_changes(
    layer: nn.Module, system: DiagonalSystem, reduced: DiagonalSystem, calls: Sequence[LinearSample]
) -> Tensor:
    """The first-order change of every sequence's loss if a linear layer computed the reduced system.

    Args:
        layer: the layer before the cut.
        system, reduced: the layer's system before and after the cut.
        calls: all calls of the layer over the same sequences.

    Returns:
        float64, shape ``(sequences,)``.
    """
    difference = reduced.minus(system)
    total = torch.zeros(calls[0].u.shape[0], dtype=torch.float64)
    for call in calls:
        size = max(1, _BLOCK // (2 * difference.lam.numel() * call.u.shape[1]))
        blocks = (slice(start, start + size) for start in range(0, call.u.shape[0], size))
        total += torch.cat([_changes(layer, difference, call.part(rows)) for rows in blocks])
    return total


def linear_damages(
    layer: nn.Module, balancing: CovarianceBalancing, passes: Sequence[Sequence[LinearSample]], points: int = 8
) -> Tensor:
    """The damage curve of a linear layer, with cuts to some ranks tried on samples.

    Args:
        layer: the layer before the cut.
        balancing: of the system that its adapter reads.
        passes: from `Observer.samples`.
        points: how many ranks are tried, from 1 up in about geometric progression.

    Returns:
        predicted damage of keeping 0, 1, ..., n states, in nats per sequence, shape ``(n + 1,)``.
    """
    system = balancing.system

    def tried(rank: int) -> float | None:
        if rank == 0:
            reduced = DiagonalSystem(system.lam[..., :1], 0 * system.B[..., :1, :], system.C[..., :, :1])
        else:
            reduction = truncate_covariances(balancing, rank, quick=True)
            reduced = reduction.system if reduction.certificate.valid else None
        if reduced is None:
            return None
        return divergence([torch.cat([linear_changes(layer, system, reduced, calls) for calls in passes])])

    return _through(linear_curve(balancing.damage), tried, points)


def selective_damages(
    balancing: Balanced,
    passes: Sequence[Tensor],
    reduce: Callable[[int], SelectiveReduction | None],
    points: int = 8,
) -> Tensor:
    """The damage curve of a selective layer, with cuts to some ranks tried on samples; see `linear_damages`.

    Args:
        balancing: of the layer, from its moments; gives the shape of the curve between the tried ranks.
        passes: from `Observer.samples`.
        reduce: reduces the layer to a number of states; None if there is no valid cut to it.
        points: see `linear_damages`.
    """
    gradients = torch.cat(list(passes))

    def tried(rank: int) -> float | None:
        if rank == 0:
            nothing = gradients.diagonal(dim1=-2, dim2=-1).flatten(1).sum(1, dtype=torch.float64)
            return divergence([-nothing])
        reduction = reduce(rank)
        return None if reduction is None else divergence([selective_changes(gradients, reduction)])

    return _through(linear_curve(balancing.hsv.square()), tried, points)


def _through(curve: Tensor, tried: Callable[[int], float | None], points: int) -> Tensor:
    """The curve, corrected to pass through the damages of some tried ranks."""
    n = curve.shape[0] - 1
    ranks = {0, *(round(n ** (k / points)) for k in range(points))}
    damages = {rank: damage for rank in sorted(ranks) if rank < n and (damage := tried(rank)) is not None}
    return calibrated(curve, damages)


def _changes(layer: nn.Module, difference: DiagonalSystem, call: LinearSample) -> Tensor:
    change = torch.zeros(call.u.shape[0], dtype=torch.float64)
    for one in readings(layer, difference, call.u, call.g, None, call.lengths):
        x = run(difference.lam, difference.B, one.u)
        adjoint = one.g.to(x) if difference.lam.ndim == 1 else one.g.to(x)[..., None]
        re, im = (part.to(x) for part in (one.C.real, one.C.imag))
        # g . Re(C x) = (C^T g) . x, real and imaginary part apart
        seen = torch.stack([_transposed(re, adjoint), -_transposed(im, adjoint)], 2)
        change += (seen * x).flatten(1).sum(1, dtype=torch.float64).cpu()
    return change


def _transposed(C: Tensor, g: Tensor) -> Tensor:
    """``C^T g``, of shape ``(batch, length, n)``, or ``(batch, length, systems, n)``."""
    return g @ C if C.ndim == 2 else g * C[:, 0]


def selective_changes(gradients: Tensor, reduction: SelectiveReduction) -> Tensor:
    """The first-order change of every sequence's loss if a selective layer is reduced.

    For Griffin's block the prediction ignores the compensation by the output projection.

    Args:
        gradients: of a map on the layer's states, see `masks`, shape ``(sequences, groups, n, n)``. One group if all
            groups share the map, as in Mamba-3.
        reduction: any reduction of this layer; with such a map it is the same in all groups.

    Returns:
        float64, shape ``(sequences,)``.
    """
    change = reduction.out.mT @ reduction.into - torch.eye(gradients.shape[-1], dtype=torch.float64)
    return (gradients.to(torch.float64) * change[: gradients.shape[1]]).flatten(1).sum(1)


def divergence(changes: Iterable[Tensor]) -> float:
    """``1/2 E_seq[(sum over layers of d)^2]``, in nats per sequence.

    Args:
        changes: one tensor per layer, shape ``(sequences,)``, over the same sequences in the same order.
    """
    total = torch.stack(list(changes)).sum(0)
    return float(total.square().mean() / 2)


def changes_of(
    layer: nn.Module,
    system: DiagonalSystem | None,
    reduction: Reduction | SelectiveReduction,
    passes: Sequence[Sequence[LinearSample] | Tensor],
) -> Tensor:
    """The first-order change of every sequence's loss if a layer is reduced.

    Args:
        layer: the layer before the cut.
        system: that it computes, if it is time-invariant.
        reduction: of this layer.
        passes: from `Observer.samples`.

    Returns:
        float64, shape ``(sequences,)``.
    """
    if isinstance(reduction, SelectiveReduction):
        return selective_changes(torch.cat([one for one in passes if isinstance(one, Tensor)]), reduction)
    assert system is not None
    calls = [one for one in passes if not isinstance(one, Tensor)]
    return torch.cat([linear_changes(layer, system, reduction.system, each) for each in calls])


def damage_curve(
    layer: nn.Module,
    balanced: Balanced,
    passes: Sequence[Sequence[LinearSample] | Tensor],
    reduce: Callable[[int], Reduction | SelectiveReduction | None],
    points: int = 8,
) -> Tensor:
    """The damage curve of a layer of either kind; see `linear_damages` and `selective_damages`.

    Args:
        layer: the layer before the cut.
        balanced: the layer.
        passes: from `Observer.samples`.
        reduce: reduces the layer to a number of states; None if there is no valid cut to it.
        points: see `linear_damages`.
    """
    gradients = [one for one in passes if isinstance(one, Tensor)]
    if isinstance(balanced, CovarianceBalancing):
        calls = [one for one in passes if not isinstance(one, Tensor)]
        return linear_damages(layer, balanced, calls, points)

    def selected(states: int) -> SelectiveReduction | None:
        reduction = reduce(states)
        return reduction if isinstance(reduction, SelectiveReduction) else None

    return selective_damages(balanced, gradients, selected, points)


__all__ = [
    "LinearSample",
    "changes_of",
    "damage_curve",
    "divergence",
    "linear_changes",
    "linear_damages",
    "selective_changes",
    "selective_damages",
]
