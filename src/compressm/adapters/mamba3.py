"""Mamba-3 layers, ours and those of the authors' package ``mamba_ssm``.

Norms, biases and rotations stand between the projection and the recurrence, so states are removed: in pairs, which
rotate by one angle, the same pairs in every head, since the heads share the angles, and in two classes where only half
of the pairs rotate, since the layer's class derives the number of angles from the number of states. A cut takes rows
of ``in_proj`` (of B, C and the angles), and entries of the biases and of the norms' weights.

B and C are divided by the root mean square of their entries, of which a cut leaves some. So the weights of the norms
are multiplied by the root mean square that the kept entries had before, in the mean over the data.

A token stores up to twice ``rank`` keys, those of the preceding token and its own, and reads ``rank`` times. In the
signals each of these is a step by itself, so that the moments are exact: the keys of the preceding token, the decay
with the first own key, the others, and a reading after all of them. With several ranks the readings are added up
before the output. Their errors are counted one by one, as if they were independent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.base import SelectiveAdapter
from compressm.adapters.changes import LayerChange, layer_values, selection_change
from compressm.adapters.composed import effective_weight
from compressm.adapters.hf_base import HuggingFaceAdapter
from compressm.adapters.hf_mamba import times
from compressm.adapters.mamba_ssm import SSMConfig
from compressm.adapters.unit_cuts import UnitCuts, first_units
from compressm.errors import InvalidSystemError, UnsupportedModelError
from compressm.layers.mamba3 import Mamba3, Sizes, Terms, normalised, rotated, terms
from compressm.theory.balanced import Balanced
from compressm.theory.fisher import MaskFisher
from compressm.theory.geometry import Geometry
from compressm.theory.recurrence import SelectiveBalancing, SelectiveReduction, Signals, first_states
from compressm.theory.selection import Selection
from compressm.theory.units import Units


class Mamba3Adapter(SelectiveAdapter):
    """Keeps whole pairs of states, the same ones in all heads."""

    layer_type = Mamba3
    entrance = "in_proj"
    sorts = False

    def sizes(self, layer: nn.Module) -> Sizes:
        """The layer's sizes."""
        assert isinstance(layer, Mamba3)
        return layer.sizes

    def signals(self, layer: nn.Module, hidden: Tensor) -> Signals:
        module: Any = layer
        sizes, values, projected = self.sizes(layer), layer_values(layer), module.in_proj(hidden)
        t = terms(projected, values, sizes)
        x, z = _by_rank(t.x, values.get("mimo_x")), _by_rank(t.z, values.get("mimo_z"))
        gain = F.silu(z) * effective_weight(module.out_proj).norm(dim=0).view(sizes.heads, 1, -1)
        # The norm before the gate divides the channels of a head by one number. The gain leaves that number out.
        if "norm.weight" in values:
            gain = gain * values["norm.weight"].view(sizes.heads, 1, -1)
        gain = gain * values["mimo_o"] if "mimo_o" in values else gain
        found = _in_substeps(t, x, gain, sizes)
        return replace(found, squares=_squares(projected, values, sizes))

    def geometry(self, layer: nn.Module) -> Geometry:
        """Beside the state, the layer keeps the last token's keys and values, and the angles."""
        found, sizes = super().geometry(layer), self.sizes(layer)
        beside = found.channels + sizes.heads * (sizes.rank * sizes.states + sizes.angles)
        return replace(
            found, kind="rotated", groups=sizes.groups * sizes.rank, heads=sizes.heads, convolved=beside, window=1,
            window_dtype=found.state_dtype,
        )  # fmt: skip

    def cuts(
        self,
        layer: nn.Module,
        balanced: Balanced,
        selection: Selection = "hankel",
        fisher: MaskFisher | None = None,
    ) -> UnitCuts:
        """Selections of pairs of states; see `UnitCuts`."""
        if not isinstance(balanced, SelectiveBalancing):
            raise InvalidSystemError(f"{type(layer).__name__} was not balanced by its adapter")
        units = units_of(self.sizes(layer))
        return UnitCuts(layer_values(layer), balanced, selection, self.planned(layer), fisher, units)

    def plan(self, values: Mapping[str, Tensor], reduction: SelectiveReduction) -> LayerChange:
        assert reduction.kept is not None
        kept, layout = reduction.kept[0], _Layout.of(values)
        if not bool((reduction.kept == kept).all()) or not layout.possible(kept):
            raise UnsupportedModelError(
                "Mamba-3 keeps whole pairs of states, the same ones in every head, and the same share of those that "
                "rotate: choose them by the cuts of its adapter"
            )
        factors = layout.factors(reduction, kept)
        changes = [
            selection_change("in_proj.weight", values["in_proj.weight"], 0, layout.rows(kept)),
            *(selection_change(f"{name}_bias", values[f"{name}_bias"], 2, kept) for name in "BC"),
            *(
                times(selection_change(f"{name}_norm.weight", values[f"{name}_norm.weight"], 0, kept), factor)
                for name, factor in zip("BC", factors, strict=True)
            ),
        ]
        return LayerChange(tuple(changes), self.attributes(len(kept), len(layout.rows(kept)), layout.angles(kept)))

    def attributes(self, states: int, rows: int, angles: Tensor) -> dict[str, Any]:
        """Attributes of the layer and its submodules that tell its sizes."""
        del angles
        shapes = {f"{name}_norm.normalized_shape": (states,) for name in "BC"}
        return {"in_proj.out_features": rows, **shapes}

    def state_dim(self, layer: nn.Module) -> int:
        return self.sizes(layer).states

    def unit(self, layer: nn.Module) -> int:
        return units_of(self.sizes(layer)).least

    def resized(self, layer: nn.Module, states: int) -> LayerChange:
        sizes = self.sizes(layer)
        units = units_of(sizes)
        if states % units.least:
            raise UnsupportedModelError(
                f"{type(layer).__name__} with {states} states: the number of states must be a multiple of "
                f"{units.least}, since they rotate in pairs"
            )
        return self.plan(layer_values(layer), first_units(first_states(sizes.states, states, sizes.heads), units))


