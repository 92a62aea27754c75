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
        B_names, C_names: names of real and imaginary part, with the states along axis 0 and 1.
    """

    per_state: tuple[str, ...]
    B_names: tuple[str, str] = ("B_re", "B_im")
    C_names: tuple[str, str] = ("C_re", "C_im")

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
        # B_old = diag(1/scale_old) right diag(scale_new) B_new on the kept subspace, and C_old = C_new left, in the
        # stacked coordinates (Re, Im) for B and (Re, -Im) for C.
        for_B = _scaled(scale_new.conj(), _scaled(1 / scale_old, reduction.right).T)
        r, n = reduction.system.n, scale_old.shape[0]
        sign_new, sign_old = torch.ones(2 * r, dtype=torch.float64), torch.ones(2 * n, dtype=torch.float64)
        sign_new[r:], sign_old[n:] = -1, -1
        for_C = sign_new[:, None] * reduction.left * sign_old
        share = participation(reduction)

        def part(names: tuple[str, ...], new: tuple[Tensor, ...], axis: int, pullback: Tensor) -> ParameterChange:
            squared = pullback if len(names) == 1 else pullback.square()
            cast = tuple(x.to(values[name]) for name, x in zip(names, new, strict=True))
            return ParameterChange(names, cast, axis, pullback, squared)

        return LayerChange(
            (
                *(part((name,), (new,), 0, share) for name, new in zip(self.per_state, per_state, strict=True)),
                part(self.B_names, (B.real, B.imag), 0, for_B),
                part(self.C_names, (C.real, C.imag), 1, for_C),
            ),
            {},
        )

    def state_dim(self, layer: nn.Module) -> int:
        return layer.get_parameter(self.per_state[0]).shape[0]

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        values = layer_values(layer)
        n, changes = self.state_dim(layer), list[ParameterChange]()
        for name, axis in (*((k, 0) for k in (*self.per_state, *self.B_names)), *((k, 1) for k in self.C_names)):
            shape = list(values[name].shape)
            shape[axis] = states
            nothing = torch.zeros(states, n, dtype=torch.float64)
            changes.append(ParameterChange((name,), (values[name].new_zeros(shape),), axis, nothing, nothing))
        return LayerChange(tuple(changes), {})


def participation(reduction: Reduction) -> Tensor:
    """Share of every old mode in every new one, shape ``(r, n)``, rows adding up to one.

    To first order an eigenvalue moves by ``d lam'_j = sum_i left_ji right_ij d lam_i``: the participation factors of
    Perez-Arriaga, Verghese and Schweppe (1982).
    """
    r, n = reduction.left.shape[0] // 2, reduction.left.shape[1] // 2
    share = (reduction.left * reduction.right.T).view(2, r, 2, n).sum((0, 2)).abs()
    return share / share.sum(1, keepdim=True).clamp_min(1e-300)


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


def _scaled(diagonal: Tensor, stacked: Tensor) -> Tensor:
    """``diag(d)``, real or complex, on columns ``(Re x, Im x)``. The transposed map has the conjugate of ``d``."""
    scaled = diagonal[:, None] * torch.complex(*stacked.chunk(2))
    return torch.cat([scaled.real, scaled.imag])


__all__ = ["DiagonalAdapter", "participation", "row_norm_kept"]
