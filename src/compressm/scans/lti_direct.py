"""The LTI scan step by step, for few inputs and outputs on a CPU: everything in one compiled pass (``kernels/lti.h``).

Each vector lane holds one sequence of the batch. A step therefore costs the operations of its definition,
``n (2 p + 2 q + 4)`` multiply-adds. Only the outputs are written to memory, and for the backward pass the states before
every chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressm.scans import lti_chunked, native
from compressm.scans.transforms import gradients, twice

_CHUNK, _BLOCK = 16, 4  # steps between two stored states, and states per block: ``lti_chunk`` and ``S`` in lti.h


def scan(
    u: Tensor,
    log_radius: Tensor,
    phase: Tensor,
    B_re: Tensor,
    B_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state; see `compressm.scans.lti.lti_scan`. ``initial`` is ``(batch, 2, n)``, or zero."""
    tensors = (u, log_radius, phase, B_re, B_im, C_re, C_im, D, initial)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    y, last, _ = _scan(*(None if tensor is None else tensor.contiguous() for tensor in tensors), keep)
    return y, last


def cost(batch: int, length: int, p: int, q: int, n: int, itemsize: int = 4) -> float:
    """Operations of a forward pass, in units of those of a large matrix product.

    Idle lanes and threads are counted too. The first factor accounts for inputs and outputs that exceed the first-level
    cache.
    """
    lanes, threads = native.vector_bytes() // itemsize, native.threads()
    tiles = -(-batch // lanes)
    idle = -(-tiles // threads) * threads / tiles
    states = _BLOCK * -(-n // _BLOCK)
    return max(1.0, (p + q) / 128) * idle * tiles * lanes * length * states * (4 * (p + q) + 8)


def _checkpoints(u: Tensor, n: int, keep: bool) -> Tensor:
    lanes, states = native.vector_bytes() // u.element_size(), 2 * _BLOCK * -(-n // _BLOCK)
    return u.new_empty(-(-u.shape[0] // lanes), -(-u.shape[1] // _CHUNK) if keep else 0, states, lanes)


@torch.library.custom_op("compressm::lti", mutates_args=(), device_types="cpu")
def _scan(
    u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor,
    D: Tensor | None, initial: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, p), (q, n) = u.shape, C_re.shape
    y, last, kept = u.new_empty(batch, length, q), u.new_empty(batch, 2, n), _checkpoints(u, n, keep)
    native.call(
        "lti_forward", u, batch, length, p, q, n, u, log_radius, phase, B_re, B_im, C_re, C_im, D, initial, y,
        kept if keep else None, last,
    )  # fmt: skip
    return y, last, kept


@_scan.register_fake
def _(
    u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor,
    D: Tensor | None, initial: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, _), (q, n) = u.shape, C_re.shape
    return u.new_empty(batch, length, q), u.new_empty(batch, 2, n), _checkpoints(u, n, keep)


@torch.library.custom_op("compressm::lti_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor,
    D: Tensor | None, kept: Tensor, grad: Tensor, grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, p), (q, n) = u.shape, C_re.shape
    parts = min(torch.get_num_threads(), kept.shape[0])
    grad_u, grad_initial = torch.empty_like(u), u.new_empty(batch, 2, n)
    to_lam, to_B, to_C = u.new_empty(parts, 2, n), u.new_empty(parts, 2, n, p), u.new_empty(parts, 2, q, n)
    to_D = u.new_empty(parts, p if D is not None else 0)
    native.call(
        "lti_backward", u, batch, length, p, q, n, u, log_radius, phase, B_re, B_im, C_re, C_im, D, kept, grad,
        grad_last, grad_u, grad_initial, to_lam, to_B, to_C, to_D, parts,
    )  # fmt: skip
    return grad_u, grad_initial, to_lam.sum(0), to_B.sum(0), to_C.sum(0), to_D.sum(0)


@_scan_backward.register_fake
def _(
    u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor,
    D: Tensor | None, kept: Tensor, grad: Tensor, grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, _, p), (q, n) = u.shape, C_re.shape
    to_D = u.new_empty(p if D is not None else 0)
    return (
        torch.empty_like(u), u.new_empty(batch, 2, n), u.new_empty(2, n), u.new_empty(2, n, p), u.new_empty(2, q, n),
        to_D,
    )  # fmt: skip


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *system, initial, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*system, initial, output[2])


def _differentiate(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *system, initial, kept = ctx.saved_tensors
    u, D = system[0], system[-1]
    if twice():
        return *gradients(_composed, (*system, initial), (grad, grad_last)), None
    grad = u.new_zeros(*u.shape[:2], system[-2].shape[0]) if grad is None else grad.contiguous()
    grad_last = None if grad_last is None else grad_last.contiguous()
    to_u, to_initial, to_lam, to_B, to_C, to_D = _scan_backward(*system, kept, grad, grad_last)
    return (
        to_u, *to_lam.unbind(0), *to_B.unbind(0), *to_C.unbind(0), None if D is None else to_D,
        None if initial is None else to_initial, None,
    )  # fmt: skip


def _composed(
    u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor,
    D: Tensor | None, initial: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    start = u.new_zeros(u.shape[0], 2, C_re.shape[1]) if initial is None else initial
    y, last = lti_chunked.scan(u, log_radius, phase, B_re, B_im, C_re, C_im, start)
    return (y if D is None else torch.addcmul(y, D, u)), last


_scan.register_autograd(_differentiate, setup_context=_keep_for_backward)
