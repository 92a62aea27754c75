"""Residual blocks: a norm, a state space layer, and a mix of its channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from compressm.layers.activations import unhooked
from compressm.layers.bidirectional import Bidirectional
from compressm.layers.hyena import Hyena
from compressm.layers.linear_attention import DeltaNet, GatedLinearAttention, LinearAttention
from compressm.layers.lru import LRU
from compressm.layers.mamba import Mamba
from compressm.layers.mamba2 import Mamba2
from compressm.layers.mamba3 import Mamba3
from compressm.layers.narrow import batch_norm, gated_residual
from compressm.layers.padding import ends
from compressm.layers.rg_lru import RecurrentBlock
from compressm.layers.s4 import S4
from compressm.layers.s4d import S4D
from compressm.layers.s5 import S5

# Layers without a gate. Their block, `GLUBlock`, has one.
TIME_INVARIANT: dict[str, Callable[..., Any]] = {"lru": LRU, "s5": S5, "s4": S4, "s4d": S4D}
GATED: dict[str, Callable[..., Any]] = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "linear_attention": LinearAttention,
    "gated_linear_attention": GatedLinearAttention,
    "delta_net": DeltaNet,
    "rg_lru": RecurrentBlock,
    "hyena": Hyena,
}


class SequenceBatchNorm(nn.BatchNorm1d):
    """Batch norm of ``(batch, length, channels)``, with statistics over batch and time.

    In evaluation mode it also takes one step ``(batch, channels)``, which the running statistics normalise.
    """

    def forward(self, input: Tensor, present: Tensor | None = None) -> Tensor:
        """The normalised input. ``present``, bool, shape ``(batch, length)``, is False at padding. In training the
        statistics leave padding out, and its output is zero."""
        if present is None or not self.training:
            return self.with_input(input)[0]
        rows = batch_norm(self, input[present])[0]
        return rows.new_zeros(input.shape).index_put(present.nonzero(as_tuple=True), rows)

    def with_input(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised input, and the input itself for a residual connection; see `batch_norm`."""
        if input.ndim == 2 and self.training:
            raise RuntimeError("a single step has no batch statistics over time: call model.eval() before model.step()")
        return batch_norm(self, input)


def normed(norm: nn.Module, u: Tensor, present: Tensor | None) -> Tensor:
    """``norm(u)``. Only a norm with statistics over time is told which places are padding."""
    return norm(u) if present is None or not isinstance(norm, SequenceBatchNorm) else norm(u, present)


def _recur(layer: nn.Module, z: Tensor, present: Tensor | None) -> Tensor:
    """``layer(z)``. Only a layer that reads backwards is told where sequences end."""
    backwards = isinstance(layer, Bidirectional) or (isinstance(layer, S5) and layer.bidirectional)
    if present is None or not backwards:
        return layer(z)
    return layer(z, ends(present).clamp_min(1))  # a row that holds only padding is reversed as one step


def sequence_norm(kind: str, width: int) -> nn.Module:
    """``"batch"`` (over batch and time, as in the CompreSSM paper's models), ``"layer"`` or ``"rms"``."""
    kinds = {"batch": SequenceBatchNorm, "layer": nn.LayerNorm, "rms": lambda width: nn.RMSNorm(width, eps=1e-5)}
    if kind not in kinds:
        raise ValueError(f"norm must be one of {', '.join(kinds)}; got {kind!r}")
    return kinds[kind](width)


class GLUBlock(nn.Module):
    """Norm, a time-invariant layer, GELU, GLU, with dropout, around a residual connection (Orvieto et al. 2023, figure
    1; the blocks of S4D and S5 have the same form).

        z = GELU(layer(norm(u)));   v = W1 z;   out = u + dropout(v * sigmoid(W2 z))

    Args:
        layer: a key of `TIME_INVARIANT`.
        d_model: width H.
        d_state: state dimension n.
        dropout: probability of dropping an activation, after the GELU and after the GLU.
        norm: see `sequence_norm`.
        options: of that layer.
    """

    def __init__(
        self, layer: str, d_model: int, d_state: int, dropout: float = 0.1, norm: str = "batch", **options: Any
    ) -> None:
        super().__init__()
        self.norm = sequence_norm(norm, d_model)
        self.ssm = TIME_INVARIANT[layer](d_model, d_state, **options)
        self.glu = nn.Linear(d_model, 2 * d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, u: Tensor, present: Tensor | None = None) -> Tensor:
        """The block's output, of the shape of the input. Its values at padding are meaningless.

        Args:
            u: input, shape ``(batch, length, d_model)``.
            present: False at padding, bool, shape ``(batch, length)``; None if there is no padding.
        """
        if present is None and isinstance(self.norm, SequenceBatchNorm) and unhooked(self.norm):
            z, u = self.norm.with_input(u)
        else:
            z = normed(self.norm, u, present)
        return gated_residual(u, _recur(self.ssm, z, present), self.glu, self.dropout.p, self.training)

    def initial_state(self, batch: int) -> Tensor:
        """The zero state of `step`."""
        return self.ssm.initial_state(batch)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to the output of the same shape, and the next state."""
        z, state = self.ssm.step(self.norm(u), state)
        return gated_residual(u, z, self.glu, self.dropout.p, self.training), state


class ResidualBlock(nn.Module):
    """Norm and a layer around a residual connection: ``out = u + dropout(layer(norm(u)))``.

    Args:
        layer: a key of `GATED`.
        d_model: width.
        d_state: state dimension n.
        dropout: probability of dropping an activation.
        norm: see `sequence_norm`.
        options: of that layer.
    """

    def __init__(
        self, layer: str, d_model: int, d_state: int, dropout: float = 0.0, norm: str = "rms", **options: Any
    ) -> None:
        super().__init__()
        self.norm = sequence_norm(norm, d_model)
        self.ssm = GATED[layer](d_model, d_state, **options)
        self.dropout = nn.Dropout(dropout)

    def forward(self, u: Tensor, present: Tensor | None = None) -> Tensor:
        """The block's output; see `GLUBlock.forward`."""
        return u + self.dropout(_recur(self.ssm, normed(self.norm, u, present), present))

    def initial_state(self, batch: int) -> Any:
        """The zero state of `step`."""
        return self.ssm.initial_state(batch)

    def step(self, u: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to the output of the same shape, and the next state."""
        z, state = self.ssm.step(self.norm(u), state)
        return u + self.dropout(z), state


def build_blocks(
    layer: str, d_model: int, dims: Sequence[int], dropout: float, norm: str | None, options: dict[str, Any]
) -> nn.ModuleList:
    """A stack of blocks with state dimensions ``dims``. If ``norm`` is None, the norm depends on the layer."""
    if layer in TIME_INVARIANT:
        return nn.ModuleList(GLUBlock(layer, d_model, n, dropout, norm or "batch", **options) for n in dims)
    if layer not in GATED:
        raise ValueError(f"layer must be one of {', '.join((*TIME_INVARIANT, *GATED))}; got {layer!r}")
    return nn.ModuleList(ResidualBlock(layer, d_model, n, dropout, norm or "rms", **options) for n in dims)


__all__ = [
    "GATED",
    "TIME_INVARIANT",
    "GLUBlock",
    "ResidualBlock",
    "SequenceBatchNorm",
    "build_blocks",
    "normed",
    "sequence_norm",
]
