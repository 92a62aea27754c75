"""S6 layers of Hugging Face transformers: Mamba, and FalconMamba and Jamba, which normalise B and C.

In the latter two a norm stands between ``x_proj`` and the recurrence: ``B = g b / rms(b)``, likewise C. A map M of B is
folded in before the norm, ``b' = diag(1/g') M diag(g) b`` with g' the weights of the kept states. That is exact but for
one factor per token, ``rms(b) / rms(b')``. The mean square of its inverse over the data is known from ``E[B B^T]``, and
its root is folded in where the layer has a place for a constant: in g' for Jamba; in ``out_proj`` and, inversely, D for
FalconMamba, whose norms have no weights. At full rank all of that is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.base import LayerChange, ParameterChange, layer_values
from compressm.adapters.hf_base import HuggingFaceAdapter
from compressm.adapters.mamba import projection_change, selection_change
from compressm.adapters.rebind import rebound_forward
from compressm.selective import SelectiveReduction, Signals, first_states


class HFMambaAdapter(HuggingFaceAdapter):
    """``MambaMixer``: folds a reduction into the rows of ``x_proj`` and the columns of ``A_log``."""

    folds_out = True

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        recorded: dict[str, Any] = {}

        def record(
            hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, delta_bias: Tensor, **_: Any
        ) -> Tensor:
            delta = F.softplus(dt + delta_bias[:, None])
            u, delta, B, C, gate = (value.transpose(1, 2) for value in (hidden_states, delta, B, C, F.silu(z)))
            recorded.update(u=u, delta=delta, rates=-A, B=B[:, :, None], C=C[:, :, None], gate=gate)
            return torch.zeros_like(hidden_states)

        rebound_forward(layer, {"mamba_selective_scan": record, "mamba_inner_fn": _not_fused})(hidden)
        delta, gain = recorded["delta"], recorded["gate"] * layer.get_parameter("out_proj.weight").norm(dim=0)
        return Signals(recorded["u"] * delta, delta, recorded["rates"], recorded["B"], recorded["C"], gain)

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        assert reduction.kept is not None
        x_proj, A_log = values["x_proj.weight"], values["A_log"]
        changes = (
            projection_change("x_proj.weight", x_proj, reduction),
            selection_change("A_log", A_log, 1, reduction.kept[0]),
        )
        rows = x_proj.shape[0] + 2 * (reduction.states - A_log.shape[1])
        return LayerChange(changes, {"x_proj.out_features": rows, "ssm_state_size": reduction.states})

    def state_dim(self, layer: nn.Module) -> int:
        return layer.get_parameter("A_log").shape[1]

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        return self.plan(layer_values(layer), first_states(self.state_dim(layer), states))


class FalconMambaAdapter(HFMambaAdapter):
    """``FalconMambaMixer``, whose norms of B and C have no weights; see the module's text."""

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        change = super().plan(values, reduction)
        ones = torch.ones(reduction.into.shape[2], dtype=torch.float64)
        factor = _norm_factor(reduction, "B", ones) * _norm_factor(reduction, "C", ones)
        out_proj, D = values["out_proj.weight"], values["D"]
        changes = (_scaled("out_proj.weight", out_proj, factor), _scaled("D", D, 1 / factor))
        # Buffers that the CUDA kernels take for weights.
        unused = {f"{name}.weight": out_proj.new_ones(reduction.states) for name in ("b_layernorm", "c_layernorm")}
        return LayerChange((*change.parameters, *changes), {**change.attributes, **unused})


class JambaAdapter(HFMambaAdapter):
    """``JambaMambaMixer``, whose norms of B and C have weights; see the module's text."""

    config_field = "mamba_d_state"

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        assert reduction.kept is not None
        kept, changes, maps = reduction.kept[0], list[ParameterChange](), dict[str, Tensor]()
        for norm, vector, side in (("b_layernorm.weight", "B", "into"), ("c_layernorm.weight", "C", "out")):
            weight = values[norm].detach().to("cpu", torch.float64)
            # A weight of zero shuts its state off: nothing can be folded in before it, nor has to be.
            g = torch.where(weight.abs() > 1e-6 * weight.abs().max(), weight, 1.0)
            maps[side] = getattr(reduction, side) / g[kept, None] * g
            kept_weight = selection_change(norm, values[norm], 0, kept)
            changes.append(_times(kept_weight, _norm_factor(reduction, vector, g)))
        change = super().plan(values, replace(reduction, **maps))
        return LayerChange((*change.parameters, *changes), change.attributes)


def _norm_factor(reduction: SelectiveReduction, vector: str, g: Tensor) -> float:
    """``rms(b') / rms(b)``, root of its mean square over the data; 1 where there are none.

    Args:
        reduction: of one group.
        vector: ``"B"`` or ``"C"``.
        g: the norm's weights, float64, shape ``(n,)``.
    """
    if reduction.moments is None:
        return 1.0
    moments = reduction.moments
    second = {"B": moments.V, "C": moments.W}[vector][0] / moments.tokens
    maps = {"B": reduction.into, "C": reduction.out}[vector][0]
    assert reduction.kept is not None
    before = float((second.diagonal() / g**2).mean())  # 1, but for the norm's eps
    mapped = maps / g[reduction.kept[0], None]
    after = float(torch.einsum("rn,nm,rm->r", mapped, second, mapped).mean())
    return (after / before) ** 0.5 if after > 0 and before > 0 else 1.0


def _scaled(name: str, value: Tensor, factor: float) -> ParameterChange:
    """A parameter times a number."""
    return _times(selection_change(name, value, 0, torch.arange(value.shape[0])), factor)


def _times(change: ParameterChange, factor: float) -> ParameterChange:
    return replace(
        change,
        values=tuple((value.double() * factor).to(value.dtype) for value in change.values),
        pullback=change.pullback / factor,
        pullback_squared=change.pullback_squared / factor**2,
    )


def _not_fused(*_: Any, **__: Any) -> None:
    """What transformers takes for: no kernel that fuses the whole layer is there."""
