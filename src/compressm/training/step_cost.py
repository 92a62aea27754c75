"""The cost of a training step on any machine: floating-point operations, and memory kept for the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compressm.runtime.copies import copied_module
from compressm.scans import native

# An exponential counts as one operation, a complex multiplication and addition as eight.
_SELECTIVE_FORWARD, _SELECTIVE_BACKWARD = 7, 20
_CHUNK = 16  # chunk_steps of matrix_states.h


@dataclass(frozen=True)
class StepCost:
    """The cost of one forward and backward pass.

    Attributes:
        flops: floating-point operations of matrix products, convolutions, Fourier transforms and recurrences: those
            that PyTorch's counter counts, and those of compressm's kernels. Element-wise operations are left out.
        kept_bytes: memory that autograd keeps from the forward pass for the backward pass, without parameters.
    """

    flops: int
    kept_bytes: int


def step_cost(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> StepCost:
    """Count the operations and kept memory of a forward and backward pass, on a copy of a model.

    Weights, gradients, running statistics and torch's random state stay as they are.

    Args:
        model: any model.
        loss: ``loss(model)`` returns a scalar to be differentiated.
    """
    own = copied_module(model)
    kept: dict[tuple[int, int], int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in own.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
        return tensor

    compiled = list[int]()

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        if name in _KERNELS:
            compiled.append(_KERNELS[name](arguments))

    devices = sorted({parameter.device.index for parameter in own.parameters() if parameter.is_cuda})
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with torch.random.fork_rng(devices=devices), native.watched(watch), counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss(own)
        value.backward()
    return StepCost(counter.get_total_flops() + sum(compiled), sum(kept.values()))


def _matrix_states(sizes: Sequence[int], states: int, values: float, keys: float) -> int:
    """Of a recurrence whose states are matrices, chunk by chunk: products of the states with values or keys, and
    products of a chunk's triangle with all of its values and all of its keys.

    Args:
        sizes: batch, length, heads, p, n.
        states, values, keys: how many of these products there are.
    """
    batch, length, heads, p, n = sizes
    triangle = min(length, _CHUNK) + 1
    return round(batch * length * heads * (2 * states * p * n + triangle * (values * p + keys * n)))


def _impulse(length: int, p: int, q: int, n: int, m: int) -> int:
    """One real product; see ``kernels/impulse.h``."""
    return 2 * (-(-length // m) * q) * (2 * n) * (m * p)


# Operations of kernels that PyTorch does not see, computed from the arguments of `native.call`.
_KERNELS: dict[str, Callable[[tuple[Any, ...]], int]] = {
    # Keys decay from step to step, which is half a product of its own.
    "gla_forward": lambda given: _matrix_states(given[:5], 2, 1, 1.5),
    "gla_backward": lambda given: _matrix_states(given[:5], 5, 2, 4),
    "delta_forward": lambda given: _matrix_states(given[:5], 3, 2, 2),
    "delta_backward": lambda given: _matrix_states(given[:5], 7, 4, 6),
    "convolution_forward": lambda given: 2 * math.prod(given[:3]) * given[4],
    "convolution_backward": lambda given: 3 * 2 * math.prod(given[:3]) * given[4],
    "step_sizes_forward": lambda given: 2 * given[0] * given[1] * given[3],
    "step_sizes_backward": lambda given: 3 * 2 * given[0] * given[1] * given[3],
    "impulse_forward": lambda given: _impulse(*given[:5]),
    "impulse_backward": lambda given: 2 * _impulse(*given[:5]),
    "linear_forward": lambda given: 2 * math.prod(given[:3]),
    "linear_backward": lambda given: 2 * math.prod(given[:3]) * (1 if given[6] is None else 2),
    "tail_forward": lambda given: 2 * given[0] * 2 * given[1] ** 2,
    "tail_backward": lambda given: 3 * 2 * given[0] * 2 * given[1] ** 2,  # the forward product again, and two gradients
}


def _formulas() -> dict[Any, Callable[..., int]]:
    """Counting formulas, from shapes, for the operators that PyTorch's counter does not know."""
    from compressm.scans import chain, lti_direct, lti_fft, selective, ssd_native  # which define them  # noqa: F401  # pyright: ignore[reportUnusedImport]

    ours, aten = torch.ops.compressm, torch.ops.aten
    return {
        ours.selective_scan: _selective_forward,
        ours.selective_scan_backward: _selective_backward,
        ours.ssd_scan: _ssd_forward,
        ours.ssd_scan_backward: _ssd_backward,
        ours.lti: _lti,
        ours.lti_backward: _lti_backward,
        ours.chain: _chain,
        ours.chain_backward: _chain_backward,
        ours.convolution: _convolution,
        ours.convolution_backward: _convolution_backward,
        aten._fft_r2c: _real_transform,
        aten._fft_c2r: _real_inverse_transform,
    }


