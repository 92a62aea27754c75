"""Mamba-2 layers. A convolution and SiLU stand between the projection and the recurrence, so states are selected."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.base import SelectiveAdapter
from compressm.adapters.changes import LayerChange, layer_values, selection_change
from compressm.adapters.composed import effective_weight
from compressm.layers.mamba2 import Mamba2
from compressm.theory.recurrence import SelectiveReduction, Signals, first_states


class Mamba2Adapter(SelectiveAdapter):
    """Keeps the rows of ``in_proj`` and the channels of ``conv1d`` that belong to the kept states."""

    layer_type = Mamba2
    entrance = "in_proj"

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        assert isinstance(layer, Mamba2)
        x, delta, B, C, z = layer.recurrence(hidden)
        step = (delta * layer.A_log.exp())[..., None].expand_as(x)
        # The gated norm divides all channels of a token by one number. The gain leaves that number out.
        gain = F.silu(z) * layer.norm.weight * effective_weight(layer.out_proj).norm(dim=0)
        return Signals((x * delta[..., None]).flatten(-2), step.flatten(-2), delta.new_ones(1, 1), B, C, gain)

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        assert reduction.kept is not None
        n, groups = reduction.into.shape[2], reduction.into.shape[0]
        d_inner = values["norm.weight"].shape[0]
        channels = kept_channels(d_inner, n, reduction.kept)
        tail = torch.arange(2 * d_inner + 2 * groups * n, values["in_proj.weight"].shape[0])
        rows = torch.cat([torch.arange(d_inner), d_inner + channels, tail])
        changes = [
            selection_change("in_proj.weight", values["in_proj.weight"], 0, rows),
            selection_change("conv1d.weight", values["conv1d.weight"], 0, channels),
            selection_change("conv1d.bias", values["conv1d.bias"], 0, channels),
        ]
        width = channels.shape[0]
        attributes = {f"conv1d.{name}": width for name in ("in_channels", "out_channels", "groups")}
        return LayerChange(tuple(changes), {"in_proj.out_features": rows.shape[0], **attributes})

    def state_dim(self, layer: nn.Module) -> int:
        assert isinstance(layer, Mamba2)
        return layer.d_state

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        assert isinstance(layer, Mamba2)
        return self.plan(layer_values(layer), first_states(layer.d_state, states, layer.n_groups))


def kept_channels(d_inner: int, n: int, kept: Tensor) -> Tensor:
    """Indices of the kept channels in the layout ``[x, B, C]``, with B and C group by group.

    Args:
        d_inner: channels of x.
        n: state dimension before.
        kept: states that stay, shape ``(groups, r)``.
    """
    groups = kept.shape[0]
    states = (kept + n * torch.arange(groups)[:, None]).flatten()
    return torch.cat([torch.arange(d_inner), d_inner + states, d_inner + groups * n + states])
