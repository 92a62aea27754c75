"""Linear attention with one decay per head: keys and queries are linear in the input, so any map of them folds in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.base import LayerChange, ParameterChange, SelectiveAdapter, layer_values
from compressm.layers.linear_attention import LinearAttention
from compressm.selective import SelectiveReduction, Signals, first_states


class LinearAttentionAdapter(SelectiveAdapter):
    """Folds a reduction, one per head, into the rows of ``k_proj`` and ``q_proj``."""

    layer_type = LinearAttention
    folds_into = True
    folds_out = True

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        assert isinstance(layer, LinearAttention)
        v, log_decay, k, q = layer.recurrence(hidden)
        step = (-log_decay)[..., None].expand_as(v)
        # The norm divides all channels of a head and token by one number, which is left out here.
        gain = F.silu(layer.gate_proj(hidden)) * layer.norm_weight * layer.out_proj.weight.norm(dim=0)
        return Signals(v.flatten(-2), step.flatten(-2), v.new_ones(1, 1), k, q, gain)

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        rows = reduction.into.shape[0] * reduction.states
        return LayerChange(
            (
                mapped_rows("k_proj.weight", values["k_proj.weight"], reduction.into, reduction.out),
                mapped_rows("q_proj.weight", values["q_proj.weight"], reduction.out, reduction.into),
            ),
            {"k_proj.out_features": rows, "q_proj.out_features": rows},
        )

    def state_dim(self, layer: nn.Module) -> int:
        assert isinstance(layer, LinearAttention)
        return layer.d_state

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        assert isinstance(layer, LinearAttention)
        return self.plan(layer_values(layer), first_states(layer.d_state, states, layer.n_heads))


def mapped_rows(name: str, weight: Tensor, into: Tensor, back: Tensor) -> ParameterChange:
    """What becomes of a projection whose rows are those of one head after the other.

    Args:
        name: the parameter's name.
        weight: shape ``(heads * n, channels)``.
        into: new rows of a head are ``into`` times its old ones, shape ``(heads, r, n)``.
        back: on the kept subspace the old rows are ``back^T`` times the new ones, shape ``(heads, r, n)``; so gradients
            with respect to the new ones are ``back`` times those with respect to the old.
    """
    rows = weight.detach().to("cpu", torch.float64).unflatten(0, (into.shape[0], -1))
    new = (into @ rows).flatten(0, 1)
    pullback = torch.block_diag(*back)
    return ParameterChange((name,), (new.to(weight),), 0, pullback, pullback.square())