class MambaSSM3Adapter(SSMConfig, HuggingFaceAdapter, Mamba3Adapter):
    """``mamba_ssm.modules.mamba3.Mamba3``."""

    state_dtype = torch.float32

    def sizes(self, layer: nn.Module) -> Sizes:
        m: Any = layer
        if (found := m.rotary_dim_divisor * m.num_rope_angles) != m.d_state:
            raise UnsupportedModelError(
                f"{type(layer).__name__} with d_state={m.d_state} and {m.num_rope_angles} angles: expected {found} "
                "states, so that pairs can be removed"
            )
        return Sizes(
            m.nheads, m.num_bc_heads, m.mimo_rank, m.d_state, m.num_rope_angles, bool(m.is_mimo), float(m.A_floor)
        )

    def attributes(self, states: int, rows: int, angles: Tensor) -> dict[str, Any]:
        sizes = {"d_state": states, "split_tensor_size": 2 * len(angles), "num_rope_angles": len(angles)}
        return {"in_proj.out_features": rows, **sizes}


def units_of(sizes: Sizes) -> Units:
    """The pairs of a layer: those that rotate, and those that do not."""
    n, pairs = sizes.states, torch.arange(sizes.states // 2)
    members = torch.stack([pairs, pairs + n // 2] if sizes.halves else [2 * pairs, 2 * pairs + 1], 1)
    return Units(members.view(-1, sizes.angles, 2))


@dataclass(frozen=True)
class _Layout:
    """Where the parameters of a layer have their states, read off their shapes."""

    inner: int
    heads: int
    blocks: int  # of n rows each for B, and as many for C
    states: int
    angle_count: int
    halves: bool
    total: int

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> _Layout:
        heads, rank, n = values["B_bias"].shape
        inner, total = values["out_proj.weight"].shape[1], values["in_proj.weight"].shape[0]
        rest = total - 2 * inner - 3 * heads  # 2 rank groups n + angles, and angles <= n / 2
        groups, angles = divmod(rest, 2 * rank * n)
        return cls(inner, heads, rank * groups, n, angles, "mimo_x" in values, total)

    def possible(self, kept: Tensor) -> bool:
        """Whether states, ascending, are whole pairs, and as large a share of those that rotate as of all."""
        half = self.states // 2
        partners = (kept + half) % self.states if self.halves else kept + 1 - 2 * (kept % 2)
        whole = torch.equal(partners.sort().values, kept.sort().values)
        return whole and len(self.angles(kept)) * self.states == self.angle_count * len(kept)

    def angles(self, kept: Tensor) -> Tensor:
        """The angles of kept states, ascending."""
        first = kept[kept < self.states // 2] if self.halves else kept[kept % 2 == 0] // 2
        return first[first < self.angle_count]

    def rows(self, kept: Tensor) -> Tensor:
        """The kept rows of the input projection: ``[z, x, B, C, dt, a, mix, angle]``."""
        vectors = 2 * self.inner + (torch.arange(2 * self.blocks)[:, None] * self.states + kept).flatten()
        scalars = torch.arange(self.total - self.angle_count - 3 * self.heads, self.total - self.angle_count)
        angles = self.total - self.angle_count + self.angles(kept)
        return torch.cat([torch.arange(2 * self.inner), vectors, scalars, angles])

    def factors(self, reduction: SelectiveReduction, kept: Tensor) -> tuple[float, float]:
        """The root mean square of the kept entries of B and C under the norm of all; ones where it is not known."""
        squares = None if reduction.moments is None else reduction.moments.squares
        if squares is None:
            return 1.0, 1.0
        b, c = (squares[:, kept].mean(1) / squares.mean(1).clamp_min(1e-300)).sqrt().tolist()
        return b or 1.0, c or 1.0


def _by_rank(v: Tensor, weights: Tensor | None) -> Tensor:
    """Values or gates of every rank, shape ``(batch, length, heads, rank, p)``."""
    return v[..., None, :] if weights is None else v[..., None, :] * weights


def _squares(projected: Tensor, values: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
    """Squares of the normalised entries of B and C, in the mean over ranks and groups, for `Signals.squares`."""
    begin = 2 * values["out_proj.weight"].shape[1]
    parts = projected[..., begin : begin + 2 * sizes.keys].split(sizes.keys, -1)
    return torch.stack([normalised(part, sizes).square().mean((-3, -2)) for part in parts], -2)


def _in_substeps(t: Terms, x: Tensor, gain: Tensor, sizes: Sizes) -> Signals:
    """The signals, with a step for everything that a token stores or reads; see the module's text."""
    angles = t.turn.cumsum(1)
    k, q = (rotated(one, angles, sizes.halves) for one in (t.keys, t.queries))
    rank = sizes.rank

    def last(v: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(v[:, :1]), v[:, :-1]], 1)

    steps: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []  # x, step, B, C, gain
    still, silent = torch.zeros_like(t.log_decay), torch.zeros_like(gain[..., 0, :])
    nothing = torch.zeros_like(k[..., 0, :])
    for r in range(rank):
        stored = t.before[..., None] * last(x[..., r, :])
        steps.append((stored, still, last(k[..., r, :]), nothing, silent))
    for r in range(rank):
        reads = r == rank - 1
        decay = -t.log_decay if r == 0 else still
        read = (q[..., 0, :], gain[..., 0, :]) if reads else (nothing, silent)
        steps.append((t.now[..., None] * x[..., r, :], decay, k[..., r, :], *read))
    for r in range(1, rank):
        steps.append((torch.zeros_like(silent), still, nothing, q[..., r, :], gain[..., r, :]))
    columns = [torch.stack(column, 2).flatten(1, 2) for column in zip(*steps, strict=True)]
    values, decays, keys, queries, gains = columns
    by_channel = decays[..., None].expand_as(values).flatten(-2)
    ones = values.new_ones(1, 1)
    return Signals(
        values.flatten(-2), by_channel, ones, keys, queries, gains.flatten(-2), removed=True, substeps=len(steps)
    )


__all__ = ["Mamba3Adapter", "MambaSSM3Adapter", "units_of"]
