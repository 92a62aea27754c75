"""Layers of Hugging Face transformers with the gated delta rule: Qwen3-Next, Qwen3.5, Qwen4 and OLMo Hybrid.

A head of keys and queries serves several heads of values, each with its own decay and its own beta:

    S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,    y_t = S_t q_t

Keys and queries pass through a convolution per channel and SiLU, and are then scaled to norm 1. No linear map of them
can be folded in, so key dimensions are selected, head by head. The scale of a query has no effect, since every head's
output is normalised. The layer scales what a cut leaves of a key to norm 1 again: it then writes and erases more
strongly than before, by the same factor for what it stores and more for what it erases. This has no parameter that
could undo it. The predicted error does not know of it; the mask's Fisher matrix does (see `compressm.observing.masks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.changes import LayerChange, ParameterChange, layer_values
from compressm.adapters.composed import effective_weight
from compressm.adapters.hf_base import Carried, HuggingFaceAdapter
from compressm.adapters.mamba import selection_change
from compressm.adapters.rebind import called_function, rebound_forward
from compressm.theory.recurrence import SelectiveReduction, Signals, first_states


class HFDeltaRuleAdapter(HuggingFaceAdapter):
    """``Qwen3NextGatedDeltaNet`` and its relatives in Qwen3_5, Qwen3_5Moe, Qwen4Exp and OlmoHybrid."""

    config_field = "linear_key_head_dim"
    state_axis = -2
    kernels = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        return self.signals_after(layer, hidden, None)

    def signals_after(self, layer: nn.Module, hidden: Tensor, carried: Carried | None) -> Signals:
        seen, normed = self._observed(layer, hidden, carried and carried.first(hidden.shape[0]))
        q, k = (F.normalize(seen[name].float(), dim=-1) for name in ("query", "key"))
        v, beta, g = (seen[name].float() for name in ("value", "beta", "g"))
        state: Tensor | None = seen["initial_state"]
        return Signals(
            (beta[..., None] * v).flatten(-2),
            (-g)[..., None].expand_as(v).flatten(-2),
            v.new_ones(1, 1),
            k,
            q,
            normed * _columns(layer),
            beta[..., None].expand_as(v).flatten(-2),
            None if state is None else state.mT.flatten(1, 2),
            removed=True,
        )

    def _observed(self, layer: nn.Module, hidden: Tensor, carried: Carried | None) -> tuple[dict[str, Any], Tensor]:
        """The arguments of the recurrence, and the factor by which norm and gate multiply each of its outputs.

        The norm divides a head's output by its root mean square. An output that is small beside the head's others is
        mostly a difference of larger terms; it would count without bound, though its error after the norm is bounded.
        So the mean square over the data is added to that of the token. Padding is no part of the data: there the input
        is zero.
        """
        seen: dict[str, Any] = {}
        factors: list[Tensor] = []
        there = hidden.any(-1) if bool(hidden.any()) else hidden.new_ones(hidden.shape[:2], dtype=torch.bool)

        def recorded(run: Callable[..., Any]) -> Callable[..., Any]:
            def kernel(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
                seen.update(query=query, key=key, value=value, **options)
                return run(query, key, value, **options)

            return kernel

        def normed(norm: Any, inputs: tuple[Any, ...]) -> None:
            heads, gate = inputs
            power = heads.float().square().mean(-1).view(*hidden.shape[:2], -1)
            size = torch.rsqrt(power + power[there].mean(0) + norm.variance_epsilon)
            gates = norm.forward(torch.ones_like(heads), gate).float().view(*size.shape, -1)
            factors.append((gates * size[..., None]).flatten(-2))

        functions = {name: recorded(called_function(layer, name)) for name in self.kernels}
        handle = _norm(layer).register_forward_pre_hook(normed)
        try:
            rebound_forward(layer, functions)(hidden, carried)
        finally:
            handle.remove()
        (factor,) = factors
        return seen, factor

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        assert reduction.kept is not None
        (heads, r), n = reduction.kept.shape, reduction.into.shape[2]
        keys = (reduction.kept + n * torch.arange(heads)[:, None]).flatten()
        channels = values["conv1d.weight"].shape[0]
        convolved = torch.cat([keys, heads * n + keys, torch.arange(2 * heads * n, channels)])
        changes, attributes = [], dict[str, Any]()
        places = {"q_proj": keys, "k_proj": keys, "in_proj_qkv": convolved, "conv1d": convolved}
        if "in_proj_qkvz.weight" in values:
            places["in_proj_qkvz"] = _rows_by_head(values["in_proj_qkvz.weight"].shape[0], n, reduction.kept)
        for module, kept in places.items():
            found = [name for name in (f"{module}.weight", f"{module}.bias") if name in values]
            changes += [selection_change(name, values[name], 0, kept) for name in found]
            if found and module != "conv1d":
                attributes[f"{module}.out_features"] = kept.shape[0]
        width = convolved.shape[0]
        attributes |= {f"conv1d.{name}": width for name in ("in_channels", "out_channels", "groups")}
        attributes |= {"head_k_dim": r, "key_dim": heads * r, "conv_dim": width}
        return LayerChange(tuple[ParameterChange, ...](changes), attributes)

    def state_dim(self, layer: nn.Module) -> int:
        module: Any = layer
        return int(module.head_k_dim)

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        module: Any = layer
        return self.plan(layer_values(layer), first_states(self.state_dim(layer), states, module.num_k_heads))


def _rows_by_head(rows: int, n: int, kept: Tensor) -> Tensor:
    """The rows that stay of a projection whose rows are those of one head after the other: n of queries, n of keys,
    and then those of values and gates, which all stay.

    Args:
        rows: number of rows.
        n: key dimension.
        kept: key dimensions that stay, shape ``(heads, r)``.
    """
    heads = kept.shape[0]
    each = rows // heads
    one = torch.cat([kept, n + kept, torch.arange(2 * n, each).expand(heads, -1)], 1)
    return (one + each * torch.arange(heads)[:, None]).flatten()


def _norm(layer: Any) -> nn.Module:
    return layer.norm if hasattr(layer, "norm") else layer.o_norm


def _columns(layer: Any) -> Tensor:
    """Norms of the columns of the layer's output projection."""
    return effective_weight(layer.out_proj if hasattr(layer, "out_proj") else layer.o_proj).float().norm(dim=0)


__all__ = ["HFDeltaRuleAdapter"]
