"""Mamba layers: B and C are linear in the recurrence's input, so any map of them folds into ``x_proj``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.base import SelectiveAdapter
from compressm.adapters.changes import LayerChange, ParameterChange, layer_values, selection_change
from compressm.adapters.composed import effective_weight
from compressm.layers.activations import causal_conv
from compressm.layers.mamba import Mamba
from compressm.theory.recurrence import SelectiveReduction, Signals, first_states


class MambaAdapter(SelectiveAdapter):
    """Folds a reduction of an S6 layer into the rows of ``x_proj`` and the columns of ``A_log``."""

    layer_type = Mamba
    entrance = "in_proj"
    folds_out = True

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        assert isinstance(layer, Mamba)
        u, z = layer.in_proj(hidden).chunk(2, -1)
        u = causal_conv(layer.conv1d, u)
        delta, B, C = layer.select(u)
        gain = F.silu(z) * effective_weight(layer.out_proj).norm(dim=0)
        return Signals(delta * u, delta, layer.A_log.exp(), B[:, :, None], C[:, :, None], gain)

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        assert reduction.kept is not None
        rows = values["x_proj.weight"].shape[0] + 2 * (reduction.states - values["A_log"].shape[1])
        return LayerChange(
            (
                projection_change("x_proj.weight", values["x_proj.weight"], reduction),
                selection_change("A_log", values["A_log"], 1, reduction.kept[0]),
            ),
            {"x_proj.out_features": rows},
        )

    def state_dim(self, layer: nn.Module) -> int:
        assert isinstance(layer, Mamba)
        return layer.d_state

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        return self.plan(layer_values(layer), first_states(self.state_dim(layer), states))


def projection_change(name: str, weight: Tensor, reduction: SelectiveReduction) -> ParameterChange:
    """The change of a projection whose last rows are those of B and then those of C, as in ``x_proj``.

    Args:
        name: the parameter's name.
        weight: shape ``(rest + 2n, channels)``, or a bias of shape ``(rest + 2n,)``.
        reduction: of one group: ``B' = into B`` and ``C' = out C``. On the kept subspace the old rows are ``B = out^T
            B'`` and ``C = into^T C'``, so the pullbacks of gradients are ``out`` and ``into``.
    """
    into, out = reduction.into[0], reduction.out[0]
    n = into.shape[1]
    rest = weight.shape[0] - 2 * n
    rows = weight.detach().to("cpu", torch.float64)
    new = torch.cat([rows[:rest], into @ rows[rest : rest + n], out @ rows[rest + n :]])
    kept = torch.eye(rest, dtype=torch.float64)
    pullback = torch.block_diag(kept, out, into)
    folded = torch.block_diag(kept, into, out)
    return ParameterChange((name,), (new.to(weight),), 0, pullback, pullback.square(), folded)
