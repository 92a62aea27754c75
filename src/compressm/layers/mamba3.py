"""Mamba-3's layer: the trapezoidal rule, states that rotate in pairs, and several inputs per step (Lahoti, Li, Chen,
Wang, Bick, Kolter, Dao, Gu, Mamba-3, ICLR 2026, arXiv 2603.15569)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.layers.gated_norm import gated_rms_norm
from compressm.layers.packing import starts_of
from compressm.layers.parts import at_least_float32, inverse_softplus, log_uniform
from compressm.scans import ssd_scan

NORM_EPS = 1e-5
State = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer: heads, groups of B and C, rank (inputs per step), states n, and how many pairs rotate.

    Pairs are neighbours, the rotating ones first. With a rank above one, state i is paired with state ``i + n / 2``.
    """

    heads: int
    groups: int
    rank: int
    states: int
    angles: int
    halves: bool
    rate_floor: float = 1e-4

    @property
    def keys(self) -> int:
        """Rows of the input projection for B, and as many for C."""
        return self.rank * self.groups * self.states


@dataclass(frozen=True)
class Terms:
    """What the recurrence gets from an input: of every time, or of one time if all shapes lack ``length``.

    Attributes:
        x, z: values and gates, shape ``(batch, length, heads, p)``.
        keys, queries: B and C with their biases, not rotated yet, shape ``(batch, length, heads, rank, n)``.
        turn: by how much the angles advance, shape ``(batch, length, heads, angles)``.
        log_decay: at most 0, shape ``(batch, length, heads)``.
        now, before: weights of the present and of the preceding input, of the same shape. The decay applies to the
            preceding one too.
    """

    x: Tensor
    z: Tensor
    keys: Tensor
    queries: Tensor
    turn: Tensor
    log_decay: Tensor
    now: Tensor
    before: Tensor


def terms(projected: Tensor, values: Mapping[str, Tensor], sizes: Sizes) -> Terms:
    """The terms of the recurrence.

    Args:
        projected: output of the input projection, shape ``(..., rows)``.
        values: ``dt_bias``, ``B_bias``, ``C_bias`` and the weights of ``B_norm`` and ``C_norm``.
        sizes: of the layer.
    """
    heads, angles = sizes.heads, sizes.angles
    inner = (projected.shape[-1] - 2 * sizes.keys - 3 * heads - angles) // 2
    parts = projected.split([inner, inner, sizes.keys, sizes.keys, heads, heads, heads, angles], -1)
    z, x = (part.unflatten(-1, (heads, -1)) for part in parts[:2])
    keys, queries = (_biased(part, values, name, sizes) for part, name in zip(parts[2:4], "BC", strict=True))
    dt, a, mix, angle = (at_least_float32(part) for part in parts[4:])
    delta = F.softplus(dt + values["dt_bias"])
    rate = torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp_max(0))).clamp_min(sizes.rate_floor)
    mix = mix.sigmoid()
    turn = math.pi * angle.tanh()[..., None, :] * delta[..., None]
    return Terms(x, z, keys, queries, turn, -rate * delta, mix * delta, (1 - mix) * delta)


def normalised(part: Tensor, sizes: Sizes) -> Tensor:
    """B or C over its root mean square, shape ``(..., rank, groups, n)``, from shape ``(..., rows)``."""
    rows = at_least_float32(part).unflatten(-1, (sizes.rank, sizes.groups, sizes.states))
    return F.rms_norm(rows, rows.shape[-1:], None, NORM_EPS)


def _biased(part: Tensor, values: Mapping[str, Tensor], name: str, sizes: Sizes) -> Tensor:
    rows = normalised(part, sizes) * values[f"{name}_norm.weight"]
    by_group = rows.transpose(-3, -2).unsqueeze(-3)  # and then the heads of a group
    biases = values[f"{name}_bias"].unflatten(0, (sizes.groups, -1))
    return (by_group + biases).flatten(-4, -3)


