"""What the scans have in common: precision, shapes, the definition as a loop, and the choice between forms."""

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
    """A scan that computes in its own precision under `torch.autocast` too: states sum up thousands of steps, and half
    precision cannot."""

    @functools.wraps(scan)
    def wrapped(u: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(u.device.type):
            return scan(u, *args, **kwargs)
        with torch.autocast(u.device.type, enabled=False):
            return scan(u, *args, **kwargs)

    return wrapped  # pyright: ignore[reportReturnType]


def check_shapes(given: Mapping[str, Tensor], expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Hold tensors against the shapes that they must have.

    Args:
        given: the tensors by name that these shapes follow from. The message is made only where one is wrong: this
            runs at every call, and under `torch.compile` a size that is printed is a size that is fixed.
        expected: tensors and their shapes by name; None stands for one that may be left out, and is.

    Raises:
        ValueError: one has another shape.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            known = " and ".join(f"{one} of shape {tuple(value.shape)}" for one, value in given.items())
            raise ValueError(f"{name} must have shape {shape} for {known}; got {tuple(tensor.shape)}")


def empty(u: Tensor) -> bool:
    """Whether there is no sequence in ``u`` (batch, length, ...), or no step in the sequences."""
    return u.shape[0] == 0 or u.shape[1] == 0


def empty_scan(shape: tuple[int, ...], start: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a scan of nothing returns: outputs of an empty shape, whose gradients are zeros, and the state at the start.

    Args:
        shape: of the outputs, with batch or length 0.
        start: the state at the start, batch first.
        tensors: what outputs depend on, the first one of their dtype; None stands for one that is left out.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    zero = torch.stack([tensor.sum().to(given[0].dtype) for tensor in (*given, start)]).sum() * 0
    y = given[0].new_zeros(shape) + zero
    return y, start + zero.to(start.dtype) if start.shape[0] == 0 else start.clone()


def check_engine(engine: str, *known: str) -> None:
    """Refuse an unknown engine.

    Raises:
        ValueError: it is not among the known ones.
    """
    if engine not in known:
        *others, last = (repr(name) for name in known)
        raise ValueError(f"engine must be {', '.join(others)} or {last}; got {engine!r}")


def loop(step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, *sequences: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one ``step(state, *now) -> (y, state)`` after the other.

    Args:
        step: one step of time.
        state: before the first.
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
    """Run a recurrence in one of its forms, ``chunked(*sequences, state)`` unless another one is asked for."""
    if engine == "auto":
        engine = "graph" if exporting() else "chunked"
    if engine == "chunked":
        return chunked(*sequences, state)
    if engine == "loop" or transformed():
        return loop(step, state, *sequences)
    return graph_scan(step, state, *sequences)


__all__ = ["check_engine", "check_shapes", "empty", "empty_scan", "in_form", "loop", "without_autocast"]
