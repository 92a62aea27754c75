"""Layers of flash-linear-attention: gated linear attention, DeltaNet, Gated DeltaNet.

The signals of a recurrence are recorded when the layer's own forward calls its kernel. So the convolutions, activations
and feature maps before the kernel are the layer's own. If none of them stands between a projection and the kernel, maps
of keys and queries fold into the projections, as in our layers. Otherwise key dimensions are selected.

The kernels scale queries by ``n^-1/2``. This has no effect on these layers, since a norm of the head's output follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.changes import LayerChange, layer_values, selection_change
from compressm.adapters.composed import effective_weight
from compressm.adapters.hf_base import HuggingFaceAdapter
from compressm.adapters.linear_attention import mapped_rows
from compressm.adapters.rebind import rebound_forward
from compressm.errors import UnsupportedModelError
from compressm.theory.recurrence import SelectiveReduction, Signals, first_states


class _KernelReachedError(Exception):
    """Carries the kernel's arguments out of a forward."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


class FLAAdapter(HuggingFaceAdapter):
    """One of the layers.

    Args:
        layer_type: the layer's class.
        kernels: global names under which its forward calls its kernels.
    """

    config_field = "expand_k"

    def __init__(self, layer_type: str, kernels: tuple[str, ...]) -> None:
        super().__init__(layer_type)
        self.kernels = kernels

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        module: Any = layer
        seen = self.kernel_arguments(layer, hidden)
        q, k, v = seen["q"], seen["k"], seen["v"]
        if q.shape[2] != v.shape[2]:
            raise UnsupportedModelError(
                f"{type(layer).__name__} with {v.shape[2]} value heads for {q.shape[2]} key heads: not supported yet"
            )
        if seen.get("use_qk_l2norm_in_kernel"):
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        decay, beta = self.forgetting(module, seen, v)
        step = decay if decay.ndim == 4 else decay[..., None].expand_as(v).flatten(-2)
        stored = v if beta is None else beta[..., None] * v
        gain = effective_weight(module.o_proj).norm(dim=0).expand(*hidden.shape[:2], -1)
        if hasattr(module, "g_proj"):
            gain = gain * F.silu(module.g_proj(hidden))
        norm = next((n.weight for n in (getattr(module, k, None) for k in _NORMS) if n is not None), None)
        if norm is not None:
            gain = gain * norm.repeat(v.shape[2])
        return Signals(stored.flatten(-2), step, v.new_ones(1, 1), k, q, gain, beta)

    def kernel_arguments(self, layer: nn.Module, hidden: Tensor) -> dict[str, Any]:
        """The arguments with which the layer's forward calls its kernel."""

        def reached(*_: Any, **arguments: Any) -> None:
            raise _KernelReachedError(arguments)

        functions: dict[str, Callable[..., Any]] = dict.fromkeys(self.kernels, reached)
        try:
            rebound_forward(layer, functions)(hidden)
        except _KernelReachedError as call:
            return call.arguments
        raise UnsupportedModelError(
            f"{type(layer).__name__} calls none of {', '.join(self.kernels)}: this version of flash-linear-attention "
            "is not known"
        )

    def forgetting(self, layer: Any, seen: Mapping[str, Any], v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decay ``-log alpha``, shape ``(batch, length, heads)`` or with n more, and the delta rule's beta."""
        raise NotImplementedError

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        heads, r, n = reduction.into.shape
        if reduction.kept is None:
            parts = [
                mapped_rows("q_proj.weight", values["q_proj.weight"], reduction.out, reduction.into),
                mapped_rows("k_proj.weight", values["k_proj.weight"], reduction.into, reduction.out),
            ]
            kept = torch.arange(0)
        else:
            kept = (reduction.kept + n * torch.arange(heads)[:, None]).flatten()
            parts = [selection_change("k_proj.weight", values["k_proj.weight"], 0, kept)]
            parts.append(mapped_rows("q_proj.weight", values["q_proj.weight"], reduction.out, reduction.into))
        attributes: dict[str, Any] = {"key_dim": heads * r, "head_k_dim": r}
        attributes |= {f"{name}.out_features": heads * r for name in ("q_proj", "k_proj")}
        for name in ("gk_proj.1.weight", "gk_proj.1.bias", *_CONVOLUTIONS):
            if name in values:
                parts.append(selection_change(name, values[name], 0, kept))
        if "gk_proj.1.weight" in values:
            attributes |= {"gk_proj.1.out_features": heads * r, "key_dim_per_group": heads * r}
        for name in ("q_conv1d", "k_conv1d"):
            if f"{name}.weight" in values:
                attributes |= {f"{name}.{k}": heads * r for k in ("in_channels", "out_channels", "groups")}
                attributes[f"{name}.hidden_size"] = heads * r
        return LayerChange(tuple(parts), attributes)

    def state_dim(self, layer: nn.Module) -> int:
        module: Any = layer
        return module.head_k_dim

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        module: Any = layer
        values = layer_values(layer)
        heads = values["k_proj.weight"].shape[0] // module.head_k_dim
        return self.plan(values, first_states(module.head_k_dim, states, heads))

    def has_field(self, config: Any) -> bool:
        return hasattr(config, "hidden_size")

    def fields(self, config: Any) -> Any:
        return {name: getattr(config, name, None) for name in ("expand_k", "expand_v", "head_dim")}

    def tell_config(self, config: Any, states: int) -> None:
        """Write a head's number of key dimensions into a model's config."""
        config.expand_k = states * config.num_heads / config.hidden_size


_NORMS = ("g_norm_swish_gate", "g_norm", "o_norm")
_CONVOLUTIONS = ("q_conv1d.weight", "q_conv1d.bias", "k_conv1d.weight", "k_conv1d.bias")


class FLAGatedLinearAttentionAdapter(FLAAdapter):
    """``fla.layers.GatedLinearAttention``. Every key dimension has a decay of its own, so key dimensions are selected.
    Queries compensate for the removed ones if they are linear in the input."""

    def maps(self, layer: nn.Module) -> tuple[bool, bool, bool]:
        module: Any = layer
        return False, not module.use_short_conv and module.feature_map_fn is None, False

    def forgetting(self, layer: Any, seen: Mapping[str, Any], v: Tensor) -> tuple[Tensor, Tensor | None]:
        return -(seen["gk"] if seen.get("gk") is not None else seen["g"]), None

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        module: Any = layer
        if module.num_kv_groups != 1:
            raise UnsupportedModelError("GatedLinearAttention with grouped keys (num_kv_heads) is not supported yet")
        return super().signals(layer, hidden)


class FLADeltaNetAdapter(FLAAdapter):
    """``fla.layers.DeltaNet``: key dimensions are selected, since an activation stands before the kernel."""

    def forgetting(self, layer: Any, seen: Mapping[str, Any], v: Tensor) -> tuple[Tensor, Tensor | None]:
        return v.new_zeros(v.shape[:3]), seen["beta"]


class FLAGatedDeltaNetAdapter(FLAAdapter):
    """``fla.layers.GatedDeltaNet``, whose kernel may compute decay and beta itself."""

    def forgetting(self, layer: Any, seen: Mapping[str, Any], v: Tensor) -> tuple[Tensor, Tensor | None]:
        beta = seen["beta"].sigmoid() if seen.get("use_beta_sigmoid_in_kernel") else seen["beta"]
        if seen.get("allow_neg_eigval"):
            beta = 2 * beta
        if seen.get("use_gate_in_kernel"):
            return layer.A_log.exp() * F.softplus(seen["g"] + layer.dt_bias), beta
        return -seen["g"], beta

    def tell_config(self, config: Any, states: int) -> None:
        # Keys have head_dim entries, values expand_v * head_dim. The cut changes head_dim; values keep their size.
        config.expand_v = config.expand_v * config.head_dim / states
        config.head_dim = states


__all__ = ["FLADeltaNetAdapter", "FLAGatedDeltaNetAdapter", "FLAGatedLinearAttentionAdapter"]
