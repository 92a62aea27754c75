"""Mamba's selective state space layer, S6 (Gu, Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces,
2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.layers.activations import causal_conv, gated, step_sizes
from compressm.layers.packing import starts_of
from compressm.layers.parts import at_least_float32, inverse_softplus, log_uniform, short_conv_step
from compressm.scans import selective_scan, selective_step


class Mamba(nn.Module):
    """The selective state space layer: projection, short causal convolution, selective scan, gate, projection.

        [u, z] = in_proj(v);   u = SiLU(conv1d(u));   [dt, B, C] = x_proj(u);   delta = softplus(dt_proj(dt))
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,   y_t = C_t . h_t + D u_t,   out = out_proj(y * SiLU(z))

    per channel, ``A = -exp(A_log)``. Names, shapes and initialisation of the parameters are those of the authors'
    implementation, so that weights map one to one.

    Args:
        d_model: width of the sequences.
        d_state: state dimension n, per channel.
        expand: ``d_inner = expand * d_model`` channels.
        d_conv: width of the convolution.
        dt_rank: rank of the projection to ``delta``; by default ``ceil(d_model / 16)``.
        dt_min, dt_max: ``delta`` at initialisation is log-uniform between them.

    Shape:
        input and output ``(batch, length, d_model)``. If rows hold several sequences, ``seq_idx``, integers of shape
        ``(batch, length)``, is the number of every token's sequence; they are kept apart.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        if min(d_model, d_state, expand, d_conv) < 1 or (dt_rank is not None and dt_rank < 1):
            raise ValueError(
                "d_model, d_state, expand, d_conv and dt_rank must be at least 1; got "
                f"{d_model}, {d_state}, {expand}, {d_conv} and {dt_rank}"
            )
        if not 0 < dt_min < dt_max:
            raise ValueError(f"expected 0 < dt_min < dt_max; got dt_min={dt_min}, dt_max={dt_max}")
        self.d_model, self.d_inner = d_model, expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus(log_uniform(self.d_inner, dt_min, dt_max)))
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    @property
    def d_state(self) -> int:
        """State dimension n, read off the parameters."""
        return self.A_log.shape[1]

    def forward(self, v: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        starts = starts_of(seq_idx)
        u, z = self.in_proj(v).chunk(2, -1)
        u = causal_conv(self.conv1d, u, starts)
        delta, B, C = self.select(u)
        y = selective_scan(u, delta, -at_least_float32(self.A_log).exp(), B, C, starts=starts)
        return self.out_proj(gated(y, u, self.D, z).to(z.dtype))  # A_log and D may be float32 beside bfloat16

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``delta`` of shape ``(..., d_inner)``, ``B`` and ``C`` of shape ``(..., d_state)``, for ``u`` after the
        convolution, shape ``(..., d_inner)``."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        return step_sizes(self.dt_proj, dt), B, C

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """The zero state of `step`: the convolution's last inputs, shape ``(batch, d_conv - 1, d_inner)``, and the
        recurrence's state, shape ``(batch, d_inner, d_state)``."""
        width = self.conv1d.kernel_size[0] - 1
        window = self.conv1d.weight.new_zeros(batch, width, self.d_inner)
        return window, self.D.new_zeros(batch, self.d_inner, self.d_state)

    def step(self, v: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One time step: ``v`` of shape ``(batch, d_model)`` to the output of the same shape, and the next state."""
        u, z = self.in_proj(v).chunk(2, -1)
        u, window = short_conv_step(self.conv1d, u, state[0])
        u = F.silu(u)
        delta, B, C = self.select(u)
        y, h = selective_step(state[1], u, delta, -at_least_float32(self.A_log).exp(), B, C)
        return self.out_proj(((y + self.D * u) * F.silu(z)).to(z.dtype)), (window, h)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, dt_rank={self.dt_rank}"
