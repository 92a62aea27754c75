"""Layers of the authors' own package ``mamba_ssm``: `Mamba` and `Mamba2`, found by their classes' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.changes import LayerChange, layer_values
from compressm.adapters.composed import effective_weight
from compressm.adapters.hf_mamba import HFMambaAdapter
from compressm.adapters.hf_mamba2 import HFMamba2Adapter
from compressm.layers.activations import causal_conv
from compressm.theory.recurrence import SelectiveReduction, Signals, first_states


class SSMConfig:
    """Configs that hold the state dimension in a dict of options for the layers, ``ssm_cfg``."""

    def has_field(self, config: Any) -> bool:
        return _ssm_cfg(config) is not None

    def fields(self, config: Any) -> Any:
        return dict(config.ssm_cfg)

    def tell_config(self, config: Any, states: int) -> None:
        config.ssm_cfg["d_state"] = states


class MambaSSMAdapter(SSMConfig, HFMambaAdapter):
    """``mamba_ssm.modules.mamba_simple.Mamba``."""

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        m: Any = layer
        u, z = m.in_proj(hidden).chunk(2, -1)
        u = causal_conv(m.conv1d, u)
        dt, B, C = m.x_proj(u).split([m.dt_rank, m.d_state, m.d_state], -1)
        delta = F.softplus(m.dt_proj(dt))
        gain = F.silu(z) * effective_weight(m.out_proj).norm(dim=0)
        return Signals(delta * u, delta, m.A_log.float().exp(), B[:, :, None], C[:, :, None], gain)

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        return _named(super().plan(values, reduction), reduction.states, "x_proj.")


class MambaSSM2Adapter(SSMConfig, HFMamba2Adapter):
    """``mamba_ssm.modules.mamba2.Mamba2``, also where ``d_ssm`` leaves some channels to a gated MLP."""

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        m: Any = layer
        conv, heads = m.conv1d.weight.shape[0], m.nheads
        projected = m.in_proj(hidden)
        z, xBC, dt = projected[..., -(m.d_ssm + conv + heads) :].split([m.d_ssm, conv, heads], -1)
        width = m.ngroups * m.d_state
        x, B, C = causal_conv(m.conv1d, xBC).split([m.d_ssm, width, width], -1)
        delta = F.softplus(dt + m.dt_bias).clamp(*m.dt_limit).repeat_interleave(m.headdim, -1)
        gain = F.silu(z) * effective_weight(m.out_proj)[:, -m.d_ssm :].norm(dim=0)
        if m.rmsnorm:
            gain = gain * m.norm.weight
        B, C = (v.unflatten(-1, (m.ngroups, m.d_state)) for v in (B, C))
        step = delta * m.A_log.float().exp().repeat_interleave(m.headdim)
        return Signals(x * delta, step, x.new_ones(1, 1), B, C, gain)

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        return _named(super().plan(values, reduction), reduction.states, "in_proj.", "conv1d.")

    def state_dim(self, layer: nn.Module) -> int:
        m: Any = layer
        return int(m.d_state)

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        m: Any = layer
        return self.plan(layer_values(layer), first_states(self.state_dim(layer), states, int(m.ngroups)))


def _named(change: LayerChange, states: int, *submodules: str) -> LayerChange:
    """The change with the attributes for the state dimension added: the layer's own and its submodules'."""
    kept = {name: value for name, value in change.attributes.items() if name.startswith(submodules)}
    return replace(change, attributes={**kept, "d_state": states})


def _ssm_cfg(config: Any) -> dict[str, Any] | None:
    """The arguments that ``MambaLMHeadModel`` passes to its layers and saves."""
    found = getattr(config, "ssm_cfg", None)
    return found if isinstance(found, dict) else None


__all__ = ["MambaSSM2Adapter", "MambaSSMAdapter"]
