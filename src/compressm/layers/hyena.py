"""Hyena (Poli et al., Hyena Hierarchy: Towards Larger Convolutional Language Models, 2023)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compressm.layers.parts import short_conv, short_conv_step
from compressm.layers.s4d import S4D


class Convolution(nn.Module):
    """A causal convolution of every channel with a filter as long as the sequence, plus ``D u``, by FFT.

        y_t = sum_{j<=t} h_j u_{t-j} + D u_t

    A subclass defines `filter`. `compressm.distil` works for all of them.

    Args:
        d_model: channels.
        max_length: longest sequence.

    Shape:
        input and output ``(batch, length, d_model)`` with ``length <= max_length``.
    """

    def __init__(self, d_model: int, max_length: int) -> None:
        super().__init__()
        if min(d_model, max_length) < 1:
            raise ValueError(f"d_model and max_length must be at least 1; got {d_model} and {max_length}")
        self.d_model, self.max_length = d_model, max_length
        self.D = nn.Parameter(torch.randn(d_model))

    def filter(self, length: int) -> Tensor:
        """The filters' first ``length`` values without D, shape ``(length, d_model)``."""
        raise NotImplementedError

    def forward(self, u: Tensor) -> Tensor:
        length = u.shape[1]
        if length > self.max_length:
            raise ValueError(f"a sequence of {length} steps is longer than max_length={self.max_length} of this layer")
        if u.numel() == 0:  # FFTs refuse empty input; the product has the right shape and zero gradients
            return (u * self.filter(1)[0].to(u.dtype) + self.D * u).to(u.dtype)
        size = 2 ** math.ceil(math.log2(2 * length))
        wide = u.float() if u.dtype in (torch.float16, torch.bfloat16) else u
        response = torch.fft.rfft(self.filter(length).to(wide.dtype), n=size, dim=0)
        y = torch.fft.irfft(torch.fft.rfft(wide, n=size, dim=1) * response, n=size, dim=1)[:, :length]
        return torch.addcmul(y.to(u.dtype), self.D, u).to(u.dtype)

    def initial_state(self, batch: int) -> Tensor:
        """The state of `step`: all inputs so far, shape ``(batch, steps, d_model)``. It grows with every step, and so
        does the cost of a step."""
        return self.D.new_zeros(batch, 0, self.d_model)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to ``y`` of the same shape, and the next state."""
        state = torch.cat([state, u[:, None]], 1)
        length = state.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} steps are more than max_length={self.max_length} of this layer")
        response = self.filter(length).flip(0)
        return ((response * state).sum(1) + self.D * u).to(u.dtype), state

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, max_length={self.max_length}"


class LongConvolution(Convolution):
    """A `Convolution` whose filter is a small network with sine activations of the time, times an exponential window.

        h_j = exp(-rate j) * mlp(features(j / max_length))

    Args:
        d_model: channels.
        max_length: longest sequence; times are divided by it.
        width: width of the network.
        bands: number of frequencies among its features.

    Shape:
        input and output ``(batch, length, d_model)`` with ``length <= max_length``.
    """

    def __init__(self, d_model: int, max_length: int = 1024, width: int = 32, bands: int = 8) -> None:
        super().__init__(d_model, max_length)
        self.bands = bands
        self.inner = nn.ModuleList([nn.Linear(1 + 2 * bands, width), nn.Linear(width, width)])
        self.outer = nn.Linear(width, d_model, bias=False)
        self.frequency = nn.Parameter(torch.full((width,), 4.0))
        # The windows fall to 1 % after 0.3 to 1.5 times the longest sequence, as in the paper's code.
        slow, fast = -math.log(0.01) / (1.5 * max_length), -math.log(0.01) / (0.3 * max_length)
        self.register_buffer("rates", torch.linspace(slow, fast, d_model))

    def filter(self, length: int) -> Tensor:
        rates = self.get_buffer("rates")
        steps = torch.arange(length, dtype=rates.dtype, device=rates.device)
        time = steps[:, None] / self.max_length
        angles = 2 * math.pi * time * torch.arange(1, self.bands + 1, dtype=rates.dtype, device=rates.device)
        z = torch.cat([time, angles.cos(), angles.sin()], 1)
        for layer in self.inner:
            z = torch.sin(self.frequency * layer(z))
        return self.outer(z) * torch.exp(-rates * steps[:, None])


class Hyena(nn.Module):
    """The Hyena operator of order 2: a long convolution between two gates.

        q, k, v = short_conv(in_proj(u));    out = out_proj(q * filter(k * v))

    With ``d_state=0`` the filter is a `LongConvolution`. Otherwise it is an `S4D`, one state space model per channel,
    which generates in constant time per token. `compressm.distil` turns the first kind into the second.

    Args:
        d_model: width of the sequences.
        d_state: 0, or the number of complex states of every channel.
        max_length: see `LongConvolution`.
        d_conv: taps of the short convolution.

    Shape:
        input and output ``(batch, length, d_model)``.
    """

    def __init__(self, d_model: int, d_state: int = 0, max_length: int = 1024, d_conv: int = 3) -> None:
        super().__init__()
        if min(d_model, d_conv, max_length) < 1 or d_state < 0:
            raise ValueError(
                "d_model, d_conv and max_length must be at least 1 and d_state at least 0; got "
                f"{d_model}, {d_conv}, {max_length} and {d_state}"
            )
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.short = nn.Conv1d(3 * d_model, 3 * d_model, d_conv, groups=3 * d_model, padding=d_conv - 1)
        self.filter: nn.Module = S4D(d_model, d_state) if d_state else LongConvolution(d_model, max_length)
        self.out_proj = nn.Linear(d_model, d_model)

    @property
    def d_state(self) -> int:
        """Complex states per channel; 0 for a convolution."""
        return self.filter.d_state if isinstance(self.filter, S4D) else 0

    def forward(self, u: Tensor) -> Tensor:
        q, k, v = short_conv(self.short, self.in_proj(u)).chunk(3, -1)
        return self.out_proj(q * self.filter(k * v))

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """The state of `step` before the first input: the short convolution's last inputs and the filter's state."""
        module: Any = self.filter
        window = self.out_proj.weight.new_zeros(batch, self.short.kernel_size[0] - 1, 3 * self.d_model)
        return window, module.initial_state(batch)

    def step(self, u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to the output of the same shape, and the next state."""
        projected, window = short_conv_step(self.short, self.in_proj(u), state[0])
        q, k, v = projected.chunk(3, -1)
        module: Any = self.filter
        y, inner = module.step(k * v, state[1])
        return self.out_proj(q * y), (window, inner)


__all__ = ["Convolution", "Hyena", "LongConvolution"]