def rotated(v: Tensor, angles: Tensor, halves: bool) -> Tensor:
    """``v`` with its first pairs rotated.

    Args:
        v: shape ``(..., heads, rank, n)``.
        angles: shape ``(..., heads, pairs)``.
        halves: whether state i is paired with ``i + n / 2``, instead of neighbours.
    """
    first, second = v.chunk(2, -1) if halves else (v[..., ::2], v[..., 1::2])
    count, cos, sin = angles.shape[-1], angles.cos()[..., None, :], angles.sin()[..., None, :]
    one, other = first[..., :count], second[..., :count]
    first = torch.cat([one * cos - other * sin, first[..., count:]], -1)
    second = torch.cat([one * sin + other * cos, second[..., count:]], -1)
    return torch.cat([first, second], -1) if halves else torch.stack([first, second], -1).flatten(-2)


class Mamba3(nn.Module):
    """Mamba-3: per head one decay, and a state whose pairs of entries rotate by angles that depend on the data.

        [z, x, B, C, dt, a, mix, angle] = in_proj(v);   delta = softplus(dt + dt_bias);   mu = sigmoid(mix)
        k_t = R_t (B_norm(B) + B_bias),   q_t = R_t (C_norm(C) + C_bias),   alpha_t = exp(-delta_t rate(a_t))
        S_t = alpha_t S_{t-1} + (1 - mu_t) delta_t alpha_t x_{t-1} k_{t-1}^T + mu_t delta_t x_t k_t^T
        y_t = S_t q_t + D x_t,   out = out_proj(y * SiLU(z))

    per head, with ``rate(a) = 1 + a`` for ``a >= 0`` and ``1 / (1 - a)`` below. ``R_t`` rotates the pairs by the
    angles ``pi tanh(angle) delta``, summed up to t, which is a state with complex eigenvalues seen from coordinates
    that rotate along. With ``mimo_rank = r`` above one, a step writes r keys, each with the values ``x * mimo_x``, and
    reads r queries; their outputs are gated by ``z * mimo_z`` and summed with the weights ``mimo_o``.

    Names, shapes and initialisation of the parameters are those of the authors' implementation, so that weights map
    one to one.

    Args:
        d_model: width of the sequences.
        d_state: state dimension n, a multiple of ``4`` (of ``2`` if all pairs rotate).
        expand: ``d_inner = expand * d_model`` channels.
        head_dim: channels per head; divides ``d_inner``.
        n_groups: groups of heads that share B and C; divides the number of heads.
        rope_fraction: share of the pairs that rotate, 0.5 or 1.
        mimo_rank: keys per step; 1 for one input and one output (SISO).
        out_norm: whether the output of every head is normalised before its gate.
        dt_min, dt_max: ``delta`` at initialisation is log-uniform between them.

    Shape:
        input and output ``(batch, length, d_model)``. If rows hold several sequences, ``seq_idx``, integers of shape
        ``(batch, length)``, is the number of every token's sequence; they are kept apart.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        rope_fraction: float = 0.5,
        mimo_rank: int = 1,
        out_norm: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        if min(d_model, d_state, expand, head_dim, n_groups, mimo_rank) < 1:
            raise ValueError(
                "d_model, d_state, expand, head_dim, n_groups and mimo_rank must be at least 1; got "
                f"{d_model}, {d_state}, {expand}, {head_dim}, {n_groups} and {mimo_rank}"
            )
        self.d_model, self.d_inner = d_model, expand * d_model
        if self.d_inner % head_dim:
            raise ValueError(f"head_dim={head_dim} must divide expand * d_model = {self.d_inner}")
        self.head_dim, self.n_heads, self.n_groups = head_dim, self.d_inner // head_dim, n_groups
        if self.n_heads % n_groups:
            raise ValueError(f"n_groups={n_groups} must divide the number of heads, {self.n_heads}")
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction must be 0.5 or 1; got {rope_fraction}")
        if d_state % round(2 / rope_fraction):
            raise ValueError(f"d_state={d_state} must be a multiple of {round(2 / rope_fraction)}")
        if not 0 < dt_min < dt_max:
            raise ValueError(f"expected 0 < dt_min < dt_max; got dt_min={dt_min}, dt_max={dt_max}")
        self.mimo_rank, heads, angles = mimo_rank, self.n_heads, round(d_state * rope_fraction) // 2
        rows = 2 * self.d_inner + 2 * mimo_rank * n_groups * d_state + 3 * heads + angles
        self.in_proj = nn.Linear(d_model, rows, bias=False)
        self.dt_bias = nn.Parameter(inverse_softplus(log_uniform(heads, dt_min, dt_max)))
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(heads, mimo_rank, d_state)) for _ in range(2))
        self.B_norm, self.C_norm = (nn.RMSNorm(d_state, eps=NORM_EPS) for _ in range(2))
        if mimo_rank > 1:
            ones = torch.ones(heads, mimo_rank, head_dim)
            self.mimo_x, self.mimo_o = (nn.Parameter(ones / mimo_rank) for _ in range(2))
            self.mimo_z = nn.Parameter(ones)
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(self.d_inner, eps=NORM_EPS) if out_norm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    @property
    def d_state(self) -> int:
        """State dimension n, read off the parameters."""
        return self.B_norm.weight.shape[0]

    @property
    def sizes(self) -> Sizes:
        """The layer's sizes, read off the parameters."""
        known = Sizes(self.n_heads, self.n_groups, self.mimo_rank, self.d_state, 0, self.mimo_rank > 1)
        angles = self.in_proj.weight.shape[0] - 2 * self.d_inner - 2 * known.keys - 3 * self.n_heads
        return Sizes(self.n_heads, self.n_groups, self.mimo_rank, self.d_state, angles, self.mimo_rank > 1)

    def terms(self, v: Tensor) -> Terms:
        """The terms of the recurrence for ``v``, see `Terms`."""
        return terms(self.in_proj(v), dict(self.named_parameters()), self.sizes)

    def forward(self, v: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        return self.run(self.terms(v), starts_of(seq_idx))

    def run(self, t: Terms, starts: Tensor | None = None) -> Tensor:
        """The layer's output from the terms of the recurrence. ``starts``: see `trapezoidal_scan`."""
        angles, halves = t.turn.cumsum(1), self.mimo_rank > 1
        # The norm over n entries and the bias are those of single states; a rotation changes no product of a pair.
        k, q = (rotated(one, angles, halves) for one in (t.keys, t.queries))
        y = trapezoidal_scan(self.inputs(t.x), k, q, t.log_decay, t.now, t.before, starts)
        return self.read_out(y, t)

    def inputs(self, x: Tensor) -> Tensor:
        """What is stored under each key, shape ``(..., heads, rank, p)``, from shape ``(..., heads, p)``."""
        return x[..., None, :] * self.mimo_x.to(x.dtype) if self.mimo_rank > 1 else x[..., None, :]

    def read_out(self, y: Tensor, t: Terms) -> Tensor:
        """The layer's output from what the queries read, shape ``(..., heads, rank, p)``."""
        z = t.z[..., None, :]
        y = y + (self.D[:, None, None] * self.inputs(t.x)).to(y.dtype)
        z = z * self.mimo_z.to(z.dtype) if self.mimo_rank > 1 else z
        if self.norm is None:
            y = y * F.silu(z)
        else:
            rows, gates = (one.transpose(-3, -2).flatten(-2) for one in (y, z))
            normed = gated_rms_norm(rows, gates, self.norm.weight, self.n_heads, NORM_EPS, gate_last=True)
            y = normed.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)
        y = (y * self.mimo_o.to(y.dtype)).sum(-2) if self.mimo_rank > 1 else y[..., 0, :]
        return self.out_proj(y.flatten(-2).to(t.x.dtype))

    def initial_state(self, batch: int) -> State:
        """The zero state of `step`: angles, shape ``(batch, heads, pairs)``; the recurrence's state, ``(batch, heads,
        head_dim, n)``; and the last token's keys, ``(batch, heads, rank, n)``, and values, ``(batch, heads,
        head_dim)``."""
        s, zeros = self.sizes, self.D.new_zeros
        return (
            zeros(batch, s.heads, s.angles),
            zeros(batch, s.heads, self.head_dim, s.states),
            zeros(batch, s.heads, s.rank, s.states),
            self.in_proj.weight.new_zeros(batch, s.heads, self.head_dim),
        )

    def step(self, v: Tensor, state: State) -> tuple[Tensor, State]:
        """One time step: ``v`` of shape ``(batch, d_model)`` to the output of the same shape, and the next state."""
        t, (angles, S, k_last, x_last) = self.terms(v), state
        angles = (angles + t.turn).remainder(2 * math.pi)
        k, q = (rotated(one, angles, self.mimo_rank > 1) for one in (t.keys, t.queries))
        last, new = (self.inputs(x).mT @ keys.to(x.dtype) for x, keys in ((x_last, k_last), (t.x, k)))
        before, now, decay = (one[..., None, None] for one in (t.before, t.now, t.log_decay.exp()))
        S = decay * (S + before * last) + now * new
        y = q @ S.to(q.dtype).mT
        return self.read_out(y.to(t.x.dtype), t), (angles, S, k, t.x)

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, heads={self.n_heads}, "
            f"groups={self.n_groups}, rank={self.mimo_rank}"
        )


