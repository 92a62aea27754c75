"""Mamba-2's layer on the state space dual form (Dao, Gu, Transformers are SSMs, ICML 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.layers.activations import causal_conv
from compressm.layers.gated_norm import gated_rms_norm
from compressm.layers.packing import starts_of
from compressm.layers.parts import at_least_float32, inverse_softplus, log_uniform, short_conv_step
from compressm.scans import ssd_scan, ssd_step


class GatedRMSNorm(nn.Module):
    """``weight * y / rms(y)`` with ``y = x * SiLU(z)``, over each of ``groups`` parts of the last axis."""

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(x, z, self.weight, self.groups, self.eps, gate_last=False)


class Mamba2(nn.Module):
    """Mamba-2: one decay per head. B and C act as keys and queries and pass through the convolution too.

        [z, x, B, C, dt] = in_proj(v);   [x, B, C] = SiLU(conv1d([x, B, C]));   delta = softplus(dt + dt_bias)
        S_t = exp(delta_t A) S_{t-1} + delta_t x_t B_t^T,   y_t = S_t C_t + D x_t,   out = out_proj(norm(y, z))

    per head, ``A = -exp(A_log)``. Names, shapes and initialisation of the parameters are those of the authors'
    implementation, so that weights map one to one.

    Args:
        d_model: width of the sequences.
        d_state: state dimension n.
        expand: ``d_inner = expand * d_model`` channels.
        d_conv: width of the convolution.
        head_dim: channels per head; divides ``d_inner``.
        n_groups: groups of heads that share B and C; divides the number of heads.
        dt_min, dt_max: ``delta`` at initialisation is log-uniform between them.
        norm_eps: added to the mean square in the gated norm.

    Shape:
        input and output ``(batch, length, d_model)``. If rows hold several sequences, ``seq_idx``, integers of shape
        ``(batch, length)``, is the number of every token's sequence; they are kept apart.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        d_conv: int = 4,
        head_dim: int = 64,
        n_groups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if min(d_model, d_state, expand, d_conv, head_dim, n_groups) < 1:
            raise ValueError(
                "d_model, d_state, expand, d_conv, head_dim and n_groups must be at least 1; got "
                f"{d_model}, {d_state}, {expand}, {d_conv}, {head_dim} and {n_groups}"
            )
        self.d_model, self.d_inner = d_model, expand * d_model
        if self.d_inner % head_dim:
            raise ValueError(f"head_dim={head_dim} must divide expand * d_model = {self.d_inner}")
        self.head_dim, self.n_heads, self.n_groups = head_dim, self.d_inner // head_dim, n_groups
        if self.n_heads % n_groups:
            raise ValueError(f"n_groups={n_groups} must divide the number of heads, {self.n_heads}")
        if not 0 < dt_min < dt_max:
            raise ValueError(f"expected 0 < dt_min < dt_max; got dt_min={dt_min}, dt_max={dt_max}")
        channels = self.d_inner + 2 * n_groups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + channels + self.n_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(inverse_softplus(log_uniform(self.n_heads, dt_min, dt_max)))
        self.A_log = nn.Parameter((1 + 15 * torch.rand(self.n_heads)).log())
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = GatedRMSNorm(self.d_inner, n_groups, norm_eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    @property
    def d_state(self) -> int:
        """State dimension n, read off the parameters."""
        return (self.conv1d.weight.shape[0] - self.d_inner) // (2 * self.n_groups)

    def forward(self, v: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        starts = starts_of(seq_idx)
        x, delta, B, C, z = self.recurrence(v, starts)
        y = ssd_scan(x, -delta * at_least_float32(self.A_log).exp(), B, C, delta=delta, D=self.D, starts=starts)
        return self.out_proj(self.norm(y.flatten(-2), z).to(z.dtype))  # A_log and D may be float32 beside bfloat16

    def _project(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, the input of the convolution, and ``dt`` before its bias."""
        z, xBC, dt = self.in_proj(v).split([self.d_inner, self.conv1d.weight.shape[0], self.n_heads], -1)
        return z, xBC, dt

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` of shape ``(..., heads, head_dim)``, ``B`` and ``C`` of shape ``(..., groups, d_state)``."""
        width = self.n_groups * self.d_state
        x, B, C = xBC.split([self.d_inner, width, width], -1)
        return (
            x.unflatten(-1, (self.n_heads, self.head_dim)),
            B.unflatten(-1, (self.n_groups, self.d_state)),
            C.unflatten(-1, (self.n_groups, self.d_state)),
        )

    def recurrence(self, v: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The inputs ``x``, ``delta``, ``B`` and ``C`` of the recurrence for ``v``, and the gate ``z``. ``starts``:
        see `ssd_scan`."""
        z, xBC, dt = self._project(v)
        x, B, C = self._split(causal_conv(self.conv1d, xBC, starts))
        return x, F.softplus(dt + self.dt_bias), B, C, z

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """The zero state of `step`: the convolution's last inputs, shape ``(batch, d_conv - 1, channels)``, and the
        recurrence's state, shape ``(batch, heads, head_dim, d_state)``."""
        channels, _, taps = self.conv1d.weight.shape
        return (
            self.conv1d.weight.new_zeros(batch, taps - 1, channels),
            self.D.new_zeros(batch, self.n_heads, self.head_dim, self.d_state),
        )

    def step(self, v: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One time step: ``v`` of shape ``(batch, d_model)`` to the output of the same shape, and the next state."""
        z, xBC, dt = self._project(v)
        xBC, window = short_conv_step(self.conv1d, xBC, state[0])
        x, B, C = self._split(F.silu(xBC))
        delta = F.softplus(dt + self.dt_bias)
        y, S = ssd_step(state[1], x * delta[..., None], -delta * at_least_float32(self.A_log).exp(), B, C)
        y = y + self.D[:, None] * x
        return self.out_proj(self.norm(y.flatten(-2), z).to(z.dtype)), (window, S)

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, heads={self.n_heads}, "
            f"groups={self.n_groups}"
        )
