"""The Linear Recurrent Unit (Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences, ICML 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compressm.scans import lti_scan, lti_step


class LRU(nn.Module):
    """A diagonal complex linear recurrence between real sequences.

        x_k = diag(lam) x_{k-1} + diag(gamma) B u_k,    y_k = Re(C x_k) + D * u_k
        lam = exp(-exp(nu_log) + i exp(theta_log)),     gamma = exp(gamma_log)

    The parametrisation keeps ``|lam| < 1`` for every value of the parameters. At initialisation ``|lam|`` is drawn so
    that ``|lam|^2`` is uniform on ``[r_min^2, r_max^2]``, the phase is uniform on ``[0, max_phase]``, and ``gamma =
    sqrt(1 - |lam|^2)`` gives every state unit variance under white noise (their section 3.4 and appendix A).

    Args:
        d_model: width H of the sequences.
        d_state: state dimension n, the number of complex states.
        r_min, r_max: smallest and largest ``|lam|`` at initialisation, ``0 <= r_min < r_max < 1``.
        max_phase: largest phase at initialisation, in radians.

    Shape:
        input and output ``(batch, length, d_model)``.
    """

    nu_log: nn.Parameter
    theta_log: nn.Parameter
    gamma_log: nn.Parameter
    B_re: nn.Parameter
    B_im: nn.Parameter
    C_re: nn.Parameter
    C_im: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_state: int,
        r_min: float = 0.0,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        if d_model < 1 or d_state < 1:
            raise ValueError(f"d_model and d_state must be at least 1; got {d_model} and {d_state}")
        if not 0 <= r_min < r_max < 1:
            raise ValueError(f"expected 0 <= r_min < r_max < 1; got r_min={r_min}, r_max={r_max}")
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"expected 0 < max_phase <= 2 pi; got {max_phase}")
        self.d_model = d_model
        squared = torch.rand(d_state) * (r_max**2 - r_min**2) + r_min**2
        nu = (-0.5 * squared.clamp_min(1e-12).log()).clamp_min(1e-8)
        theta = (max_phase * torch.rand(d_state)).clamp_min(1e-8)
        self.nu_log = nn.Parameter(nu.log())
        self.theta_log = nn.Parameter(theta.log())
        self.gamma_log = nn.Parameter(0.5 * torch.log(-torch.expm1(-2 * nu)))
        self.B_re = nn.Parameter(torch.randn(d_state, d_model) / math.sqrt(2 * d_model))
        self.B_im = nn.Parameter(torch.randn(d_state, d_model) / math.sqrt(2 * d_model))
        self.C_re = nn.Parameter(torch.randn(d_model, d_state) / math.sqrt(d_state))
        self.C_im = nn.Parameter(torch.randn(d_model, d_state) / math.sqrt(d_state))
        self.D = nn.Parameter(torch.randn(d_model))

    @property
    def d_state(self) -> int:
        """State dimension n: the number of complex states, read off the parameters."""
        return self.nu_log.shape[0]

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `lti_scan`: ``log |lam|``, ``arg lam``, real and imaginary part of ``diag(gamma) B`` and of
        C."""
        gamma = self.gamma_log.exp()[:, None]
        B = gamma * self.B_re, gamma * self.B_im
        return -self.nu_log.exp(), self.theta_log.exp(), *B, self.C_re, self.C_im

    def forward(self, u: Tensor) -> Tensor:
        return lti_scan(u, *self.system(), D=self.D)

    def initial_state(self, batch: int) -> Tensor:
        """The zero state of `step`: real and imaginary part, shape ``(batch, 2, d_state)``."""
        return self.nu_log.new_zeros(batch, 2, self.d_state)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to ``y`` of the same shape, and the next state."""
        y, state = lti_step(state, u, *self.system())
        return (y + self.D * u).to(u.dtype), state

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}"