def _selective_forward(u: Sequence[int], delta: Any, A: Sequence[int], *_: Any, **__: Any) -> int:
    return _SELECTIVE_FORWARD * math.prod(u) * A[0]


def _selective_backward(
    grad: Any, state: Any, u: Sequence[int], delta: Any, A: Sequence[int], *_: Any, **__: Any
) -> int:
    return _SELECTIVE_BACKWARD * math.prod(u) * A[0]


def _ssd_forward(x: Sequence[int], log_decay: Any, B: Sequence[int], *_: Any, **__: Any) -> int:
    """Scores and their products with x, lower triangles; into and out of the states."""
    from compressm.scans.ssd_native import chunk_length

    (batch, length, heads, p), (groups, n) = x, B[2:]
    within = (min(length, chunk_length(n)) + 1) * (heads * p + groups * n)
    return batch * length * (within + 4 * heads * p * n)


def _ssd_backward(grad: Any, state: Any, x: Sequence[int], log_decay: Any, B: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _ssd_forward(x, log_decay, B)


def _lti(
    u: Sequence[int], log_radius: Any, phase: Any, B: Sequence[int], B_im: Any, C: Sequence[int], *_: Any, **__: Any
) -> int:
    (n, p), q = B, C[0]
    return 2 * u[0] * u[1] * n * (2 * p + 2 * q + 4)


def _lti_backward(
    u: Sequence[int], log_radius: Any, phase: Any, B: Sequence[int], B_im: Any, C: Sequence[int], *_: Any, **__: Any
) -> int:
    (n, p), q = B, C[0]
    return 2 * u[0] * u[1] * n * (6 * p + 4 * q + 12)  # includes computing the states again


def _chain(v: Sequence[int], *_: Any, **__: Any) -> int:
    return 8 * math.prod(v) // 2


def _chain_backward(grad: Sequence[int], *_: Any, **__: Any) -> int:
    return 16 * math.prod(grad) // 2


def _convolution(u: Sequence[int], impulse: Sequence[int], *_: Any, **__: Any) -> int:
    (batch, length, p), q = u, impulse[1]
    return _transforms(batch * (p + q) + p * q, length) + 8 * batch * length * p * q


def _convolution_backward(grad: Sequence[int], u: Sequence[int], *_: Any, **__: Any) -> int:
    (batch, length, p), q = u, grad[2]
    return _transforms(batch * (2 * p + q) + p * q, length) + 16 * batch * length * p * q


def _transforms(count: int, length: int) -> int:
    return round(count * 5 * length * math.log2(max(2, length)))


def _real_transform(shape: Sequence[int], axes: Sequence[int], *_: Any, **__: Any) -> int:
    size = math.prod(shape[axis] for axis in axes)
    return round(2.5 * math.prod(shape) * math.log2(max(2, size)))


def _real_inverse_transform(shape: Any, axes: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return _real_transform(out_shape, axes)


__all__ = ["StepCost", "step_cost"]
