"""Layers whose state is a matrix per head, keys by values: linear attention, gated linear attention, the delta rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.layers.gated_norm import gated_rms_norm
from compressm.layers.packing import starts_of
from compressm.layers.parts import short_conv, short_conv_step
from compressm.scans import delta_scan, delta_step, gla_scan, gla_step, ssd_scan, ssd_step

Decay = Literal["none", "fixed", "gated"]

# The decay is gate^(1/16), as in Yang et al. 2024, so that gates near 0.5 remember some tens of steps.
GATE_TEMPERATURE = 16.0


class MatrixStateLayer(nn.Module):
    """The part that these layers share: projections to keys, queries, values and a gate, and the output.

        out = out_proj(weight * rms_norm(y) * SiLU(gate))

    where ``y`` is the output of the recurrence, and each head is normalised by itself. A subclass defines `terms`, the
    arguments of ``scan``, and sets ``scan`` and ``scan_step``.

    With ``d_conv`` taps, keys, queries, values, decay and beta are projections of ``x`` in place of the input ``u``,

        x_t = u_t + sum_{j < d_conv} w_j * u_{t-j}

    with a weight ``w_j`` per channel; the output gate reads ``u``. A layer can then store a token under the one before
    it, which associative recall needs (Arora et al., Zoology, 2023). It is learnt faster in this form than with
    ``x = SiLU(w * u)``, as in Mamba.

    The layers of flash-linear-attention convolve keys, queries and values after their projections, channel by channel,
    with SiLU, so no change of basis of the keys passes through. Here the convolution stands before the projections.
    The recurrence follows them as before, and every map of keys and queries that it allows folds into them.

    Args:
        d_model: width of the sequences.
        d_state: state dimension n, per head: the number of entries of keys and queries.
        n_heads: heads; divides ``expand * d_model``.
        expand: values and gate have ``expand * d_model`` channels.
        norm_eps: added to the mean square in the norm.
        d_conv: taps of the convolution, at least 2; 0 for none.

    Shape:
        input and output ``(batch, length, d_model)``. If rows hold several sequences, ``seq_idx``, integers of shape
        ``(batch, length)``, is the number of every token's sequence; they are kept apart.
    """

    scan: Callable[..., Any]
    scan_step: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, d_model: int, d_state: int, n_heads: int, expand: int, norm_eps: float, d_conv: int = 0) -> None:
        super().__init__()
        if min(d_model, d_state, n_heads, expand) < 1:
            raise ValueError(
                "d_model, d_state, n_heads and expand must be at least 1; got "
                f"{d_model}, {d_state}, {n_heads} and {expand}"
            )
        if expand * d_model % n_heads:
            raise ValueError(f"n_heads={n_heads} must divide expand * d_model = {expand * d_model}")
        if d_conv < 0 or d_conv == 1:
            raise ValueError(f"d_conv must be at least 2 taps, or 0 for no convolution; got {d_conv}")
        self.d_model, self.d_inner = d_model, expand * d_model
        self.n_heads, self.head_dim = n_heads, self.d_inner // n_heads
        self.norm_eps = norm_eps
        self.q_proj = nn.Linear(d_model, n_heads * d_state, bias=False)
        self.k_proj = nn.Linear(d_model, n_heads * d_state, bias=False)
        self.v_proj = nn.Linear(d_model, self.d_inner, bias=False)
        self.gate_proj = nn.Linear(d_model, self.d_inner, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.conv1d = (
            nn.Conv1d(d_model, d_model, d_conv, groups=d_model, padding=d_conv - 1, bias=False) if d_conv else None
        )

    @property
    def d_state(self) -> int:
        """State dimension n, read off the parameters."""
        return self.k_proj.weight.shape[0] // self.n_heads

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        starts = starts_of(seq_idx)
        return self.read_out(self.scan(*self.recurrence(u, starts), starts=starts), u)

    def recurrence(self, u: Tensor, starts: Tensor | None = None) -> tuple[Tensor, ...]:
        """`terms` of the layer's input, shape ``(batch, length, d_model)``. ``starts``: see `ssd_scan`."""
        return self.terms(u if self.conv1d is None else u + short_conv(self.conv1d, u, starts))

    def terms(self, x: Tensor) -> tuple[Tensor, ...]:
        """The arguments of ``scan`` for ``x`` of shape ``(..., d_model)``: values ``(..., heads, head_dim)``, then the
        decay and other gates, then keys and queries ``(..., heads, n)``."""
        raise NotImplementedError

    def by_head(self, channels: Tensor) -> Tensor:
        """``(..., heads * m)`` to ``(..., heads, m)``."""
        return channels.unflatten(-1, (self.n_heads, channels.shape[-1] // self.n_heads))  # -1 fails where empty

    def read_out(self, y: Tensor, u: Tensor) -> Tensor:
        """Norm, gate and output projection for ``y`` of shape ``(..., heads, head_dim)``."""
        gate = self.gate_proj(u)
        return self.out_proj(
            gated_rms_norm(y.flatten(-2), gate, self.norm_weight, self.n_heads, self.norm_eps, gate_last=True)
        )

    def initial_state(self, batch: int) -> Tensor | tuple[Tensor, Tensor]:
        """The zero state of `step`: shape ``(batch, heads, head_dim, n)``; with a convolution behind its last inputs,
        shape ``(batch, d_conv - 1, d_model)``."""
        S = self.norm_weight.new_zeros(batch, self.n_heads, self.head_dim, self.d_state)
        if self.conv1d is None:
            return S
        return self.conv1d.weight.new_zeros(batch, self.conv1d.kernel_size[0] - 1, self.d_model), S

    def step(self, u: Tensor, state: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to the output of the same shape, and the next state."""
        if isinstance(state, Tensor):
            y, S = self.scan_step(state, *self.terms(u))
            return self.read_out(y, u), S
        assert self.conv1d is not None
        added, window = short_conv_step(self.conv1d, u, state[0])
        y, S = self.scan_step(state[1], *self.terms(u + added))
        return self.read_out(y, u), (window, S)

    def extra_repr(self) -> str:
        taps = "" if self.conv1d is None else f", d_conv={self.conv1d.kernel_size[0]}"
        return f"d_model={self.d_model}, d_state={self.d_state}, heads={self.n_heads}{taps}"


class LinearAttention(MatrixStateLayer):
    """Linear attention with at most one decay per head. In every head keys and queries have n entries.

        S_t = alpha_t S_{t-1} + v_t k_t^T,    y_t = S_t q_t

    with ``k, q, v`` linear in the input, and the decay ``alpha``

    - ``"none"``: 1, linear attention (Katharopoulos et al. 2020) without its normaliser;
    - ``"fixed"``: ``1 - 2^-(5 + head)``, as in RetNet (Sun et al. 2023), without its rotations of k and q;
    - ``"gated"``: ``sigmoid(w . input + bias)^(1/16)``, a number per head and token.

    Since ``alpha`` is a scalar, it commutes with any change of basis of the keys. Such a layer can therefore be cut
    exactly, by balanced truncation.

    Args:
        d_model, d_state, n_heads, expand, norm_eps, d_conv: see `MatrixStateLayer`.
        decay: see above.

    Shape:
        input and output ``(batch, length, d_model)``. If rows hold several sequences, ``seq_idx``, integers of shape
        ``(batch, length)``, is the number of every token's sequence; they are kept apart.
    """

    scan = staticmethod(ssd_scan)
    scan_step = staticmethod(ssd_step)

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        n_heads: int = 4,
        expand: int = 1,
        decay: Decay = "gated",
        norm_eps: float = 1e-5,
        d_conv: int = 0,
    ) -> None:
        super().__init__(d_model, d_state, n_heads, expand, norm_eps, d_conv)
        if decay not in ("none", "fixed", "gated"):
            raise ValueError(f"decay must be 'none', 'fixed' or 'gated'; got {decay!r}")
        self.decay: Decay = decay
        if decay == "gated":
            self.decay_proj = nn.Linear(d_model, n_heads)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, logarithm of the decay ``(..., heads)``, keys and queries; see `MatrixStateLayer.terms`."""
        v, k, q = (self.by_head(projection(x)) for projection in (self.v_proj, self.k_proj, self.q_proj))
        if self.decay == "gated":
            return v, F.logsigmoid(self.decay_proj(x)) / GATE_TEMPERATURE, k, q
        heads = torch.arange(self.n_heads, dtype=v.dtype, device=v.device)
        log_decay = torch.log1p(-torch.exp2(-5 - heads)) if self.decay == "fixed" else torch.zeros_like(heads)
        return v, log_decay.expand(v.shape[:-1]), k, q

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay}"


class GatedLinearAttention(MatrixStateLayer):
    """Gated linear attention (Yang et al. 2024): a decay for every key dimension and token.

        S_t = S_{t-1} diag(alpha_t) + v_t k_t^T,    y_t = S_t q_t,    alpha = sigmoid(W2 W1 u + bias)^(1/16)

    Args:
        d_model, d_state, n_heads, expand, norm_eps, d_conv: see `MatrixStateLayer`.
        gate_rank: rows of ``W1``.

    Shape:
        input and output ``(batch, length, d_model)``. If rows hold several sequences, ``seq_idx``, integers of shape
        ``(batch, length)``, is the number of every token's sequence; they are kept apart.
    """

    scan = staticmethod(gla_scan)
    scan_step = staticmethod(gla_step)

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        n_heads: int = 4,
        expand: int = 1,
        gate_rank: int = 16,
        norm_eps: float = 1e-5,
        d_conv: int = 0,
    ) -> None:
        super().__init__(d_model, d_state, n_heads, expand, norm_eps, d_conv)
        if gate_rank < 1:
            raise ValueError(f"gate_rank must be at least 1; got {gate_rank}")
        self.decay_proj = nn.Sequential(
            nn.Linear(d_model, gate_rank, bias=False), nn.Linear(gate_rank, n_heads * d_state)
        )

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, logarithm of the decay ``(..., heads, n)``, keys and queries; see `MatrixStateLayer.terms`."""
        v, k, q = (self.by_head(projection(x)) for projection in (self.v_proj, self.k_proj, self.q_proj))
        return v, F.logsigmoid(self.by_head(self.decay_proj(x))) / GATE_TEMPERATURE, k, q


class DeltaNet(MatrixStateLayer):
    """DeltaNet (Schlag et al. 2021; Yang et al. 2024), and Gated DeltaNet (Yang et al. 2025) with a decay.

        S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,    y_t = S_t q_t

    with keys and queries linear in the input and of norm 1, ``beta = sigmoid(w . u + b)``, and ``alpha`` as in
    `LinearAttention`. There is no convolution and no non-linearity before keys and queries except their norm, so a
    rotation of them can be folded into their projections.

    Args:
        d_model, d_state, n_heads, expand, norm_eps, d_conv: see `MatrixStateLayer`.
        gated: whether there is a decay.

    Shape:
        input and output ``(batch, length, d_model)``. If rows hold several sequences, ``seq_idx``, integers of shape
        ``(batch, length)``, is the number of every token's sequence; they are kept apart.
    """

    scan = staticmethod(delta_scan)
    scan_step = staticmethod(delta_step)

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        n_heads: int = 4,
        expand: int = 1,
        gated: bool = False,
        norm_eps: float = 1e-5,
        d_conv: int = 0,
    ) -> None:
        super().__init__(d_model, d_state, n_heads, expand, norm_eps, d_conv)
        self.gated = gated
        self.beta_proj = nn.Linear(d_model, n_heads)
        if gated:
            self.decay_proj = nn.Linear(d_model, n_heads)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Values, logarithm of the decay and beta ``(..., heads)``, keys and queries; see
        `MatrixStateLayer.terms`."""
        v = self.by_head(self.v_proj(x))
        k, q = (F.normalize(self.by_head(projection(x)), dim=-1) for projection in (self.k_proj, self.q_proj))
        beta = self.beta_proj(x).sigmoid()
        log_decay = F.logsigmoid(self.decay_proj(x)) / GATE_TEMPERATURE if self.gated else torch.zeros_like(beta)
        return v, log_decay, beta, k, q

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gated={self.gated}"