def trapezoidal_scan(
    x: Tensor, k: Tensor, q: Tensor, log_decay: Tensor, now: Tensor, before: Tensor, starts: Tensor | None = None
) -> Tensor:
    """Run the recurrence with two terms as an `ssd_scan`, which has one.

        S_t = a_t (S_{t-1} + before_t x_{t-1} k_{t-1}^T) + now_t x_t k_t^T,    y_t = S_t q_t

    The state ``T_t = S_t + before_{t+1} x_t k_t^T`` is that of ``T_t = a_t T_{t-1} + (now_t + before_{t+1}) x_t
    k_t^T``, so that ``y_t = T_t q_t - before_{t+1} (k_t . q_t) x_t``.

    Args:
        x: shape ``(batch, length, heads, rank, p)``.
        k, q: shape ``(batch, length, heads, rank, n)``. Every query reads what was stored under every key.
        log_decay, now, before: shape ``(batch, length, heads)``.
        starts: True where a sequence begins in a row that holds several, shape ``(batch, length)``.

    Returns:
        shape ``(batch, length, heads, rank, p)``.
    """
    rank = k.shape[3]
    ahead = before if starts is None else before.masked_fill(starts[..., None], 0)
    ahead = F.pad(ahead[:, 1:], (0, 0, 0, 1))  # of the next step; the last one needs none

    def every(v: Tensor, axis: int) -> Tensor:
        """Heads times keys times queries as heads of the scan."""
        return v.unsqueeze(axis).expand(*v.shape[:3], rank, rank, v.shape[-1]).flatten(2, 4)

    def by_head(v: Tensor) -> Tensor:
        return v[..., None, None].expand(*v.shape, rank, rank).flatten(2)

    values, keys, queries = every(x, 4), every(k.to(x.dtype), 4), every(q.to(x.dtype), 3)
    y = ssd_scan(values, by_head(log_decay), keys, queries, delta=by_head(now + ahead), starts=starts)
    if rank == 1:
        return y.unsqueeze(3) - (ahead[..., None, None] * (q * k).sum(-1, keepdim=True)).to(x.dtype) * x
    products = q @ k.mT  # of every query with every key
    return y.unflatten(2, (-1, rank, rank)).sum(3) - (ahead[..., None, None] * products).to(x.dtype) @ x


__all__ = ["NORM_EPS", "Mamba3", "Sizes", "State", "Terms", "normalised", "rotated", "terms", "trapezoidal_scan"]
