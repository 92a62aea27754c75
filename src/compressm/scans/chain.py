"""The chain of diagonal complex states that links the chunks of an LTI scan.

    s_m = lam s_{m-1} + v_m,   m = 0 .. M-1

Real and imaginary parts lie side by side: ``v`` and ``s`` are real, of shape ``(batch, M, 2, n)``, ``lam`` is
``(2, n)``. The backward pass is the same recurrence, reversed, with the conjugate of ``lam``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from compressm.scans import native
from compressm.scans.graph import exporting, graph_scan, triton_usable
from compressm.scans.plain_chain import chain_gradients, plain_chain, times
from compressm.scans.transforms import transformed, twice

ChainEngine = Literal["native", "triton", "torch", "graph", "plain"]


def chain_engine(tensor: Tensor) -> ChainEngine:
    """The fastest engine for a tensor: compiled on the CPU, Triton on CUDA, otherwise a PyTorch loop over the chain.
    Under the transforms of `compressm.scans.transforms` it is ``"plain"``, which has every derivative."""
    if exporting():
        return "graph"
    if transformed():
        return "plain"
    if native.usable(tensor):
        return "native"
    return "triton" if triton_usable(tensor) else "torch"


def chain(v: Tensor, lam: Tensor, initial: Tensor, engine: ChainEngine) -> Tensor:
    """All states ``s``, of the shape of ``v``; differentiable in all three tensors.

    Args:
        v: input of each link, shape ``(batch, M, 2, n)``, float32 or float64.
        lam: multiplier, shape ``(2, n)``.
        initial: ``s_{-1}``, shape ``(batch, 2, n)``.
        engine: see `chain_engine`.
    """
    if engine == "native":
        return _native(v.contiguous(), lam.contiguous(), initial.contiguous())
    if engine == "graph":
        return _graph(v, lam, initial)
    if engine == "plain":
        return plain_chain(v, lam, initial)
    if engine == "triton":
        from compressm.scans.triton_chain import chain_triton

        # The kernel starts from zero, so the initial state is added to the first input.
        re, im = initial[:, 0], initial[:, 1]
        entering = torch.stack([lam[0] * re - lam[1] * im, lam[0] * im + lam[1] * re], 1)
        v = torch.cat([v[:, :1] + entering[:, None], v[:, 1:]], 1)
        return chain_triton(v.transpose(2, 3), lam.T).transpose(2, 3)
    states: Any = _Loop.apply(
        torch.complex(v[:, :, 0], v[:, :, 1]), torch.complex(*lam), torch.complex(*initial.unbind(1))
    )
    return torch.stack([states.real, states.imag], 2)


def _graph(v: Tensor, lam: Tensor, initial: Tensor) -> Tensor:
    def link(state: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        state = times(lam, state) + v
        return state, state

    return graph_scan(link, initial, v)[0]


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, lam: Tensor, initial: Tensor) -> Tensor:
        states = torch.empty_like(v)
        before = initial
        for m in range(v.shape[1]):
            before = torch.addcmul(v[:, m], lam, before, out=states[:, m])
        ctx.save_for_backward(states, lam, initial)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, lam, initial = ctx.saved_tensors
        if twice():
            parts = (_parts(grad, 2), _parts(lam, 0), _parts(initial, 1), _parts(states, 2))
            to_v, to_lam, to_initial = chain_gradients(*parts)
            return torch.complex(*to_v.unbind(2)), torch.complex(*to_lam), torch.complex(*to_initial.unbind(1))
        adjoint, conjugate = torch.empty_like(grad), lam.conj().resolve_conj()
        after = torch.zeros_like(initial)
        for m in range(grad.shape[1] - 1, -1, -1):
            after = torch.addcmul(grad[:, m], conjugate, after, out=adjoint[:, m])
        grad_lam = (adjoint[:, 1:] * states[:, :-1].conj()).sum((0, 1)) + (after * initial.conj()).sum(0)
        return adjoint, grad_lam, conjugate * after


def _parts(x: Tensor, dim: int) -> Tensor:
    """Real and imaginary part along a new dimension."""
    return torch.stack([x.real, x.imag], dim)


@torch.library.custom_op("compressm::chain", mutates_args=(), device_types="cpu")
def _native(v: Tensor, lam: Tensor, initial: Tensor) -> Tensor:
    (batch, length, _, n), states = v.shape, torch.empty_like(v)
    native.call("chain_forward", v, batch, length, n, v, lam, initial, states, _groups(v))
    return states


@_native.register_fake
def _(v: Tensor, lam: Tensor, initial: Tensor) -> Tensor:
    return torch.empty_like(v)


@torch.library.custom_op("compressm::chain_backward", mutates_args=(), device_types="cpu")
def _native_backward(grad: Tensor, lam: Tensor, initial: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, _, n), adjoint = grad.shape, torch.empty_like(grad)
    grad_lam = grad.new_zeros(batch, 2, n)
    native.call("chain_backward", grad, batch, length, n, grad, lam, initial, states, adjoint, grad_lam, _groups(grad))
    re, im = adjoint[:, 0, 0], adjoint[:, 0, 1]
    grad_initial = torch.stack([lam[0] * re + lam[1] * im, lam[0] * im - lam[1] * re], 1)
    return adjoint, grad_lam.sum(0), grad_initial


@_native_backward.register_fake
def _(grad: Tensor, lam: Tensor, initial: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(lam), torch.empty_like(initial)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:], output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lam, initial, states = ctx.saved_tensors
    if twice():
        return chain_gradients(grad, lam, initial, states)
    return _native_backward(grad.contiguous(), lam, initial, states)


_native.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _groups(v: Tensor) -> int:
    """The number of tasks that the states of one sequence are split into, so that every thread has a task."""
    return max(1, min(v.shape[-1] // 16, -(-torch.get_num_threads() // v.shape[0])))
