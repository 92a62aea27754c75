"""Linear attention with one decay per head: its state is a matrix per head, keys by values."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.scans import ssd_scan, ssd_step

Decay = Literal["none", "fixed", "gated"]

# A gate of 0.5 forgets by 0.5^(1/16): gates near the middle remember some tens of steps, as in Yang et al. 2024.
GATE_TEMPERATURE = 16.0


class LinearAttention(nn.Module):
    """Gated linear attention, per head with keys and queries of n entries and values of ``head_dim``.

        S_t = alpha_t S_{t-1} + v_t k_t^T,    y_t = S_t q_t,    out = out_proj(weight * rms_norm(y) * SiLU(gate))

    with ``k, q, v, gate`` linear in the input, the norm taken head by head, and the decay ``alpha``

    - ``"none"``: 1, linear attention (Katharopoulos et al. 2020) without its normaliser;
    - ``"fixed"``: ``1 - 2^-(5 + head)``, as in RetNet (Sun et al. 2023), without its rotations of k and q;
    - ``"gated"``: ``sigmoid(w . input + bias)^(1/16)``, a number per head and token.

    The state dimension is the n of keys and queries. Since ``alpha`` is a number, any change of basis of the keys
    commutes with it: such a layer can be cut exactly, by balanced truncation.

    Args:
        d_model: width of the sequences.
        d_state: state dimension n, per head.
        n_heads: heads; divides ``expand * d_model``.
        expand: values and gate have ``expand * d_model`` channels.
        decay: see above.
        norm_eps: added to the mean square in the norm.

    Shape:
        input and output ``(batch, length, d_model)``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        n_heads: int = 4,
        expand: int = 1,
        decay: Decay = "gated",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if min(d_model, d_state, n_heads, expand) < 1:
            raise ValueError(
                "d_model, d_state, n_heads and expand must be at least 1; got "
                f"{d_model}, {d_state}, {n_heads} and {expand}"
            )
        if expand * d_model % n_heads:
            raise ValueError(f"n_heads={n_heads} must divide expand * d_model = {expand * d_model}")
        if decay not in ("none", "fixed", "gated"):
            raise ValueError(f"decay must be 'none', 'fixed' or 'gated'; got {decay!r}")
        self.d_model, self.d_inner = d_model, expand * d_model
        self.n_heads, self.head_dim = n_heads, self.d_inner // n_heads
        self.decay: Decay = decay
        self.norm_eps = norm_eps
        self.q_proj = nn.Linear(d_model, n_heads * d_state, bias=False)
        self.k_proj = nn.Linear(d_model, n_heads * d_state, bias=False)
        self.v_proj = nn.Linear(d_model, self.d_inner, bias=False)
        self.gate_proj = nn.Linear(d_model, self.d_inner, bias=False)
        if decay == "gated":
            self.decay_proj = nn.Linear(d_model, n_heads)
        self.norm_weight = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    @property
    def d_state(self) -> int:
        """State dimension n, read off the parameters."""
        return self.k_proj.weight.shape[0] // self.n_heads

    def forward(self, u: Tensor) -> Tensor:
        v, log_decay, k, q = self.recurrence(u)
        return self.read_out(ssd_scan(v, log_decay, k, q), u)

    def recurrence(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the recurrence gets for ``u`` of shape ``(..., d_model)``: values ``(..., heads, head_dim)``, logarithm
        of the decay ``(..., heads)``, keys and queries ``(..., heads, n)``."""
        k, q = (projection(u).unflatten(-1, (self.n_heads, -1)) for projection in (self.k_proj, self.q_proj))
        v = self.v_proj(u).unflatten(-1, (self.n_heads, -1))
        if self.decay == "gated":
            return v, F.logsigmoid(self.decay_proj(u)) / GATE_TEMPERATURE, k, q
        heads = torch.arange(self.n_heads, dtype=v.dtype, device=v.device)
        log_decay = torch.log1p(-torch.exp2(-5 - heads)) if self.decay == "fixed" else torch.zeros_like(heads)
        return v, log_decay.expand(v.shape[:-1]), k, q

    def read_out(self, y: Tensor, u: Tensor) -> Tensor:
        """Norm, gate and output projection for ``y`` of shape ``(..., heads, head_dim)``."""
        y = F.rms_norm(y, y.shape[-1:], None, self.norm_eps).flatten(-2)
        return self.out_proj(self.norm_weight * y * F.silu(self.gate_proj(u)))

    def initial_state(self, batch: int) -> Tensor:
        """The zero state of `step`, shape ``(batch, heads, head_dim, n)``."""
        return self.norm_weight.new_zeros(batch, self.n_heads, self.head_dim, self.d_state)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to the output of the same shape, and the next state."""
        v, log_decay, k, q = self.recurrence(u)
        y, state = ssd_step(state, v, log_decay, k, q)
        return self.read_out(y, u), state

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, heads={self.n_heads}, decay={self.decay}"
