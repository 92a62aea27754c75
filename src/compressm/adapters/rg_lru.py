"""Griffin's recurrent blocks, ours and RecurrentGemma's: states are channels, and a cut takes some of them out of every
parameter.

Each channel is a system of order one, which no change of basis can reduce; a cut reduces their number. The output
projection compensates for the removed channels as far as the kept ones carry the same signals. The gates lose the
removed channels as inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.base import SelectiveAdapter
from compressm.adapters.changes import LayerChange, ParameterChange, layer_values, selection_change
from compressm.adapters.composed import effective_weight
from compressm.adapters.hf_base import HuggingFaceAdapter
from compressm.errors import UnsupportedModelError
from compressm.layers.parts import short_conv
from compressm.layers.rg_lru import RecurrentBlock, recurrence_terms
from compressm.theory.recurrence import SelectiveReduction, Signals, first_states

_GATES = ("rg_lru.input_gate_weight", "rg_lru.recurrent_gate_weight")


class RecurrentBlockAdapter(SelectiveAdapter):
    """Keeps the same number of channels in every block of the gates."""

    layer_type = RecurrentBlock
    entrance = "linear_x"
    folds_out = True
    gated = True

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        module: Any = layer
        return self.driven_by(module, hidden, short_conv(module.conv_1d, module.linear_x(hidden)))

    def driven_by(self, module: Any, hidden: Tensor, x: Tensor) -> Signals:
        """The `signals` of a recurrence with the input ``x`` from the convolution, shape ``(batch, length, width)``."""
        decay, driven = recurrence_terms(x, dict(module.rg_lru.named_parameters()))
        blocks = module.rg_lru.input_gate_weight.shape[:2]
        decay, driven = decay.unflatten(-1, blocks), driven.unflatten(-1, blocks)
        gate = self.activation(module)(module.linear_y(hidden)).unflatten(-1, blocks)
        columns = effective_weight(module.linear_out).unflatten(-1, blocks)
        return Signals(driven.new_ones(driven.shape[:3]), decay, decay.new_ones(1, 1), driven, columns, gate)

    def activation(self, layer: Any) -> Any:
        """The activation function of the gating branch."""
        del layer
        return lambda y: F.gelu(y, approximate="tanh")

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        assert reduction.kept is not None
        kept, (blocks, r, n) = reduction.kept, reduction.into.shape
        channels = (kept + n * torch.arange(blocks)[:, None]).flatten()
        one_axis = [
            "linear_x.weight", "linear_x.bias", "linear_y.weight", "linear_y.bias", "conv_1d.weight", "conv_1d.bias",
            "rg_lru.recurrent_param",
        ]  # fmt: skip
        parts = [selection_change(name, values[name], 0, channels) for name in one_axis if name in values]
        for name in _GATES:
            parts += gate_changes(name, values[name], kept)
            bias = name.replace("weight", "bias")
            parts.append(per_block(bias, values[bias], kept, values[bias].gather(1, kept.to(values[bias].device))))
        # gated h = out^T (gated h)', so the new columns are W out^T.
        weight = values["linear_out.weight"].detach().to("cpu", torch.float64).unflatten(1, (blocks, n))
        new = torch.einsum("dbn,brn->dbr", weight, reduction.out).flatten(1)
        pullback = torch.block_diag(*reduction.into)
        parts.append(
            ParameterChange(
                ("linear_out.weight",),
                (new.to(values["linear_out.weight"]),),
                1,
                pullback,
                pullback.square(),
                torch.block_diag(*reduction.out),
            )
        )
        width = blocks * r
        attributes = {f"{name}.out_features": width for name in ("linear_x", "linear_y")}
        attributes |= {f"conv_1d.{name}": width for name in ("in_channels", "out_channels", "groups")}
        return LayerChange(tuple(parts), {**attributes, "linear_out.in_features": width})

    def state_dim(self, layer: nn.Module) -> int:
        return layer.get_parameter(_GATES[0]).shape[1]

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        values = layer_values(layer)
        return self.plan(values, first_states(self.state_dim(layer), states, values[_GATES[0]].shape[0]))


class RecurrentGemmaAdapter(HuggingFaceAdapter, RecurrentBlockAdapter):
    """``RecurrentGemmaRecurrentBlock`` of transformers, whose config stores the whole width."""

    config_field = "lru_width"
    entrance = None
    keeps_last = False

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        """As the parent's, except for the first token, whose input RecurrentGemma does not scale by the decay."""
        found = super().signals(layer, hidden)
        decay, driven = found.step[:, 0], found.B[:, 0]
        scale = (-torch.expm1(-2 * decay)).clamp_min(1e-6).sqrt()
        first = (driven / scale)[:, None]
        return replace(found, B=torch.cat([first, found.B[:, 1:]], 1))

    def carried(self, layer: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """The convolution's last inputs and the state. RecurrentGemma stores them in the layer and resets them at every
        position 0."""
        module: Any = layer
        positions, states = arguments.get("position_ids"), module.rg_lru.recurrent_states
        if not isinstance(positions, Tensor) or states is None or not arguments.get("use_cache", True):
            return None
        begins = positions[:, 0] == 0
        if bool(begins.all()):
            return None
        if bool(begins.any()):
            raise UnsupportedModelError(
                "a call goes on from a carried state in some rows of the batch and starts at position 0 in others; "
                "gather moments from batches that do one of both"
            )
        return module.conv1d_state.detach(), states.detach()

    def signals_after(self, layer: nn.Module, hidden: Tensor, carried: tuple[Tensor, Tensor]) -> Signals:
        module: Any = layer
        before, state = (value[: hidden.shape[0]].to(hidden) for value in carried)
        x, length = module.linear_x(hidden), hidden.shape[1]
        if length == 1:  # in longer inputs the convolution starts from zeros, as in the layer itself
            x = torch.cat([before.transpose(1, 2), x], 1)
        found = self.driven_by(module, hidden, short_conv(module.conv_1d, x)[:, -length:])
        return replace(found, state=state.unflatten(-1, module.rg_lru.input_gate_weight.shape[:2]))

    def activation(self, layer: Any) -> Any:
        return layer.act_fn

    def run(self, layer: nn.Module, hidden: Tensor) -> Any:
        positions = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        return layer(hidden, positions, None, use_cache=False)

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        change = super().plan(values, reduction)
        blocks, r = reduction.into.shape[:2]
        return LayerChange(change.parameters, {**change.attributes, "lru_width": blocks * r, "rg_lru.block_width": r})

    def tell_config(self, config: Any, states: int) -> None:
        """The config holds the whole width, of all blocks of the gates together."""
        config.lru_width = getattr(config, "num_attention_heads", 1) * states


def gate_changes(name: str, weight: Tensor, kept: Tensor) -> list[ParameterChange]:
    """The changes that keep some rows and columns of a block diagonal matrix, one after the other.

    Args:
        name: the parameter's name.
        weight: shape ``(blocks, n, n)``.
        kept: channels that stay of each block, shape ``(blocks, r)``.
    """
    index, (blocks, r), n = kept.to(weight.device), kept.shape, weight.shape[1]
    rows = weight.detach().gather(1, index[:, :, None].expand(blocks, r, n))
    both = rows.gather(2, index[:, None, :].expand(blocks, r, r))
    chosen = torch.eye(n, dtype=torch.float64)[kept]
    columns = chosen[:, None].expand(blocks, r, r, n)
    return [
        ParameterChange((name,), (rows,), 1, chosen, chosen),
        ParameterChange((name,), (both,), 2, columns, columns),
    ]


def per_block(name: str, value: Tensor, kept: Tensor, new: Tensor) -> ParameterChange:
    """The change that keeps some entries of a parameter of shape ``(blocks, n)``."""
    chosen = torch.eye(value.shape[1], dtype=torch.float64)[kept]
    return ParameterChange((name,), (new.detach(),), 1, chosen, chosen)
