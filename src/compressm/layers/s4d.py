"""S4D (Gu, Gupta, Goel, Re, On the Parameterization and Initialization of Diagonal State Space Models, 2022)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from compressm.layers.s5 import hippo, zero_order_hold
from compressm.scans import siso_scan, siso_step


class S4D(nn.Module):
    """One diagonal system per channel, single input and single output, sampled by zero-order hold.

        dx/dt = diag(a_h) x + 1 u_h,    y_h = 2 Re(C_h x) + D_h u_h,    a = -exp(log_decay) + i frequency

    with ``dt_h = exp(log_step_h)``; every complex state stands for a conjugate pair. All entries of the input
    vector are one. This is no restriction, since only their products with the output vector matter.

    Args:
        d_model: number of channels H.
        d_state: state dimension n of every channel, the number of complex states.
        init: initial ``a``: ``"legs"`` (the normal part of HiPPO-LegS) or ``"lin"`` (``-1/2 + i pi k``, their S4D-Lin).
        dt_min, dt_max: the channels' steps are drawn between these, uniformly in the logarithm.

    Shape:
        input and output ``(batch, length, d_model)``.
    """

    log_decay: nn.Parameter
    frequency: nn.Parameter
    log_step: nn.Parameter
    C_re: nn.Parameter
    C_im: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_state: int,
        init: Literal["legs", "lin"] = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__()
        if d_model < 1 or d_state < 1:
            raise ValueError(f"d_model and d_state must be at least 1; got {d_model} and {d_state}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"expected 0 < dt_min <= dt_max; got dt_min={dt_min}, dt_max={dt_max}")
        if init not in ("legs", "lin"):
            raise ValueError(f"init must be 'legs' or 'lin'; got {init!r}")
        imaginary = hippo(d_state)[0].float() if init == "legs" else math.pi * torch.arange(d_state)
        self.d_model = d_model
        self.log_decay = nn.Parameter(torch.full((d_model, d_state), math.log(0.5)))
        self.frequency = nn.Parameter(imaginary.repeat(d_model, 1))
        self.log_step = nn.Parameter(torch.empty(d_model).uniform_(math.log(dt_min), math.log(dt_max)))
        self.C_re = nn.Parameter(torch.randn(d_model, d_state) / math.sqrt(2))
        self.C_im = nn.Parameter(torch.randn(d_model, d_state) / math.sqrt(2))
        self.D = nn.Parameter(torch.randn(d_model))

    @property
    def d_state(self) -> int:
        """State dimension n of every channel, read off the parameters."""
        return self.log_decay.shape[1]

    def sampled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The discrete systems, as `siso_scan` takes them: ``log |lam|``, ``arg lam``, real and imaginary part of c."""
        re, im, log_radius, phase = zero_order_hold(self.log_decay, self.frequency, self.log_step[:, None])
        c_re, c_im = re * self.C_re - im * self.C_im, re * self.C_im + im * self.C_re
        return log_radius, phase, 2 * c_re, 2 * c_im

    def forward(self, u: Tensor) -> Tensor:
        return torch.addcmul(siso_scan(u, *self.sampled()), self.D, u).to(u.dtype)

    def initial_state(self, batch: int) -> Tensor:
        """The zero state of `step`: real and imaginary part, shape ``(batch, 2, d_model, d_state)``."""
        return self.log_step.new_zeros(batch, 2, self.d_model, self.d_state)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to ``y`` of the same shape, and the next state."""
        y, state = siso_step(state, u, *self.sampled())
        return (y + self.D * u).to(u.dtype), state

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}"
