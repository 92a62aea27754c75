"""What all layers with one complex diagonal system have in common when a smaller one is written into them.

Their parameters live along the state: one number per state for the eigenvalues, rows of B, columns of C. Their
optimizer state is carried over through the projection ``left, right`` (``x_new = left x_old``), in the stacked real
coordinates ``(Re x, Im x)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compressm.adapters.base import Adapter, LayerChange, ParameterChange, layer_values
from compressm.balancing import Reduction


class DiagonalAdapter(Adapter):
    """Base of the adapters of such layers.

    Attributes:
        per_state: names of the parameters with one number per state.
        B_names, C_names: names of real and imaginary part.
        axes: the state axis of each of them.
    """

    per_state: tuple[str, ...]
    B_names: tuple[str, ...] = ("B_re", "B_im")
    C_names: tuple[str, ...] = ("C_re", "C_im")

    @property
    def axes(self) -> dict[str, int]:
        return {**dict.fromkeys((*self.per_state, *self.B_names), 0), **dict.fromkeys(self.C_names, 1)}

    def change(
        self,
        values: Mapping[str, Tensor],
        reduction: Reduction,
        per_state: Sequence[Tensor],
        B: Tensor,
        C: Tensor,
        scale_old: Tensor,
        scale_new: Tensor,
    ) -> LayerChange:
        """The change that writes these parameters.

        Args:
            values: the layer's, as it is.
            reduction: the reduction, already in the scale that is written.
            per_state: new values of ``per_state``, in order.
            B, C: new values, complex, of shapes ``(r, p)`` and ``(q, r)``.
            scale_old, scale_new: by what the layer multiplies the rows of its B before the recurrence, complex or
                real, of shapes ``(n,)`` and ``(r,)``.
        """
        # B_old = diag(1/scale_old) right diag(scale_new) B_new on the kept subspace.
        for_B = scaled(scale_new.conj(), scaled(1 / scale_old, reduction.right).mT)
        share, for_C = participation(reduction), pullback_of_C(reduction)
        return LayerChange(
            (
                *(
                    self.part(values, (name,), (new,), share)
                    for name, new in zip(self.per_state, per_state, strict=True)
                ),
                self.part(values, self.B_names, (B.real, B.imag), for_B),
                self.part(values, self.C_names, (C.real, C.imag), for_C),
            ),
            {},
        )

    def part(
        self, values: Mapping[str, Tensor], names: tuple[str, ...], new: tuple[Tensor, ...], pullback: Tensor
    ) -> ParameterChange:
        """What is written into some parameters. Averages keep their weights for squares; changes of basis are
        squared."""
        squared = pullback if len(names) == 1 else pullback.square()
        cast = tuple(x.to(values[name]) for name, x in zip(names, new, strict=True))
        return ParameterChange(names, cast, self.axes[names[0]], pullback, squared)

    def state_dim(self, layer: nn.Module) -> int:
        name = self.per_state[0]
        return layer.get_parameter(name).shape[self.axes[name]]

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        values = layer_values(layer)
        nothing, changes = torch.zeros(states, self.state_dim(layer), dtype=torch.float64), list[ParameterChange]()
        for name, axis in self.axes.items():
            shape = list(values[name].shape)
            shape[axis] = states
            changes.append(ParameterChange((name,), (values[name].new_zeros(shape),), axis, nothing, nothing))
        return LayerChange(tuple(changes), {})


def participation(reduction: Reduction) -> Tensor:
    """Share of every old mode in every new one, shape ``(*batch, r, n)``, rows adding up to one.

    To first order an eigenvalue moves by ``d lam'_j = sum_i left_ji right_ij d lam_i``: the participation factors of
    Perez-Arriaga, Verghese and Schweppe (1982).
    """
    products = reduction.left * reduction.right.mT
    r, n = products.shape[-2] // 2, products.shape[-1] // 2
    share = products.unflatten(-1, (2, n)).unflatten(-3, (2, r)).sum((-4, -2)).abs()
    return share / share.sum(-1, keepdim=True).clamp_min(1e-300)


def pullback_of_C(reduction: Reduction) -> Tensor:
    """Maps gradients on ``(Re C, Im C)``, shape ``(*batch, 2r, 2n)``: ``C_old = C_new left`` in the stacked coordinates
    ``(Re, -Im)``."""
    left = reduction.left.clone()
    r, n = left.shape[-2] // 2, left.shape[-1] // 2
    left[..., :r, n:] *= -1
    left[..., r:, :n] *= -1
    return left


def row_norm_kept(reduction: Reduction, old_B: Tensor, scale: Tensor) -> Reduction:
    """The reduction in the scale in which all rows of the new B are equally long, and as long in sum as the old ones.

    Adam moves every entry of ``C`` by about the same step, and the output then moves in proportion to the sum of the
    states' amplitudes: with that sum kept, the smaller layer goes on learning at the pace of the larger one. With the
    norms themselves kept it would slow down as states go.

    Args:
        reduction: in any scale.
        old_B: the layer's own, complex, shape ``(n, p)``.
        scale: by what the layer will multiply the rows of the new B, shape ``(r,)``.
    """
    wanted = old_B.norm(dim=1).sum() / scale.shape[0] * scale.abs()
    norm = reduction.system.B.norm(dim=1)
    return reduction.rescaled(torch.where(norm > 0, wanted / norm, 1.0).clamp_min(1e-300))


def scaled(diagonal: Tensor, stacked: Tensor) -> Tensor:
    """``diag(d)``, real or complex, on columns ``(Re x, Im x)``. The transposed map has the conjugate of ``d``."""
    product = diagonal[..., :, None] * torch.complex(*stacked.chunk(2, -2))
    return torch.cat([product.real, product.imag], -2)


__all__ = ["DiagonalAdapter", "participation", "pullback_of_C", "row_norm_kept", "scaled"]
