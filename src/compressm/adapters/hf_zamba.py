"""Zamba's layer: several heads of S6, each with a convolved input, an ``x_proj`` and an ``A_log`` of its own.

B and C are linear in the input of ``x_proj``, head by head. States are selected per head, and the kept states of a head
compensate for its removed ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.changes import LayerChange, ParameterChange, layer_values
from compressm.adapters.composed import effective_weight
from compressm.adapters.hf_base import Carried, HuggingFaceAdapter
from compressm.adapters.rebind import rebound_forward
from compressm.theory.recurrence import SelectiveReduction, Signals, first_states


class ZambaAdapter(HuggingFaceAdapter):
    """``ZambaMambaMixer``: folds a reduction of every head into ``x_proj_weight`` and ``A_log``."""

    config_field = "mamba_d_state"
    folds_out = True

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        return self.signals_after(layer, hidden, None)

    def signals_after(self, layer: nn.Module, hidden: Tensor, carried: Carried | None) -> Signals:
        heads: list[dict[str, Tensor]] = []

        def record(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
            z, bias = options["z"], options["delta_bias"]
            delta = F.softplus(dt + bias[:, None])
            parts = {"u": u, "delta": delta, "B": B, "C": C, "gate": F.silu(z)}
            heads.append({**{name: value.transpose(1, 2) for name, value in parts.items()}, "rates": -A})
            out = torch.zeros_like(u)
            return (out, torch.zeros_like(u[..., :1] * A)) if options["return_last_state"] else out

        def record_step(
            state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: Any,
            z: Tensor, dt_bias: Tensor, **__: Any,
        ) -> Tensor:  # fmt: skip
            u, dt, B, C, z = (value[..., None] for value in (u, dt, B, C, z))
            out: Tensor = record(u, dt, A, B, C, z=z, delta_bias=dt_bias, return_last_state=False)
            heads[-1]["state"] = state
            return out[..., 0]

        functions: dict[str, Any] = {
            "mamba_selective_scan": record,
            "mamba_selective_state_update": record_step,
        }
        rebound_forward(layer, functions)(hidden, carried and carried.first(hidden.shape[0]))
        whole = {name: torch.cat([head[name] for head in heads], -1) for name in ("u", "delta", "gate")}
        B, C = (torch.stack([head[name] for head in heads], 2) for name in "BC")
        state = None
        if carried is not None and carried.recurrent is not None:
            state = carried.recurrent[: hidden.shape[0]].flatten(1, 2)
        gain = whole["gate"] * effective_weight(layer.get_submodule("out_proj")).norm(dim=0)
        rates = torch.cat([head["rates"] for head in heads])
        return Signals(whole["u"] * whole["delta"], whole["delta"], rates, B, C, gain, state=state)

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        assert reduction.kept is not None
        weight, A_log, into, out = values["x_proj_weight"], values["A_log"], reduction.into, reduction.out
        heads, r, n = into.shape
        rank = torch.eye(weight.shape[1] - 2 * n, dtype=torch.float64)
        folded, pullback = (
            torch.stack([torch.block_diag(rank, *both) for both in zip(first, second, strict=True)])
            for first, second in ((into, out), (out, into))
        )
        projected = folded @ weight.detach().to("cpu", torch.float64)
        chosen = torch.eye(n, dtype=torch.float64)[reduction.kept][:, None].expand(heads, A_log.shape[1], r, n)
        index = reduction.kept.to(A_log.device)[:, None].expand(heads, A_log.shape[1], r)
        changes = (
            ParameterChange(("x_proj_weight",), (projected.to(weight),), 1, pullback, pullback.square()),
            ParameterChange(("A_log",), (A_log.detach().gather(2, index),), 2, chosen, chosen),
        )
        return LayerChange(changes, {"ssm_state_size": r})

    def state_dim(self, layer: nn.Module) -> int:
        return layer.get_parameter("A_log").shape[-1]

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        values = layer_values(layer)
        return self.plan(values, first_states(self.state_dim(layer), states, values["A_log"].shape[0]))


__all__ = ["ZambaAdapter"]
