"""The mLSTM layer of xLSTM in transformers: a matrix memory with one decay and one input gate per head.

    S_t = f_t S_{t-1} + i_t v_t k_t^T,    n_t = f_t n_{t-1} + i_t k_t,    y_t = S_t q_t / max(|n_t . q_t|, 1)

(Beck et al. 2024). Keys and queries are linear in the input, the decay is a scalar, and the denominator and the norm of
a head's output divide it by one number. So keys and queries are cut by balanced truncation, as in linear attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd, nextafter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.changes import LayerChange, layer_values
from compressm.adapters.composed import effective_weight
from compressm.adapters.hf_base import HuggingFaceAdapter
from compressm.adapters.hf_mamba import times
from compressm.adapters.linear_attention import LinearAttentionAdapter
from compressm.errors import UnsupportedModelError
from compressm.scans import ssd_scan
from compressm.theory.recurrence import SelectiveReduction, Signals, first_states

# xLSTMCache rounds the width of all keys up to a multiple of this number.
_MULTIPLE = 64


class XLSTMAdapter(HuggingFaceAdapter, LinearAttentionAdapter):
    """``xLSTMLayer`` with ``weight_mode="single"``."""

    config_field = "qk_dim_factor"
    entrance = None
    keys, queries = "k", "q"

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        return self.signals_after(layer, hidden, None)

    def signals_after(self, layer: nn.Module, hidden: Tensor, carried: tuple[Tensor, ...] | None) -> Signals:
        module: Any = layer
        heads = module.config.num_heads
        q, k, v = (getattr(module, name)(hidden).unflatten(-1, (heads, -1)).float() for name in "qkv")
        stored, forget = (_capped(gate(hidden).float(), module) for gate in (module.igate_preact, module.fgate_preact))
        values, log_decay = v * stored.exp()[..., None], F.logsigmoid(forget)
        state = None
        if carried is not None:
            memory, _, scale = (part[: hidden.shape[0]].float() for part in carried)
            state = (memory * scale[..., None].exp()).mT
        y = ssd_scan(values, log_decay, k, q, state)
        # The norm divides all outputs of a head and token by one number, and so undoes the denominator.
        size = torch.rsqrt(y.var(-1, keepdim=True, unbiased=False).clamp_min(1e-30)).expand_as(y).flatten(-2)
        gain = module.ogate_act_fn(module.ogate_preact(hidden)) * effective_weight(module.out_proj).norm(dim=0)
        weight: Tensor | None = module.multihead_norm.weight
        gain = gain * size if weight is None else gain * size * weight
        step = (-log_decay)[..., None].expand_as(v).flatten(-2)
        return Signals(
            values.flatten(-2), step, v.new_ones(1, 1), k, q, gain, state=None if state is None else state.flatten(1, 2)
        )

    def carried(self, layer: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, ...] | None:
        """Memory, normaliser and logarithm of the scale. A new cache holds zeros."""
        state = arguments.get("state")
        if state is None or not any(bool(part.any()) for part in state):
            return None
        return tuple(part.detach() for part in state)

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        if "q.weight" not in values:
            raise UnsupportedModelError(
                "xLSTM with weight_mode='fused' keeps keys, queries, values and gates in one matrix, which is not "
                "supported: load the model with weight_mode='single', which splits them"
            )
        change = super().plan(values, reduction)
        # The kernels scale queries by n^-1/2; the weights of the queries make up for the change of n.
        factor = (reduction.states / reduction.into.shape[2]) ** 0.5
        parameters = (times(part, factor) if part.names[0].startswith("q.") else part for part in change.parameters)
        return LayerChange(tuple(parameters), {**change.attributes, "qk_dim": change.attributes["q.out_features"]})

    def planned(self, layer: nn.Module) -> Callable[[Mapping[str, Tensor], SelectiveReduction], LayerChange]:
        module: Any = layer
        plan, heads = super().planned(layer), int(module.config.num_heads)

        def checked(values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
            if heads * reduction.states % _MULTIPLE:
                raise UnsupportedModelError(
                    f"states={reduction.states}: xLSTMCache rounds the {heads} heads' key dimensions up to a multiple "
                    f"of {_MULTIPLE}, so that a model of this size could not generate: choose a multiple of "
                    f"{_MULTIPLE // gcd(_MULTIPLE, heads)} (multiple_of=)"
                )
            return plan(values, reduction)

        return checked

    def state_dim(self, layer: nn.Module) -> int:
        module: Any = layer
        return int(module.qk_dim) // int(module.config.num_heads)

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        module: Any = layer
        return self.plan(layer_values(layer), first_states(self.state_dim(layer), states, int(module.config.num_heads)))

    def tell_config(self, config: Any, states: int) -> None:
        """The config holds the ratio of all keys' dimensions to the width; the layer multiplies and rounds down."""
        width = config.num_heads * states
        factor = width / config.hidden_size
        config.qk_dim_factor = factor if int(config.hidden_size * factor) == width else nextafter(factor, 2 * factor)


def _capped(gate: Tensor, layer: Any) -> Tensor:
    cap = layer.config.gate_soft_cap
    return gate if cap is None else cap * torch.tanh(gate / cap)


__all__ = ["XLSTMAdapter"]
