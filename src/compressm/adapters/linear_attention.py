"""Layers with a matrix-valued state. Keys and queries are linear in the input, so maps of them fold into their
projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.base import SelectiveAdapter
from compressm.adapters.changes import LayerChange, ParameterChange, layer_values, selection_change
from compressm.adapters.composed import effective_weight
from compressm.layers.linear_attention import DeltaNet, GatedLinearAttention, LinearAttention, MatrixStateLayer
from compressm.theory.recurrence import SelectiveReduction, Signals, first_states


class LinearAttentionAdapter(SelectiveAdapter):
    """Folds a reduction, one per head, into the rows of ``k_proj`` and ``q_proj``. All states decay alike, so any
    linear map is possible.

    Attributes:
        keys, queries: names of the two projections.
    """

    layer_type = LinearAttention
    entrance = "gate_proj"  # keys, queries and values read the input behind the convolution
    keys_convolved = False
    folds_into = True
    folds_out = True
    keys, queries = "k_proj", "q_proj"

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        assert isinstance(layer, MatrixStateLayer)
        v, log_decay, *beta, k, q = layer.recurrence(hidden)
        step = -log_decay if log_decay.ndim == 4 else (-log_decay)[..., None].expand_as(v).flatten(-2)
        erase = beta[0] if beta else None
        stored = v if erase is None else erase[..., None] * v
        # The norm divides all channels of a head and token by one number. The gain leaves that number out.
        gain = F.silu(layer.gate_proj(hidden)) * layer.norm_weight * effective_weight(layer.out_proj).norm(dim=0)
        return Signals(stored.flatten(-2), step, v.new_ones(1, 1), k, q, gain, erase)

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        if self.folds_into and not self.rotates:
            reduction = self._balance_of_k_and_q_kept(values, reduction)
        rows = reduction.into.shape[0] * reduction.states
        maps = {self.keys: (reduction.into, reduction.out), self.queries: (reduction.out, reduction.into)}
        changes = (
            mapped_rows(name, values[name], into, back)
            for projection, (into, back) in maps.items()
            for name in (f"{projection}.weight", f"{projection}.bias")
            if name in values
        )
        return LayerChange(tuple(changes), {f"{projection}.out_features": rows for projection in maps})

    def _balance_of_k_and_q_kept(
        self, values: Mapping[str, Tensor], reduction: SelectiveReduction
    ) -> SelectiveReduction:
        """The maps, rescaled in every head so that the weights of keys and queries keep the ratio of their norms.

        The scale of a head's states is arbitrary, and balanced maps take it from the layer's output. Adam's steps are
        relative to the weights, so the old ratio is better.
        """
        heads = reduction.into.shape[0]
        k, q = (
            values[f"{name}.weight"].detach().to("cpu", torch.float64).unflatten(0, (heads, -1))
            for name in (self.keys, self.queries)
        )

        def ratio(k: Tensor, q: Tensor) -> Tensor:
            return q.norm(dim=(1, 2)) / k.norm(dim=(1, 2))

        scale = (ratio(reduction.into @ k, reduction.out @ q) / ratio(k, q)).sqrt()
        scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)[:, None, None]
        return replace(reduction, into=reduction.into * scale, out=reduction.out / scale)

    def state_dim(self, layer: nn.Module) -> int:
        assert isinstance(layer, MatrixStateLayer)
        return layer.d_state

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        assert isinstance(layer, MatrixStateLayer)
        return self.plan(layer_values(layer), first_states(layer.d_state, states, layer.n_heads))


class GatedLinearAttentionAdapter(LinearAttentionAdapter):
    """Keeps some key dimensions, each with its decay; queries compensate for the removed ones."""

    layer_type = GatedLinearAttention
    folds_into = False

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        assert reduction.kept is not None
        heads, n = reduction.into.shape[0], reduction.into.shape[2]
        kept = (reduction.kept + n * torch.arange(heads)[:, None]).flatten()
        change = super().plan(values, reduction)
        gates = (selection_change(name, values[name], 0, kept) for name in ("decay_proj.1.weight", "decay_proj.1.bias"))
        return LayerChange(
            (*change.parameters, *gates), {**change.attributes, "decay_proj.1.out_features": kept.shape[0]}
        )


class DeltaNetAdapter(LinearAttentionAdapter):
    """Rotates the keys of a head, and keeps the directions that matter most for the two reads of the state: by the
    output along queries, and by the erasure along keys. Queries compensate for the removed directions.

    The cut is exact if the keys lie in the kept subspace, as they do at full rank. Otherwise the layer scales the
    remaining part of a key to norm 1 again, and then erases and writes along another direction than before.
    """

    layer_type = DeltaNet
    folds_into = False
    rotates = True


def mapped_rows(name: str, weight: Tensor, into: Tensor, back: Tensor) -> ParameterChange:
    """The change of a projection whose rows are stacked head by head.

    Args:
        name: the parameter's name.
        weight: shape ``(heads * n, channels)``, or a bias of shape ``(heads * n,)``.
        into: new rows of a head are ``into`` times its old ones, shape ``(heads, r, n)``.
        back: on the kept subspace the old rows are ``back^T`` times the new ones, shape ``(heads, r, n)``. Gradients
            with respect to the new rows are therefore ``back`` times those with respect to the old ones.
    """
    rows = weight.detach().to("cpu", torch.float64).reshape(into.shape[0], into.shape[2], -1)
    new = (into @ rows).reshape(-1, *weight.shape[1:])
    pullback = torch.block_diag(*back)
    return ParameterChange((name,), (new.to(weight),), 0, pullback, pullback.square(), torch.block_diag(*into))
