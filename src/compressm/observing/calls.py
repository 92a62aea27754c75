"""Calls of layers, kept from the forward pass to the backward pass, and the evidence computed from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters import LayerAdapter
from compressm.observing.adjoints import covariances, readings
from compressm.observing.layer_calls import named_arguments
from compressm.observing.masks import mask_gradients
from compressm.theory.evidence import Covariances
from compressm.theory.fisher import MaskFisher
from compressm.theory.systems import DiagonalSystem

_CACHES = ("cache_params", "past_key_value", "past_key_values")


@dataclass(frozen=True)
class LinearCall:
    """A call of a linear layer.

    Attributes:
        layer: the layer.
        system: the layer's system at the call, which may change after the pass.
        u: the layer's input, shape ``(batch, length, d_model)``.
        present: 1 for tokens and 0 for padding, shape ``(batch, length)``; None for no padding.
        lengths: lengths of the sequences, within which a layer with two directions reversed each one, shape
            ``(batch,)``; None for the whole row.
    """

    layer: nn.Module
    system: DiagonalSystem
    u: Tensor
    present: Tensor | None
    lengths: Tensor | None = None

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        system: DiagonalSystem,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        present: Tensor | None,
    ) -> LinearCall:
        """A call that was made."""
        values = (*args, *kwargs.values())  # by name in any order, and lengths are whole numbers
        u: Tensor = next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
        lengths = named_arguments(layer, args, kwargs).get("lengths")
        return cls(layer, system, u.detach(), present, lengths if isinstance(lengths, Tensor) else None)

    def first(self, sequences: int | None) -> LinearCall:
        """The same with the first sequences of the batch only."""
        present, lengths = (None if x is None else x[:sequences] for x in (self.present, self.lengths))
        return replace(self, u=self.u[:sequences], present=present, lengths=lengths)

    def finite(self) -> bool:
        """Whether the layer's input is."""
        return bool(torch.isfinite(self.u).all())

    def run(self, g: Tensor, before: Covariances | None) -> Covariances:
        """Moments of this call, plus those of earlier calls in the same pass.

        Args:
            g: gradient of every sequence's own loss at the layer's output.
            before: from the earlier calls.
        """
        for reading in readings(self.layer, self.system, self.u, g, self.present, self.lengths):
            new = covariances(self.system, reading, first=before is None)
            before = new if before is None else before.plus(new)
        assert before is not None
        return before


@dataclass(frozen=True)
class SelectiveCall:
    """A call of a selective layer.

    Attributes:
        layer, adapter: the layer.
        args, kwargs: arguments of the call. Tensors whose first dimension is ``batch`` hold one sequence per row.
        present: as in `LinearCall`.
        precision: opens the autocast context of the call.
        batch: number of sequences.
    """

    layer: nn.Module
    adapter: LayerAdapter
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    present: Tensor | None
    precision: Callable[[], contextlib.AbstractContextManager[Any]]
    batch: int

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        adapter: LayerAdapter,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        present: Tensor | None,
    ) -> SelectiveCall:
        """A call that was made."""
        # The cache was filled by this very call, and must not be read when the call is repeated.
        given = {name: None if name in _CACHES else _detached(value) for name, value in kwargs.items()}
        values = tuple(_detached(value) for value in args)
        hidden = next(v for v in (*values, *given.values()) if isinstance(v, Tensor) and v.is_floating_point())
        kind = hidden.device.type
        precision = contextlib.nullcontext
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            precision = _Autocast(kind, dtype)
        return cls(layer, adapter, values, given, present, precision, hidden.shape[0])

    def first(self, sequences: int | None) -> SelectiveCall:
        """The same with the first sequences of the batch only."""
        if sequences is None or sequences >= self.batch:
            return self

        def part(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.batch
            return value[:sequences] if whole else value

        return replace(
            self,
            args=tuple(part(value) for value in self.args),
            kwargs={name: part(value) for name, value in self.kwargs.items()},
            present=part(self.present),
            batch=sequences,
        )

    def finite(self) -> bool:
        """Whether the layer's input is."""
        tensors = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3]
        return all(bool(torch.isfinite(value).all()) for value in tensors if value.is_floating_point())

    def run(self, g: Tensor, before: Tensor | None) -> Tensor:
        """The gradients of M (see `masks`), plus those of earlier calls in the same pass; see `LinearCall.run`.

        Returns:
            float64 on the CPU, shape ``(batch, groups, n, n)``.
        """
        with self.precision():
            gradients = mask_gradients(self.layer, self.adapter, self.args, self.kwargs, g)
        new = gradients.to("cpu", torch.float64)
        return new if before is None or before.shape != new.shape else before + new


@dataclass(frozen=True)
class _Autocast:
    """Opens `torch.autocast` with the settings of the call."""

    kind: str
    dtype: torch.dtype

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.kind, self.dtype)


def as_evidence(run: Covariances | Tensor) -> Covariances | MaskFisher:
    """The evidence of all calls of a layer in one pass."""
    return MaskFisher.of(run.diagonal(dim1=-2, dim2=-1)) if isinstance(run, Tensor) else run


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


Call = LinearCall | SelectiveCall


def call_of_layer(
    layer: nn.Module, adapter: LayerAdapter, args: tuple[Any, ...], kwargs: dict[str, Any], present: Tensor | None
) -> Call:
    """A call of a layer that was made.

    Raises:
        InvalidSystemError: the system that the layer computes is not finite, or not stable.
    """
    system = adapter.system(layer)
    if system is None:
        return SelectiveCall.of(layer, adapter, args, kwargs, present)
    return LinearCall.of(layer, system, args, kwargs, present)


__all__ = ["Call", "LinearCall", "SelectiveCall", "as_evidence", "call_of_layer"]
