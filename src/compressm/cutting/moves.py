"""What a cut makes of the optimizer's state; `compressm.cutting.optimizer_state` has the kinds and their formulas.

All is computed before anything is written, from the parameters' present values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compressm.adapters.changes import ParameterChange
from compressm.cutting.optimizer_state import ABOUT, SECOND_MOMENTS, is_number
from compressm.cutting.quantised_state import is_quantised, read_state, write_state

Carry = Literal["transform", "slice", "reset"]
State = Mapping[str, Any]
Unknown = Callable[[str, int], Exception]


@dataclass(frozen=True)
class Basis:
    """The change of coordinates of parameters that are stacked along their state axis."""

    part: ParameterChange
    shapes: tuple[torch.Size, ...]  # before the cut

    def linear(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Carry gradients."""
        return self._moved(tensors, self.part.pullback)

    def quadratic(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Carry squares of gradients."""
        return self._moved(tensors, self.part.pullback_squared)

    def steps(self, tensors: Sequence[Tensor], moments: Sequence[Tensor] | None) -> list[Tensor]:
        """Carry sizes of steps, or their squares: averages, weighted by the share in the new second moments."""
        weights = [torch.ones_like(x) for x in tensors] if moments is None else moments
        sums = self.quadratic([x * w for x, w in zip(tensors, weights, strict=True)])
        return [torch.where(w > 0, x / w, 0) for x, w in zip(sums, self.quadratic(weights), strict=True)]

    def direction(self, tensors: Sequence[Tensor], moments: Sequence[Tensor] | None) -> list[Tensor]:
        """Carry gradients that were divided by the roots of second moments; of none if ``moments`` is None."""
        if moments is None:
            return self.linear(tensors)
        moved = self.linear([x * v.sqrt() for x, v in zip(tensors, moments, strict=True)])
        roots = [v.sqrt() for v in self.quadratic(moments)]
        return [torch.where(root > 0, x / root, 0) for x, root in zip(moved, roots, strict=True)]

    def kept(self) -> Tensor | None:
        """The entries along the state axis that stay, if the cut only selects; None otherwise."""
        matrix = self.part.pullback
        if matrix.ndim != 2:
            return None
        if matrix.layout != torch.strided:
            matrix = matrix.coalesce()
            rows, columns = matrix.indices()
            whole = bool((matrix.values() == 1).all()) and torch.equal(rows, torch.arange(matrix.shape[0]))
            return columns if whole else None
        chosen = matrix != 0
        whole = bool((chosen.sum(1) == 1).all()) and bool((matrix[chosen] == 1).all())
        return chosen.int().argmax(1) if whole else None

    def select(self, tensors: Sequence[Tensor], kept: Tensor) -> list[Tensor]:
        """Carry anything through a cut that only selects."""
        axis, stacked = self.part.axis, tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), self.part.axis)
        return list(stacked.index_select(axis, kept.to(stacked.device)).chunk(len(tensors), axis))

    def _moved(self, tensors: Sequence[Tensor], matrix: Tensor) -> list[Tensor]:
        axis = self.part.axis
        stacked = torch.cat(list(tensors), axis)
        if matrix.ndim > 2:  # one change of basis for each index before the state axis
            flat = stacked.flatten(axis + 1) if stacked.ndim > axis + 1 else stacked[..., None]
            moved = matrix @ flat
            moved = moved.view(*moved.shape[: axis + 1], *stacked.shape[axis + 1 :])
        else:
            by_state = stacked.movedim(axis, 0)
            flat = by_state.flatten(1) if by_state.ndim > 1 else by_state
            moved = (matrix @ flat).view(-1, *by_state.shape[1:]).movedim(0, axis)
        return list(moved.chunk(len(tensors), axis))


class PartStates:
    """The state of the parameters of one change, before the cut, and after it.

    Args:
        part: the change. Its parameters may be real and imaginary part of one matrix.
        olds: the parameters' values before the cut.
        states: what the optimizer keeps for them. One of a pair may have no state, since it is frozen or had no
            gradient; its averages are zero.
        kinds: of the optimizer's state.
        fresh: ``fresh(i)`` returns the state that the optimizer makes for parameter ``i`` after the cut.
        unknown: ``unknown(key, i)`` returns the error about an entry of unknown kind.
    """

    def __init__(
        self,
        part: ParameterChange,
        olds: Sequence[Tensor],
        states: Sequence[State],
        kinds: Mapping[str, str],
        fresh: Callable[[int], State],
        unknown: Unknown,
    ) -> None:
        self._part, self._kinds, self._fresh, self._unknown = part, kinds, fresh, unknown
        self._nothing = [{key: None for key, value in state.items() if value is None} for state in states]
        self._states = [{key: value for key, value in state.items() if value is not None} for state in states]
        self._olds = [old.detach() for old in olds]
        self._basis = Basis(part, tuple(old.shape for old in olds))
        self._kept = self._basis.kept()

    def carried(self) -> list[dict[str, Any]]:
        """The states after the cut, in the order of the parameters."""
        keys = sorted({key for state in self._states for key in state})
        moved = {key: self._after(key) for key in keys if not self._stays(key)}
        return [self._stored(i, {key: values[i] for key, values in moved.items()}) for i in range(len(self._states))]

    def _stays(self, key: str) -> bool:
        """Whether an entry is a number that no cut changes.

        Raises:
            UnsupportedOptimizerError: its kind is not known.
        """
        stays = self._kinds.get(key, "fresh") == "fresh"
        for i, state in enumerate(self._states):
            known = is_number(state.get(key)) if key not in self._kinds else isinstance(state.get(key, 0.0), Tensor)
            if key in state and not (known or self._kinds.get(key) == "fresh"):
                raise self._unknown(key, i)
        return stays

    def _after(self, key: str) -> list[Tensor]:
        """An entry after the cut, of the new parameters' shapes or those of factors."""
        kind = self._kinds[key]
        if kind in ("rows", "columns", "blocks"):
            return self._reduced(key)
        if self._kept is not None and kind != "value":
            return self._basis.select(self._spread(key, exact=True), self._kept)
        olds, basis = self._spread(key), self._basis
        if kind == "value":
            return self._values(olds)
        if kind == "linear":
            return basis.linear(olds)
        if kind.startswith(ABOUT):
            return self._about(olds, kind.removeprefix(ABOUT))
        if kind == "direction":
            return basis.direction(olds, self._second_moments())
        if kind == "step":
            return basis.steps(olds, self._second_moments())
        if kind == "magnitude":
            return [x.sqrt() for x in basis.quadratic([x.square() for x in olds])]
        return basis.quadratic(olds)

    def _values(self, olds: list[Tensor]) -> list[Tensor]:
        news, before = _wide(self._part.values), _wide(self._olds)
        if self._kept is not None:
            chosen, present = (self._basis.select(x, self._kept) for x in (olds, before))
            return [x + (new - old) for x, new, old in zip(chosen, news, present, strict=True)]
        away = [x - old for x, old in zip(olds, before, strict=True)]
        moved = self._basis.direction(away, self._second_moments())
        return [new + x for new, x in zip(news, moved, strict=True)]

    def _about(self, olds: list[Tensor], mean: str) -> list[Tensor]:
        if not any(mean in state for state in self._states):
            return self._basis.quadratic(olds)
        means = self._spread(mean)
        variances = [v - m.square() for v, m in zip(olds, means, strict=True)]
        pairs = zip(self._basis.quadratic(variances), self._basis.linear(means), strict=True)
        return [v.clamp_min(0) + m.square() for v, m in pairs]

    def _reduced(self, key: str) -> list[Tensor]:
        """A factor of second moments after the cut, or the means over blocks."""
        if self._kinds[key] == "blocks":
            moments = self._moments_after(key)
            counts = [self._fresh(i)[key].numel() for i in range(len(moments))]
            return [v.reshape(count, -1).mean(1) for v, count in zip(moments, counts, strict=True)]
        over = -1 if self._kinds[key] == "rows" else -2
        if over % len(self._basis.shapes[0]) != self._part.axis and self._part.pullback.ndim == 2:
            factors = [self._factor(key, i) for i in range(len(self._states))]  # means over another axis are linear
            if all(x is not None for x in factors):
                return self._basis.quadratic([x for x in factors if x is not None])
        return [v.mean(over, keepdim=True) for v in self._moments_after(key)]

    def _moments_after(self, key: str) -> list[Tensor]:
        return self._basis.quadratic(self._second_moments(self._partner(key)) or [])

    def _factor(self, key: str, i: int) -> Tensor | None:
        """Rows or columns with the mean's axis as one of length 1."""
        if key not in self._states[i]:
            return None
        kind, shape, value = self._kinds[key], list(self._basis.shapes[i]), read_state(self._states[i], key)
        shape[-1 if kind == "rows" else -2] = 1
        if value.numel() != torch.Size(shape).numel():
            raise self._unknown(key, i)
        return value.reshape(shape)

    def _partner(self, key: str) -> tuple[str, ...]:
        """The keys that make up the second moments which an entry is a factor of."""
        if self._kinds[key] == "blocks":
            return (key,)
        rows = [name for name, kind in self._kinds.items() if kind == "rows"]
        columns = [name for name, kind in self._kinds.items() if kind == "columns"]
        place = (rows if self._kinds[key] == "rows" else columns).index(key)
        return rows[place], columns[place]

    def _second_moments(self, keys: tuple[str, ...] = ()) -> list[Tensor] | None:
        """Second moments of the parameters' shapes: those of ``keys``, by default the first that the state has."""
        if not keys:
            present = [key for key in self._kinds if any(key in state for state in self._states)]
            found = [key for key in present if self._kinds[key].partition(" ")[0] in SECOND_MOMENTS]
            if not found:
                return None
            keys = self._partner(found[0]) if self._kinds[found[0]] in ("rows", "columns", "blocks") else (found[0],)
        return [self._expanded(keys, i) for i in range(len(self._states))]

    def _expanded(self, keys: tuple[str, ...], i: int) -> Tensor:
        shape, state = self._basis.shapes[i], self._states[i]
        if keys[0] not in state:
            return torch.zeros(shape, dtype=torch.float64)
        kind = self._kinds[keys[0]]
        if kind == "blocks":
            value = read_state(state, keys[0]).flatten()
            if shape.numel() % value.numel():
                raise self._unknown(keys[0], i)
            return value.repeat_interleave(shape.numel() // value.numel()).view(shape)
        if kind == "rows":
            rows, columns = (self._factor(key, i) for key in keys)
            assert rows is not None
            assert columns is not None
            mean = rows.mean(-2, keepdim=True)
            return torch.where(mean > 0, rows * columns / mean, 0)
        value = read_state(state, keys[0]).reshape(shape)
        return value.square() if kind == "magnitude" else value

    def _spread(self, key: str, exact: bool = False) -> list[Tensor]:
        """An entry of all parameters, in their shapes.

        Args:
            key: of the entry.
            exact: as it is stored, where it is stored in full. Otherwise in float64 on the CPU.
        """
        found: list[Tensor] = []
        for i, (state, shape) in enumerate(zip(self._states, self._basis.shapes, strict=True)):
            if key not in state:  # a value that was not stored is the present one
                present, zero = _wide([self._olds[i]])[0], torch.zeros(shape, dtype=torch.float64)
                missing = present if self._kinds[key] == "value" else zero
                found.append(missing.to(self._olds[i].device) if exact else missing)
                continue
            value = state[key].detach() if exact and not is_quantised(state, key) else read_state(state, key)
            if value.ndim == 0 and self._kinds[key] == "value":  # Prodigy stores values that are all zero as one
                value = value.expand(shape)
            if value.numel() != shape.numel():
                raise self._unknown(key, i)
            found.append(value.reshape(shape))
        return found

    def _stored(self, i: int, moved: Mapping[str, Tensor]) -> dict[str, Any]:
        """The state after the cut, in the form in which the optimizer stores it."""
        old, kinds = self._states[i], self._kinds
        numbers = {key: value for key, value in old.items() if key not in kinds}
        if any(kinds.get(key) in ("blocks", "fresh") or is_quantised(old, key) for key in old):
            fresh = dict(self._fresh(i))
            for key in moved.keys() & old.keys():
                if key not in fresh:
                    raise self._unknown(key, i)
                write_state(fresh, key, moved[key].reshape(fresh[key].shape))
            return {**fresh, **numbers, **self._nothing[i]}
        plain = {key: self._like(old[key], x, i) for key, x in moved.items() if key in old}
        return {**{key: plain.get(key, old[key]) for key in old}, **self._nothing[i]}

    def _like(self, old: Tensor, new: Tensor, i: int) -> Tensor:
        """The new values in the old ones' dtype, on their device, and flat or of as many axes as they were."""
        shape, whole = self._basis.shapes[i], new.numel() == self._part.values[i].numel()
        if whole and old.shape != shape and old.ndim < 2:  # flat, or Prodigy's one zero for values that are all zero
            new = new.flatten()
        elif new.ndim > old.ndim > 0:  # rows and columns that are stored without the mean's axis
            new = new.squeeze(-1 if new.shape[-1] == 1 else -2)
        return new.to(old).contiguous()


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().to("cpu", torch.float64) for x in tensors]


def sliced(part: ParameterChange, olds: Sequence[Tensor]) -> ParameterChange:
    """The change with the first entries of every parameter in the place of its change of basis."""
    blocks = [torch.eye(new.shape[part.axis], old.shape[part.axis], dtype=torch.float64)
              for new, old in zip(part.values, olds, strict=True)]  # fmt: skip
    matrix = torch.block_diag(*blocks)
    return replace(part, pullback=matrix, pullback_squared=matrix)


__all__ = ["Basis", "Carry", "PartStates", "sliced"]
