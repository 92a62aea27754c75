"""The common base of the adapters of layers with complex diagonal systems.

The parameters of such layers have a state axis: one number per state for the eigenvalues, rows of B, columns of C.
Their optimizer state is carried over through the projection ``left, right`` (``x_new = left x_old``), in the stacked
real coordinates ``(Re x, Im x)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressm.adapters.base import Adapter
from compressm.adapters.changes import LayerChange, ParameterChange, layer_values
from compressm.theory.balancing import Reduction
from compressm.theory.systems import DiagonalSystem, decay_rate

_OFF_THE_AXIS = 1e-6  # phase of a real mode, as a share of its decay rate; see `phases`


@dataclass(frozen=True)
class PerState:
    """New values of a parameter with one number per state, and how its gradients follow from those on the eigenvalues.

    With ``w = log|lam|`` and ``phi`` the phase of an eigenvalue, the gradient on such a parameter is the one on ``w``
    or ``phi`` times a factor that depends only on the state.

    Attributes:
        name: of the parameter.
        new: its new values, shape ``(*batch, r)``.
        factor_old, factor_new: that factor, at the old and the new states, up to a common constant.
        phase: whether the parameter moves the phase, whose gradient changes sign if a state becomes its conjugate.
        order: 1 if the parameter moves the eigenvalue; 0 if it scales the state.
    """

    name: str
    new: Tensor
    factor_old: Tensor
    factor_new: Tensor
    phase: bool = False
    order: int = 1


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
        per_state: Sequence[PerState],
        B: Tensor,
        C: Tensor,
        scale_old: Tensor,
        scale_new: Tensor,
    ) -> LayerChange:
        """The change that writes these parameters.

        Args:
            values: the layer's parameters and buffers before the change.
            reduction: the reduction, already in the scale that is written.
            per_state: new values of ``per_state``.
            B, C: new values, complex, of shapes ``(r, p)`` and ``(q, r)``.
            scale_old, scale_new: factors by which the layer multiplies the rows of its B before the recurrence, complex
                or real, of shapes ``(n,)`` and ``(r,)``.
        """
        # B_old = diag(1/scale_old) right diag(scale_new) B_new on the kept subspace.
        for_B = scaled(scale_new.conj(), scaled(1 / scale_old, reduction.right).mT)
        return LayerChange(
            (
                *self.eigenvalue_parts(values, reduction, per_state),
                self.part(values, self.B_names, (B.real, B.imag), for_B),
                self.part(values, self.C_names, (C.real, C.imag), pullback_of_C(reduction)),
            ),
            {},
        )

    def eigenvalue_parts(
        self, values: Mapping[str, Tensor], reduction: Reduction, per_state: Sequence[PerState]
    ) -> tuple[ParameterChange, ...]:
        """The changes of the parameters with one number per state, with the maps that carry their averages over.

        The new eigenvalues are not linear functions of the old ones, but the size of their gradients is known. A mode
        enters the loss as ``c (z - lam)^-1 b``. So a gradient on ``log lam`` grows with ``|b| |c| / (1 - |lam|)``, and
        one on the mode's scale with ``|b| |c|``. A mode merged from several old ones has the sum of their residues
        ``b c``, and gradients larger by as much. The old gradients are divided by their size, averaged by
        participation, and multiplied by the new size. Second moments use the squares of sizes and of shares, since
        gradients of several modes add up with signs that second moments do not hold (benchmarks/carry_figure.py
        compares with the gradients after a cut).
        """
        before, after = self.read(values), reduction.system
        share, signed = participation(reduction)
        squares = share.square() / share.square().sum(-1, keepdim=True).clamp_min(1e-300)
        parts: list[ParameterChange] = []
        for one in per_state:
            size_old = one.factor_old * _residue(before, one.order)
            size_new = one.factor_new * _residue(after, one.order)
            ratio = size_new[..., :, None] / torch.where(size_old > 0, size_old, math.inf)[..., None, :]
            parts.append(
                ParameterChange(
                    (one.name,),
                    (one.new.to(values[one.name]),),
                    self.axes[one.name],
                    (signed if one.phase else share) * ratio,
                    squares * ratio.square(),
                )
            )
        return tuple(parts)

    def part(
        self, values: Mapping[str, Tensor], names: tuple[str, ...], new: tuple[Tensor, ...], pullback: Tensor
    ) -> ParameterChange:
        """The change of the real and imaginary parts of a matrix, whose gradients transform with the basis."""
        cast = tuple(x.to(values[name]) for name, x in zip(names, new, strict=True))
        return ParameterChange(names, cast, self.axes[names[0]], pullback, pullback.square())

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


def participation(reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Share of every old mode in every new one, unsigned and signed: conjugates count negatively in the second.

    To first order ``d lam'_j = sum_i p_ji d lam_i + q_ji conj(d lam_i)``: the participation factors of Perez-Arriaga,
    Verghese and Schweppe (1982), for a real system whose modes stand for conjugate pairs. With ``x' = a x + b conj(x)``
    and ``x = c x' + d conj(x')`` they are ``p_ji = a_ji c_ij`` and ``q_ji = b_ji conj(d_ij)``.

    Returns:
        ``|p| + |q|`` and ``|p| - |q|``, shapes ``(*batch, r, n)``, both divided by the row sums of the first.
    """
    (a, b), (c, d) = _parts(reduction.left), _parts(reduction.right)
    p, q = (a * c.mT).abs(), (b * d.mT.conj()).abs()
    total = (p + q).sum(-1, keepdim=True).clamp_min(1e-300)
    return (p + q) / total, (p - q) / total


