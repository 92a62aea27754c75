"""SSD layers of Hugging Face transformers: Mamba-2, and the hybrids that share the code of its layer.

B and C pass through a convolution and SiLU before the recurrence, so states are selected group by group: rows of
``in_proj`` and channels of ``conv1d``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.changes import LayerChange, layer_values, selection_change
from compressm.adapters.composed import effective_weight
from compressm.adapters.hf_base import Carried, HuggingFaceAdapter
from compressm.adapters.mamba2 import kept_channels
from compressm.adapters.rebind import not_fused, rebound_forward
from compressm.theory.recurrence import SelectiveReduction, Signals, first_states


class HFMamba2Adapter(HuggingFaceAdapter):
    """``Mamba2Mixer`` and its relatives in Bamba, FalconH1, GraniteMoeHybrid, NemotronH and Zamba2.

    Args:
        layer_type: the layer's class.
        config_field: the config's name for the state dimension.
    """

    def __init__(self, layer_type: str, config_field: str = "state_size") -> None:
        super().__init__(layer_type)
        self.config_field = config_field

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        return self.signals_after(layer, hidden, None)

    def signals_after(self, layer: nn.Module, hidden: Tensor, carried: Carried | None) -> Signals:
        recorded: dict[str, Tensor] = {}

        def record(
            hidden_states: Tensor,
            dt: Tensor,
            A: Tensor,
            B: Tensor,
            C: Tensor,
            *,
            dt_bias: Tensor,
            dt_limit: tuple[float, float],
            initial_states: Tensor | None = None,
            **_: Any,
        ) -> Any:
            delta = F.softplus(dt + dt_bias).clamp(*dt_limit)[..., None]
            recorded.update(x=hidden_states * delta, step=(-A[:, None] * delta).expand_as(hidden_states), B=B, C=C)
            if initial_states is not None:
                recorded["state"] = initial_states.flatten(1, 2)
            out = torch.zeros_like(hidden_states)
            return out if carried is None else (out, None)

        def record_step(
            state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: Any, dt_bias: Tensor, **__: Any
        ) -> Tensor:
            delta = F.softplus(dt + dt_bias)
            parts = {"x": x * delta, "step": -A[..., 0] * delta, "B": B, "C": C}
            recorded.update({name: value[:, None] for name, value in parts.items()}, state=state.flatten(1, 2))
            return torch.zeros_like(x)

        functions: dict[str, Callable[..., Any]] = {
            "mamba2_chunk_scan": record,
            "mamba2_selective_state_update": record_step,
            "mamba2_split_conv1d_scan_combined": not_fused,
        }
        rebound_forward(layer, functions)(hidden, carried and carried.first(hidden.shape[0]))
        x, step = recorded["x"].flatten(-2), recorded["step"].flatten(-2)
        # The gated norm divides all channels of a token by one number. The gain leaves that number out.
        gain = F.silu(_gate(layer, hidden, x.shape[-1])) * effective_weight(layer.get_submodule("out_proj")).norm(dim=0)
        norm: Any = getattr(layer.norm, "weight", None)
        gain = gain if norm is None else gain * norm
        return Signals(x, step, x.new_ones(1, 1), recorded["B"], recorded["C"], gain, state=recorded.get("state"))

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        assert reduction.kept is not None
        (groups, _, n), heads = reduction.into.shape, values["A_log"].shape[0]
        d_inner = values["conv1d.weight"].shape[0] - 2 * groups * n
        channels = kept_channels(d_inner, n, reduction.kept)
        in_proj = values["in_proj.weight"]
        before = in_proj.shape[0] - heads - 2 * groups * n - d_inner  # rows of the gate
        after = torch.arange(in_proj.shape[0] - heads, in_proj.shape[0])
        rows = torch.cat([torch.arange(before), before + channels, after])
        changes = [
            selection_change(name, values[name], 0, kept)
            for module, kept in (("in_proj", rows), ("conv1d", channels))
            for name in (f"{module}.weight", f"{module}.bias")
            if name in values
        ]
        width = channels.shape[0]
        attributes: dict[str, Any] = {f"conv1d.{name}": width for name in ("in_channels", "out_channels", "groups")}
        attributes |= {"in_proj.out_features": rows.shape[0], "conv_dim": width, "ssm_state_size": reduction.states}
        if "mup_vector" in values:  # FalconH1: a factor per row of in_proj, as a buffer
            attributes["mup_vector"] = values["mup_vector"][..., rows.to(in_proj.device)]
            attributes["groups_time_state_size"] = groups * reduction.states
        return LayerChange(tuple(changes), attributes)

    def state_dim(self, layer: nn.Module) -> int:
        module: Any = layer
        d_inner = module.out_proj.weight.shape[1]
        return (module.conv1d.weight.shape[0] - d_inner) // (2 * _groups(layer))

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        return self.plan(layer_values(layer), first_states(self.state_dim(layer), states, _groups(layer)))


def _groups(layer: nn.Module) -> int:
    groups: Any = layer.n_groups
    return int(groups)


def _gate(layer: nn.Module, hidden: Tensor, width: int) -> Tensor:
    into: Any = getattr(layer, "ssm_in_multiplier", 1.0)
    out: Any = getattr(layer, "mup_vector", hidden.new_ones(1))
    return (layer.get_submodule("in_proj")(hidden * into) * out)[..., :width]
