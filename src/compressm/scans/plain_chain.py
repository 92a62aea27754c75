"""The recurrence ``x_t = v_t + lam x_{t-1}`` in PyTorch's own operations, for derivatives of every kind."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_chain(v: Tensor, lam: Tensor, initial: Tensor) -> Tensor:
    """`chain` as a loop of PyTorch operations."""
    states, state = list[Tensor](), initial
    for added in v.unbind(1):
        state = times(lam, state) + added
        states.append(state)
    return torch.stack(states, 1)


def times(lam: Tensor, x: Tensor) -> Tensor:
    """The complex product ``lam x`` of ``lam`` (2, ...) and ``x`` (batch, 2, ...), real and imaginary parts."""
    re, im = x.unbind(1)
    return torch.stack([lam[0] * re - lam[1] * im, lam[0] * im + lam[1] * re], 1)


def chain_gradients(grad: Tensor, lam: Tensor, initial: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `chain`, differentiable: the same recurrence, reversed, with the conjugate of ``lam``."""
    conjugate = torch.stack([lam[0], -lam[1]])
    # Kernels cannot be used, since ``grad`` may be a dual number or a batch of `vmap`.
    adjoint = plain_chain(grad.flip(1), conjugate, torch.zeros_like(initial)).flip(1)
    before = torch.cat([initial[:, None], states[:, :-1]], 1)
    (re, im), (before_re, before_im) = adjoint.unbind(2), before.unbind(2)
    to_re, to_im = re * before_re + im * before_im, im * before_re - re * before_im
    return adjoint, torch.stack([to_re.sum((0, 1)), to_im.sum((0, 1))]), times(conjugate, adjoint[:, 0])
