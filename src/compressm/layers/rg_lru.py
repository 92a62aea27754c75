"""The recurrent block of Griffin and RecurrentGemma (De et al., Griffin, 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.layers.parts import at_least_float32, inverse_softplus, short_conv, short_conv_step
from compressm.scans import selective_scan

# Decays are exp(-8 softplus(parameter) gate).
SHARPNESS = 8.0


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit: one real state per channel, with gates that depend on the input.

        h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * sigmoid(gate_x(x_t)) * x_t,
        a_t = exp(-8 softplus(recurrent_param) sigmoid(gate_a(x_t)))

    with linear gates that are block diagonal. Parameters have the names and shapes of RecurrentGemma's.

    Args:
        d_state: states (channels) of a block.
        n_blocks: blocks of the gates.
    """

    recurrent_param: nn.Parameter
    input_gate_weight: nn.Parameter
    input_gate_bias: nn.Parameter
    recurrent_gate_weight: nn.Parameter
    recurrent_gate_bias: nn.Parameter

    def __init__(self, d_state: int, n_blocks: int) -> None:
        super().__init__()
        # As in the paper: with open gates the decay is uniform in its square on [0.9, 0.999].
        squares = 0.9**2 + (0.999**2 - 0.9**2) * torch.rand(n_blocks * d_state)
        self.recurrent_param = nn.Parameter(inverse_softplus(-0.5 * squares.log() / SHARPNESS))
        for name in ("input_gate", "recurrent_gate"):
            weight = torch.randn(n_blocks, d_state, d_state) / math.sqrt(d_state)
            self.register_parameter(f"{name}_weight", nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(n_blocks, d_state)))

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, including those that are computed from others."""
        gates = [f"{gate}_{part}" for gate in ("input_gate", "recurrent_gate") for part in ("weight", "bias")]
        return {name: getattr(self, name) for name in ("recurrent_param", *gates)}

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``decay`` and ``input`` of the recurrence ``h_t = exp(-decay_t) h_{t-1} + input_t``, of the shape of ``x``,
        ``(..., width)``."""
        return recurrence_terms(x, self.weights())


def recurrence_terms(x: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`RGLRU.terms` as a function of the parameters by name."""

    def gate(name: str) -> Tensor:
        weight, bias = parameters[f"{name}_weight"], parameters[f"{name}_bias"]
        blocks = x.unflatten(-1, weight.shape[:2])
        return torch.sigmoid(torch.einsum("...hi,hij->...hj", blocks, weight) + bias).flatten(-2)

    decay = SHARPNESS * F.softplus(parameters["recurrent_param"]) * gate("recurrent_gate")
    # The derivative of the square root is unbounded where the decay is zero.
    return decay, (-torch.expm1(-2 * decay)).clamp_min(1e-6).sqrt() * gate("input_gate") * x


class RecurrentBlock(nn.Module):
    """Griffin's recurrent block: two branches, one of which has a convolution and an `RGLRU`.

        out = linear_out(GELU(linear_y(u)) * rg_lru(conv_1d(linear_x(u))))

    Every state is a channel and has its own row or column in every parameter. The state dimension of this layer is
    therefore its width, and cutting states makes the block narrower.

    Args:
        d_model: width of the sequences.
        d_state: states per block of the gates; the recurrence is ``n_blocks * d_state`` wide.
        n_blocks: blocks of the gates.
        d_conv: taps of the convolution.

    Shape:
        input and output ``(batch, length, d_model)``.
    """

    def __init__(self, d_model: int, d_state: int, n_blocks: int = 1, d_conv: int = 4) -> None:
        super().__init__()
        if min(d_model, d_state, n_blocks, d_conv) < 1:
            raise ValueError(
                f"d_model, d_state, n_blocks and d_conv must be at least 1; got {d_model}, {d_state}, {n_blocks} and "
                f"{d_conv}"
            )
        width = n_blocks * d_state
        self.d_model = d_model
        self.linear_y = nn.Linear(d_model, width)
        self.linear_x = nn.Linear(d_model, width)
        self.conv_1d = nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1)
        self.rg_lru = RGLRU(d_state, n_blocks)
        self.linear_out = nn.Linear(width, d_model)

    @property
    def d_state(self) -> int:
        """States per block of the gates, read off the parameters."""
        return self.rg_lru.input_gate_weight.shape[1]

    def forward(self, u: Tensor) -> Tensor:
        decay, driven = self.rg_lru.terms(short_conv(self.conv_1d, self.linear_x(u)))
        # One S6 channel per state: h_t = exp(-decay) h_{t-1} + decay * (driven / decay) * 1. The division needs
        # float32, since in float16 the smallest decay would be zero.
        decay, driven = at_least_float32(decay), at_least_float32(driven)
        ones, decay = decay.new_ones(*decay.shape[:2], 1), decay.clamp_min(1e-8)
        h = selective_scan(driven / decay, decay, -decay.new_ones(decay.shape[2], 1), ones, ones)
        return self.linear_out(F.gelu(self.linear_y(u), approximate="tanh") * h.to(u.dtype))

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """The zero state of `step`: the convolution's last inputs, shape ``(batch, d_conv - 1, width)``, and the
        recurrence's state, shape ``(batch, width)``."""
        taps, width = self.conv_1d.kernel_size[0], self.linear_x.out_features
        return self.linear_x.bias.new_zeros(batch, taps - 1, width), self.linear_x.bias.new_zeros(batch, width)

    def step(self, u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to the output of the same shape, and the next state."""
        x, window = short_conv_step(self.conv_1d, self.linear_x(u), state[0])
        decay, driven = self.rg_lru.terms(x)
        h = torch.exp(-decay) * state[1] + driven
        return self.linear_out(F.gelu(self.linear_y(u), approximate="tanh") * h), (window, h)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, blocks={self.rg_lru.input_gate_weight.shape[0]}"
