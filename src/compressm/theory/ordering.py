"""States of a selective recurrence in order of worth: a change of coordinates after which every prefix is a good cut.

The layer computes the same function in the new coordinates, ``h' = into h`` and ``C' = out C`` with ``out^T into = I``.
A cut to r states keeps the first r of them, and needs no data. What it loses is known beforehand: with the moments
``P' = into P into^T`` and ``W' = out W out^T`` its error is

    error_r^2 = sum_{i,j>r} W'_ij P'_ij

Which coordinates are possible depends on the recurrence. Where every state decays at its own rate, or a non-linearity
stands before B and C, they are a permutation: states go in the order in which `removal_order` would remove them. The
delta rule allows rotations: the subspace of half of the states is found first, see `subspace`, and then divided again,
as is its complement. Where all states decay alike, the coordinates are balanced, whose prefixes are the best cuts of
all (Moore 1981). Moments that are singular are made regular first, so that the map has an inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.theory.fisher import MaskFisher, removal_rounds
from compressm.theory.recurrence import SelectiveBalancing, SelectiveReduction, removal_costs, root
from compressm.theory.selection import (
    RIDGE,
    Selection,
    by_score,
    is_score,
    reduction_by_maps,
    removal_order,
    removal_power,
    subspace,
)


def order_states(
    balancing: SelectiveBalancing, folds_into: bool = False, rotates: bool = False, selection: Selection = "hankel"
) -> SelectiveReduction:
    """The change of coordinates after which the states of every group come in order of worth.

    Args:
        balancing: the moments of the recurrence.
        folds_into, rotates: which maps the layer can take; see `SelectiveAdapter`.
        selection: what worth is, see `reduce_selective`. The selections with a score ask for a permutation in any case,
            and so do those that model P and W otherwise.

    Returns:
        a reduction to all n states: ``kept`` is the permutation, old indices in their new order, or None where the
        coordinates are mixed.
    """
    free = selection in ("hankel", "least_squares")
    if free and rotates:
        basis = torch.stack([nested_basis(P, W) for P, W in zip(balancing.P, balancing.W, strict=True)])
        return reduction_by_maps(balancing, basis.mT, basis.mT, None)
    if free and folds_into:
        into = balanced_coordinates(balancing.P, balancing.W)
        return reduction_by_maps(balancing, into, torch.linalg.inv(into).mT, None)
    groups, n = balancing.P.shape[:2]
    kept = torch.stack([_permutation(balancing, selection, group) for group in range(groups)])
    into = torch.eye(n, dtype=torch.float64)[kept]
    return reduction_by_maps(balancing, into, into, kept)


def order_by_fisher(balancing: SelectiveBalancing, fisher: MaskFisher) -> SelectiveReduction:
    """As `order_states`, by the Fisher matrix of a mask on the states: a permutation, the states that are removed last
    come first.

    Args:
        balancing: the moments of the recurrence.
        fisher: of the same layer.
    """
    kept = removal_rounds(fisher).flip(1)
    into = torch.eye(balancing.P.shape[-1], dtype=torch.float64)[kept]
    return reduction_by_maps(balancing, into, into, kept)


def prefix(balancing: SelectiveBalancing, order: SelectiveReduction, states: int) -> SelectiveReduction:
    """The cut to the first states of an order, made before the states are put in it."""
    kept = None if order.kept is None else order.kept[:, :states]
    return reduction_by_maps(balancing, order.into[:, :states], order.out[:, :states], kept)


def _permutation(balancing: SelectiveBalancing, selection: Selection, group: int) -> Tensor:
    """Old indices of the states of a group, the most valuable first."""
    if is_score(selection):
        return by_score(balancing, selection, group)
    power = removal_power(balancing, selection, group, removal_costs(balancing))
    return torch.tensor(removal_order(power, power.shape[0])).flip(0)


def prefix_errors(balancing: SelectiveBalancing, order: SelectiveReduction) -> Tensor:
    """The relative error of the recurrence's output if only the first r states of every group are kept; see the module.

    Args:
        balancing: the moments in the old coordinates.
        order: from `order_states`.

    Returns:
        shape ``(n + 1,)``, for r = 0, 1, ..., n.
    """
    costs = removal_costs(balancing)
    if costs is None or order.kept is None:
        powers = (order.out @ balancing.W @ order.out.mT) * (order.into @ balancing.P @ order.into.mT)
        whole = powers.sum()
    else:
        powers = torch.stack([cost[kept][:, kept] for cost, kept in zip(costs, order.kept, strict=True)])
        assert balancing.moments.reads is not None
        whole = balancing.moments.reads.sum() / balancing.moments.tokens
    n = powers.shape[-1]
    lost = torch.stack([powers[:, r:, r:].sum() for r in range(n + 1)])
    return (lost.clamp_min(0) / whole.clamp_min(1e-300)).sqrt()


def nested_basis(P: Tensor, W: Tensor) -> Tensor:
    """Orthonormal basis whose first half spans `subspace`, divided again in both halves.

    Args:
        P, W: moments, symmetric positive semidefinite, float64, shape ``(n, n)``.

    Returns:
        shape ``(n, n)``, the most valuable direction first.
    """
    n = P.shape[0]
    if n == 1:
        return torch.ones(1, 1, dtype=P.dtype)
    half = subspace((P + P.mT) / 2, (W + W.mT) / 2, (n + 1) // 2)
    rest = torch.linalg.qr(half, mode="complete").Q[:, half.shape[1] :]
    parts = [U @ nested_basis(U.mT @ P @ U, U.mT @ W @ U) for U in (half, rest)]
    return torch.linalg.qr(torch.cat(parts, 1)).Q  # orthonormal to the last digit


def balanced_coordinates(P: Tensor, W: Tensor) -> Tensor:
    """A map T of the states to balanced coordinates: ``T P T^T = T^-T W T^-1 = diag(s)``, s decreasing.

    Args:
        P, W: moments, symmetric positive semidefinite, float64, shape ``(*batch, n, n)``. A share of `RIDGE` of their
            mean diagonal is added, so that T has an inverse.

    Returns:
        T, shape ``(*batch, n, n)``.
    """
    L_P, L_W = (root(_regular(moment)) for moment in (P, W))
    U, s, _ = torch.linalg.svd(L_W.mT @ L_P)
    return s.rsqrt()[..., None] * (U.mT @ L_W.mT)


def _regular(moment: Tensor) -> Tensor:
    n = moment.shape[-1]
    level = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    level = torch.where(level > 0, RIDGE * level, 1.0)[..., None, None]
    return (moment + moment.mT) / 2 + level * torch.eye(n, dtype=moment.dtype)


__all__ = ["balanced_coordinates", "nested_basis", "order_by_fisher", "order_states", "prefix", "prefix_errors"]
