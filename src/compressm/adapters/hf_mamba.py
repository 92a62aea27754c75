"""S6 layers of Hugging Face transformers: Mamba, and FalconMamba and Jamba, which normalise B and C.

In the latter two a norm stands between ``x_proj`` and the recurrence: ``B = g b / rms(b)``, likewise C. A map M of B
is folded in before the norm, ``b' = diag(1/g') M diag(g) b / f`` with g' the weights of the kept states. The factor f,
known from ``E[B B^T]``, gives b' the mean square of b over the data. It is compensated in g' for Jamba. FalconMamba's
norms have no weights; there it is compensated in ``out_proj`` and, inversely, in D. The remaining error is the ratio of
``rms(b)`` to ``rms(b')``, one number per token. It is 1 at full rank, and if the removed states get no input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.changes import LayerChange, ParameterChange, layer_values, selection_change
from compressm.adapters.composed import effective_weight
from compressm.adapters.hf_base import Carried, HuggingFaceAdapter
from compressm.adapters.mamba import projection_change
from compressm.adapters.rebind import not_fused, rebound_forward
from compressm.theory.recurrence import SelectiveReduction, Signals, first_states


class HFMambaAdapter(HuggingFaceAdapter):
    """``MambaMixer``: folds a reduction into the rows of ``x_proj`` and the columns of ``A_log``."""

    folds_out = True

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        return self.signals_after(layer, hidden, None)

    def signals_after(self, layer: nn.Module, hidden: Tensor, carried: Carried | None) -> Signals:
        recorded: dict[str, Any] = {}

        def record(
            hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, delta_bias: Tensor, **_: Any
        ) -> Any:
            delta = F.softplus(dt + delta_bias[:, None])
            u, delta, B, C, gate = (value.transpose(1, 2) for value in (hidden_states, delta, B, C, F.silu(z)))
            recorded.update(u=u, delta=delta, rates=-A, B=B[:, :, None], C=C[:, :, None], gate=gate)
            out = torch.zeros_like(hidden_states)
            return out if carried is None else (out, None)

        def record_step(
            state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: Any,
            z: Tensor, dt_bias: Tensor, **__: Any,
        ) -> Tensor:  # fmt: skip
            recorded["state"] = state
            u, dt, B, C, z = (value[..., None] for value in (u, dt, B, C, z))
            return record(u, dt, A, B, C, z=z, delta_bias=dt_bias)[0][..., 0]

        functions: dict[str, Callable[..., Any]] = {
            "mamba_selective_scan": record,
            "mamba_selective_state_update": record_step,
            "mamba_inner_fn": not_fused,
        }
        rebound_forward(layer, functions)(hidden, carried and carried.first(hidden.shape[0]))
        delta, gain = (
            recorded["delta"],
            recorded["gate"] * effective_weight(layer.get_submodule("out_proj")).norm(dim=0),
        )
        return Signals(
            recorded["u"] * delta, delta, recorded["rates"], recorded["B"], recorded["C"], gain,
            state=recorded.get("state"),
        )  # fmt: skip

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

    normed = True

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        ones = torch.ones(reduction.into.shape[2], dtype=torch.float64)
        into, out = _before_norm(reduction, "B", ones), _before_norm(reduction, "C", ones)
        change = super().plan(values, reduction)
        _, A_log = change.parameters
        out_proj, D = (
            selection_change(name, values[name], 0, torch.arange(values[name].shape[0]))
            for name in ("out_proj.weight", "D")
        )
        factor = into.factor * out.factor
        parameters = (_x_proj(values, into, out), A_log, times(out_proj, factor), times(D, 1 / factor))
        # The CUDA kernels use these buffers as the norms' weights.
        unused = {f"{n}.weight": values["D"].new_ones(reduction.states) for n in ("b_layernorm", "c_layernorm")}
        return LayerChange(parameters, {**change.attributes, **unused})


class JambaAdapter(HFMambaAdapter):
    """``JambaMambaMixer``, whose norms of B and C have weights; see the module's text."""

    config_field = "mamba_d_state"
    normed = True

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        assert reduction.kept is not None
        change = super().plan(values, reduction)
        _, A_log = change.parameters
        weights = values["b_layernorm.weight"], values["c_layernorm.weight"]
        into, out = (_before_norm(reduction, v, w) for v, w in zip("BC", weights, strict=True))
        b, c = (
            times(selection_change(f"{name}_layernorm.weight", weight, 0, reduction.kept[0]), folded.factor)
            for name, weight, folded in zip("bc", weights, (into, out), strict=True)
        )
        return LayerChange((_x_proj(values, into, out), A_log, b, c), change.attributes)


@dataclass(frozen=True)
class _BeforeNorm:
    """A map folded in before a norm, ``b' = map b``, with the map of its gradients and the factor f."""

    map: Tensor
    pullback: Tensor
    factor: float


def _before_norm(reduction: SelectiveReduction, vector: str, weight: Tensor) -> _BeforeNorm:
    """Fold a map of B or C in before its norm; see the module's text.

    Args:
        reduction: of one group.
        vector: ``"B"`` or ``"C"``.
        weight: the norm's weights g, shape ``(n,)``.
    """
    assert reduction.kept is not None
    into, out = reduction.into[0], reduction.out[0]
    after, pullback = (into, out) if vector == "B" else (out, into)
    g = weight.detach().to("cpu", torch.float64)
    g = torch.where(g.abs() > 1e-6 * g.abs().max(), g, 1.0)  # a weight of zero disables its state; avoid dividing by it
    mapped = after / g[reduction.kept[0], None]
    factor = 1.0
    if reduction.moments is not None:
        second = (reduction.moments.V if vector == "B" else reduction.moments.W)[0]
        power = torch.einsum("rn,nm,rm->r", mapped, second, mapped).mean() / (second.diagonal() / g**2).mean()
        factor = float(power) ** 0.5 if float(power) > 0 else 1.0
    # The transpose of b_old = factor diag(1/g) out^T diag(g_kept) b_new.
    back = pullback * g[reduction.kept[0], None] / g if vector == "B" else pullback
    return _BeforeNorm(mapped * g / factor, back * factor, factor)


def _x_proj(values: Mapping[str, Tensor], into: _BeforeNorm, out: _BeforeNorm) -> ParameterChange:
    weight = values["x_proj.weight"]
    kept = torch.eye(weight.shape[0] - 2 * into.map.shape[1], dtype=torch.float64)
    folded = torch.block_diag(kept, into.map, out.map)
    new = folded @ weight.detach().to("cpu", torch.float64)
    pullback = torch.block_diag(kept, into.pullback, out.pullback)
    return ParameterChange(("x_proj.weight",), (new.to(weight),), 0, pullback, pullback.square(), folded)


def times(change: ParameterChange, factor: float) -> ParameterChange:
    """The change followed by a multiplication of the new values by a factor."""
    return replace(
        change,
        values=tuple((value.double() * factor).to(value.dtype) for value in change.values),
        pullback=change.pullback / factor,
        pullback_squared=change.pullback_squared / factor**2,
        map=None if change.map is None else change.map * factor,
        kept=None,
    )
