"""Parts that the scans share: precision, shapes, the definition as a loop, and the choice between forms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from compressm.scans.graph import exporting, graph_scan
from compressm.scans.transforms import transformed

F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(scan: F) -> F:
    """Switch `torch.autocast` off inside a scan, since states are sums over thousands of steps, for which half
    precision is too coarse."""

    @functools.wraps(scan)
    def wrapped(u: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(u.device.type):
            return scan(u, *args, **kwargs)
        with torch.autocast(u.device.type, enabled=False):
            return scan(u, *args, **kwargs)

    return wrapped  # pyright: ignore[reportReturnType]


def check_shapes(given: Mapping[str, Tensor], expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Check the shapes of tensors.

    The message is built only if a shape is wrong: the check runs at every call, and under `torch.compile` formatting a
    size would make it static.

    Args:
        given: the tensors that determine the expected shapes, by name.
        expected: tensors and their expected shapes, by name; None for an optional tensor that is absent.

    Raises:
        ValueError: a tensor has another shape.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            known = " and ".join(f"{one} of shape {tuple(value.shape)}" for one, value in given.items())
            raise ValueError(f"{name} must have shape {shape} for {known}; got {tuple(tensor.shape)}")


def check_starts(starts: Tensor | None, u: Tensor) -> None:
    """Check where packed sequences begin.

    Raises:
        ValueError: ``starts`` is not bool, or not of shape ``(batch, length)``, the first two axes of ``u``.
    """
    if starts is not None and (starts.dtype != torch.bool or starts.shape != u.shape[:2]):
        raise ValueError(
            f"starts must be bool of shape {tuple(u.shape[:2])}, True where a sequence begins; got {starts.dtype} of "
            f"shape {tuple(starts.shape)}"
        )


def restarted(log_decay: Tensor, starts: Tensor | None) -> Tensor:
    """The decays of packed sequences: where one begins, nothing is left of the state of the one before.

    Args:
        log_decay: shape ``(batch, length, ...)``.
        starts: True where a sequence begins, shape ``(batch, length)``; None for one sequence a row.

    Raises:
        ValueError: see `check_starts`.
    """
    check_starts(starts, log_decay)
    if starts is None:
        return log_decay
    return log_decay.masked_fill(starts.view(*starts.shape, *[1] * (log_decay.ndim - 2)), -torch.inf)


def empty(u: Tensor) -> bool:
    """Whether the batch or the length of ``u`` (batch, length, ...) is zero."""
    return u.shape[0] == 0 or u.shape[1] == 0


def empty_scan(shape: tuple[int, ...], start: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result of a scan of empty input: empty outputs, with zero gradients, and the initial state.

    Args:
        shape: shape of the outputs, with batch or length 0.
        start: the initial state, batch first.
        tensors: the tensors that the outputs depend on; None for an absent one. The outputs have the dtype of the
            first.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    zero = torch.stack([tensor.sum().to(given[0].dtype) for tensor in (*given, start)]).sum() * 0
    y = given[0].new_zeros(shape) + zero
    return y, start + zero.to(start.dtype) if start.shape[0] == 0 else start.clone()


def check_engine(engine: str, *known: str) -> None:
    """Refuse an unknown engine.

    Raises:
        ValueError: the engine is unknown.
    """
    if engine not in known:
        *others, last = (repr(name) for name in known)
        raise ValueError(f"engine must be {', '.join(others)} or {last}; got {engine!r}")


def loop(step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, *sequences: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of a scan: ``step(state, *now) -> (y, state)`` for one time step after the other.

    Args:
        step: one time step.
        state: the initial state.
        sequences: shape ``(batch, length, ...)``, ``length >= 1``.

    Returns:
        all ``y``, shape ``(batch, length, ...)``, and the last state.
    """
    outputs: list[Tensor] = []
    for now in zip(*(sequence.unbind(1) for sequence in sequences), strict=True):
        y, state = step(state, *now)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def in_form(
    engine: str,
    chunked: Callable[..., tuple[Tensor, Tensor]],
    step: Callable[..., tuple[Tensor, Tensor]],
    state: Tensor,
    *sequences: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence in the form that ``engine`` names; by default ``chunked(*sequences, state)``."""
    if engine == "auto":
        engine = "graph" if exporting() else "chunked"
    if engine == "chunked":
        return chunked(*sequences, state)
    if engine == "loop" or transformed():
        return loop(step, state, *sequences)
    return graph_scan(step, state, *sequences)


__all__ = [
    "check_engine",
    "check_shapes",
    "check_starts",
    "empty",
    "empty_scan",
    "in_form",
    "loop",
    "restarted",
    "without_autocast",
]
