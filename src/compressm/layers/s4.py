"""S4 (Gu, Goel, Ré, Efficiently Modeling Long Sequences with Structured State Spaces, ICLR 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compressm.layers.hyena import Convolution
from compressm.layers.s5 import hippo
from compressm.scans.graph import exporting, graph_scan


class S4(Convolution):
    """One system per channel whose state matrix is diagonal plus low rank, sampled by the bilinear transform.

        dx/dt = A_h x + b_h u_h,    y_h = 2 Re(c_h x) + D_h u_h,    A = diag(lam) - p p*

    States come in conjugate pairs, of which one state is stored. At initialisation ``A`` is HiPPO-LegS in the basis of
    the eigenvectors of its normal part. S4D drops ``p``; here the operator is complete. Its own eigenvectors are too
    ill-conditioned to compute with. The filter ``c A^j b`` is computed by doubling, for j below 1, 2, 4, ..., from
    powers of the sampled matrix.

    No well-conditioned basis makes this layer diagonal. `compressm.distil` turns it into an `S4D` by the Hankel matrix
    of its filters. That `S4D` is cut and trained like any other.

    Args:
        d_model: number of channels H.
        d_state: complex states n of every channel.
        max_length: longest sequence.
        dt_min, dt_max: the channels' steps are drawn between these, uniformly in the logarithm.

    Shape:
        input and output ``(batch, length, d_model)`` with ``length <= max_length``.
    """

    def __init__(
        self, d_model: int, d_state: int, max_length: int = 1024, dt_min: float = 1e-3, dt_max: float = 0.1
    ) -> None:
        super().__init__(d_model, max_length)
        if d_state < 1:
            raise ValueError(f"d_state must be at least 1; got {d_state}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"expected 0 < dt_min <= dt_max; got dt_min={dt_min}, dt_max={dt_max}")
        frequency, vectors = hippo(d_state)
        root = (2 * torch.arange(2 * d_state, dtype=torch.float64) + 1).sqrt().to(vectors)
        b, p = vectors.mH @ root, vectors.mH @ root / math.sqrt(2)

        def shared(values: Tensor) -> nn.Parameter:
            return nn.Parameter(values.float().repeat(d_model, 1))

        self.log_decay = nn.Parameter(torch.full((d_model, d_state), math.log(0.5)))
        self.frequency = shared(frequency)
        self.B_re, self.B_im, self.P_re, self.P_im = map(shared, (b.real, b.imag, p.real, p.imag))
        self.C_re = nn.Parameter(torch.randn(d_model, d_state) / math.sqrt(2))
        self.C_im = nn.Parameter(torch.randn(d_model, d_state) / math.sqrt(2))
        low, high = math.log(dt_min), math.log(dt_max)
        self.log_step = nn.Parameter(low + (high - low) * torch.rand(d_model))

    @property
    def d_state(self) -> int:
        """State dimension n of every channel, read off the parameters."""
        return self.log_decay.shape[1]

    def sampled(self) -> tuple[Tensor, Tensor, Tensor]:
        """``A`` (H, 2n, 2n), ``b`` and ``c`` (H, 2n) of the sampled systems in the coordinates ``(Re x, Im x)``."""
        decay, p = self.log_decay.exp(), torch.cat([self.P_re, self.P_im], -1)
        half = (self.log_step.exp() / 2)[:, None]
        identity = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        b = torch.cat([self.B_re, self.B_im], -1)
        # p p* acts on a state and its conjugate: p (p* x + conj(p* x)) = 2 p Re(p* x)
        A = _turned(identity, -decay, self.frequency) - 2 * p[:, :, None] * p[:, None, :]
        right = torch.cat([identity + half[..., None] * A, (2 * half * b)[..., None]], -1)
        # 1 - half A is the matrix of a block of size 2 per state, plus one of rank 1: its inverse is known (Sherman and
        # Morrison), and `torch.linalg.solve` has no counterpart in ONNX.
        real, imag = 1 + half * decay, half * self.frequency
        square = real.square() + imag.square()
        both = _turned(right, real / square, imag / square)
        turned = _turned(p[..., None], real / square, imag / square)
        row = p[:, None, :]
        both = both - 2 * half[..., None] * turned @ (row @ both) / (1 + 2 * half[..., None] * (row @ turned))
        return both[..., :-1], both[..., -1], 2 * torch.cat([self.C_re, -self.C_im], -1)

    def filter(self, length: int) -> Tensor:
        power, b, c = self.sampled()
        rows = c[:, None]  # row j is c A^j
        while rows.shape[1] < length:
            rows = torch.cat([rows, rows @ power], 1)
            power = power @ power
        return (rows[:, :length] @ b[..., None])[..., 0].T

    def forward(self, u: Tensor) -> Tensor:
        if exporting():  # the size of an FFT is a number; a graph of any length goes step by step
            return self._recurrence(u)
        return super().forward(u)

    def _recurrence(self, u: Tensor) -> Tensor:
        """The output by the recurrence of `step`, for sequences of any length."""
        A, b, c = (value.clone() for value in self.sampled())  # the loop of a graph takes no two views of one tensor

        def step(state: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
            state = (A @ state[..., None])[..., 0] + b * now[..., None]
            return (state * c).sum(-1), state

        y, _ = graph_scan(step, self.initial_state(u.shape[0]), u)
        return torch.addcmul(y, self.D, u)

    def initial_state(self, batch: int) -> Tensor:
        """The zero state of `step`, shape ``(batch, d_model, 2 d_state)``."""
        return self.D.new_zeros(batch, self.d_model, 2 * self.d_state)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to ``y`` of the same shape, and the next state."""
        A, b, c = self.sampled()
        state = torch.einsum("hij,bhj->bhi", A, state) + b * u[..., None]
        return (state * c).sum(-1) + self.D * u, state

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, max_length={self.max_length}"


def _turned(x: Tensor, real: Tensor, imag: Tensor) -> Tensor:
    """The product of ``real + i imag`` per state with the columns of ``x`` (H, 2n, m), real parts above imaginary ones.

    Args:
        x: or ``(2n, m)``, the same for all channels.
        real, imag: shape ``(H, n)``.
    """
    re, im = x.chunk(2, -2)
    real, imag = real[..., None], imag[..., None]
    return torch.cat([real * re - imag * im, imag * re + real * im], -2)


__all__ = ["S4"]