def phases(lam: Tensor) -> Tensor:
    """``arg lam``, with real eigenvalues moved slightly off the real axis.

    A truncation of a real system can have real modes. For a real eigenvalue with a real residue, the gradients on the
    phase and on the imaginary parts of B and C are exactly zero, so training could never make the state complex. A
    phase of a millionth of the decay rate is enough for these gradients to grow. It changes the impulse response by
    less than 1e-12 of the mode's energy.
    """
    phase, least = lam.angle(), _OFF_THE_AXIS * decay_rate(lam)
    phase = torch.where(phase.abs() < least, least, phase)
    return torch.where(phase.abs() > math.pi - least, math.pi - least, phase)


def _residue(system: DiagonalSystem, order: int) -> Tensor:
    """``|b| |c| / (1 - |lam|)^order`` of every mode."""
    return system.B.norm(dim=-1) * system.C.norm(dim=-2) / (1 - system.lam.abs()).clamp_min(1e-12) ** order


def _parts(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """A real linear map of ``(Re x, Im x)`` as ``x' = a x + b conj(x)``."""
    upper, lower = stacked.chunk(2, -2)
    (rr, ri), (ir, ii) = upper.chunk(2, -1), lower.chunk(2, -1)
    return torch.complex(rr + ii, ir - ri) / 2, torch.complex(rr - ii, ir + ri) / 2


def pullback_of_C(reduction: Reduction) -> Tensor:
    """Maps gradients on ``(Re C, Im C)``, shape ``(*batch, 2r, 2n)``: ``C_old = C_new left`` in the stacked coordinates
    ``(Re, -Im)``."""
    left = reduction.left.clone()
    r, n = left.shape[-2] // 2, left.shape[-1] // 2
    left[..., :r, n:] *= -1
    left[..., r:, :n] *= -1
    return left


def row_norm_kept(reduction: Reduction, old_B: Tensor, scale: Tensor) -> Reduction:
    """The reduction, rescaled so that all rows of the new B have the same norm, with the sum of the old rows' norms.

    Adam moves every entry of ``C`` by about the same step, so the output moves in proportion to the sum of the states'
    amplitudes. Keeping that sum keeps the layer's speed of learning. Keeping the norm of every row instead would slow
    it down as the number of states falls.

    Args:
        reduction: in any scale.
        old_B: the layer's own, complex, shape ``(n, p)``.
        scale: factors by which the layer will multiply the rows of the new B, shape ``(r,)``.
    """
    wanted = old_B.norm(dim=1).sum() / scale.shape[0] * scale.abs()
    norm = reduction.system.B.norm(dim=1)
    return reduction.rescaled(torch.where(norm > 0, wanted / norm, 1.0).clamp_min(1e-300))


def scaled(diagonal: Tensor, stacked: Tensor) -> Tensor:
    """Apply ``diag(d)``, real or complex, to columns ``(Re x, Im x)``. Its transpose has the conjugate of ``d``."""
    product = diagonal[..., :, None] * torch.complex(*stacked.chunk(2, -2))
    return torch.cat([product.real, product.imag], -2)


__all__ = ["DiagonalAdapter", "PerState", "participation", "phases", "pullback_of_C", "row_norm_kept", "scaled"]
