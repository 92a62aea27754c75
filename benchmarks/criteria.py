"""The criteria by which states can be chosen, ours and others', as cuts of one model to one size.

- Linear layers: balanced truncation under white noise (``hankel``); modes by their decay (``modal``), by the energy of
  their impulse response (``energy``, as AIRE-Prune, arXiv 2602.00534), and random ones (``random_modes``).
- Selective layers: second moments (``hankel``); the product of the mean powers of state and output vector
  (``gramians``, the criterion of GHOST, arXiv 2602.11408); the size of B and C (``magnitude``); the strong
  rank-revealing QR of the keys (``rrqr``, arXiv 2602.04852); the mean square of the gradient of a mask (``saliency``);
  and random ones (``random``). Where C takes no maps also the mask's whole Fisher matrix at every size (``fisher``).
- Both: by the loss (``loss``); of selective layers that leave a choice, the way that does least damage on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import scipy.linalg
import torch
from torch import Tensor, nn

from compressm.adapters import LayerChange, SelectiveAdapter, find_layers
from compressm.adapters.changes import layer_values
from compressm.adapters.cuts import Pick
from compressm.cutting import plan_reduction
from compressm.cutting.picking import best_picked
from compressm.observing.loss_evidence import Loss, LossEvidence
from compressm.theory.fisher import MaskFisher, reduce_by_fisher
from compressm.theory.rank_rule import RankRule
from compressm.theory.recurrence import Moments, SelectiveReduction, balance_selective, root
from compressm.theory.selection import reduction_by_maps

LINEAR, SELECTIVE = ("hankel", "modal", "energy", "random_modes"), ("hankel", "gramians", "magnitude", "random")
SWAPS, LEAST_GAIN = 20, 1.5  # of the published code of arXiv 2602.04852


def criteria(
    model: nn.Module, moments: Mapping[str, Moments], evidence: LossEvidence, states: int, data: Any, loss: Loss
) -> Iterator[tuple[str, Mapping[str, LayerChange], float | None]]:
    """Every criterion with the changes that it would make, and the predicted rise of the loss.

    Args:
        model: not cut yet.
        moments, evidence: on ``data``.
        states: to cut to.
        data: batches; some ways are tried on them, see `compressm.cutting.picking`.
        loss: see `compressm.cutting.rise.measured_rises`.
    """
    rule = RankRule(states=states, min_reduction=0.0)
    selections: Any = SELECTIVE if moments else LINEAR
    for selection in selections:
        yield selection, plan_reduction(model, rule, moments=moments, selection=selection).changes, None
    in_pairs = any(not adapter.sorts for _, adapter in selective(model))  # no criterion of others' knows of pairs
    if in_pairs:
        yield "saliency", by_pick(model, moments, evidence.fishers, states, "saliency"), None
        yield "fisher", by_pick(model, moments, evidence.fishers, states, "fisher"), None
    elif moments:
        diagonals = {name: fisher.diagonal() for name, fisher in evidence.fishers.items()}
        yield "saliency", by_fisher(model, moments, diagonals, states), None
        yield "rrqr", planned(model, lambda name: by_keys(moments[name], states)), None
    if not in_pairs and any(not any(adapter.maps(layer)) for layer, adapter in selective(model)):
        yield "fisher", by_fisher(model, moments, evidence.fishers, states), None
    plan = best_picked(model, plan_reduction(model, rule, moments=moments, loss=evidence, others=True), data, loss)
    yield "loss", plan.changes, plan.report.predicted_loss


def selective(model: nn.Module) -> list[tuple[nn.Module, SelectiveAdapter]]:
    """The selective layers, with their adapters."""
    found = find_layers(model).values()
    return [(layer, adapter) for layer, adapter in found if isinstance(adapter, SelectiveAdapter)]


def planned(model: nn.Module, reduction: Callable[[str], SelectiveReduction]) -> dict[str, LayerChange]:
    """The changes that make every selective layer smaller by its reduction."""
    changes: dict[str, LayerChange] = {}
    for name, (layer, adapter) in find_layers(model).items():
        assert isinstance(adapter, SelectiveAdapter)
        changes[name] = adapter.plan(layer_values(layer), reduction(name))
    return changes


def by_fisher(
    model: nn.Module, moments: Mapping[str, Moments], fishers: Mapping[str, MaskFisher], states: int
) -> dict[str, LayerChange]:
    """The states that the Fisher matrices of masks pick; by their diagonals, those with the largest mean square
    gradients."""
    return planned(model, lambda name: reduce_by_fisher(fishers[name], states, moments[name]))


def by_pick(
    model: nn.Module, moments: Mapping[str, Moments], fishers: Mapping[str, MaskFisher], states: int, by: Pick
) -> dict[str, LayerChange]:
    """As `by_fisher`, for layers whose states stay or go in pairs."""
    changes: dict[str, LayerChange] = {}
    for name, (layer, adapter) in find_layers(model).items():
        cuts = adapter.cuts(layer, adapter.balance(layer, moments[name]), fisher=fishers[name])
        proposal = cuts.picked(states, by)
        assert proposal is not None
        assert proposal.change is not None
        changes[name] = proposal.change
    return changes


def by_keys(moments: Moments, states: int) -> SelectiveReduction:
    """The states whose keys (B) span those of all best, by the strong rank-revealing QR of the keys on the data.

    The columns of the keys have the same pivots as those of any matrix with the same products ``K^T K``.
    """
    kept = torch.stack([strong_rrqr(root(products).mT, states) for products in moments.V])
    into = torch.eye(moments.V.shape[-1], dtype=torch.float64)[kept]
    return reduction_by_maps(balance_selective(moments), into, into, kept)


def strong_rrqr(matrix: Tensor, count: int) -> Tensor:
    """The columns that the strong rank-revealing QR keeps (Gu, Eisenstat 1996, SIAM J. Sci. Comput. 17, algorithm 4).

    With ``M P = Q [[A, B], [0, C]]``, an exchange of columns i and j multiplies ``|det A|`` by

        sqrt((A^-1 B)_ij^2 + (||C_j|| ||(A^-1)_i||)^2)

    The largest is made until none is above `LEAST_GAIN`, at most `SWAPS` times.

    Args:
        matrix: M, float64, shape ``(rows, columns)``, at least as many rows as columns.
        count: of columns to keep.

    Returns:
        their indices, ascending, shape ``(count,)``.
    """
    order = torch.from_numpy(scipy.linalg.qr(matrix.numpy(), pivoting=True, mode="r")[1].copy()).long()
    for _ in range(SWAPS):
        R = torch.linalg.qr(matrix[:, order], mode="r").R
        A, B, C = R[:count, :count], R[:count, count:], R[count:, count:]
        if float(A.diagonal().abs().min()) < 1e-9 * float(R.abs().max()) or not B.numel():
            break
        inverse = torch.linalg.solve_triangular(A, torch.eye(count, dtype=A.dtype), upper=True)
        gains = ((inverse @ B).square() + torch.outer(inverse.norm(dim=1), C.norm(dim=0)).square()).sqrt()
        if float(gains.max()) <= LEAST_GAIN:
            break
        i, j = divmod(int(gains.argmax()), gains.shape[1])
        order[[i, count + j]] = order[[count + j, i]]
    return order[:count].sort().values
