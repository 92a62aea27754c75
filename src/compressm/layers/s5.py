"""S5 (Smith, Warrington and Linderman, Simplified State Space Layers for Sequence Modeling, ICLR 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compressm.layers.padding import checked_lengths, reverse
from compressm.scans import lti_scan, lti_step


class S5(nn.Module):
    """A diagonal continuous-time system with many inputs and outputs, discretised by zero-order hold.

        dx/dt = diag(Lam) x + B u,    y = 2 Re(C x) + D * u,    Lam = -exp(log_decay) + i frequency
        x_k = exp(Lam step) x_{k-1} + (exp(Lam step) - 1) / Lam * (B u_k),    step = exp(log_step)

    States come in conjugate pairs, of which one state is stored, hence the factor 2. Every state has its own time step.
    The real parts of ``Lam`` are negative for every value of the parameters.

    At initialisation the system is the normal part of HiPPO-LegS (Gu et al. 2022, appendix A of S5): its eigenvalues,
    and B and C in its eigenvectors; the time steps are log-uniform on ``[dt_min, dt_max]``.

    Args:
        d_model: width H of the sequences.
        d_state: state dimension n, the number of complex states (the paper's latent size is 2n).
        dt_min, dt_max: smallest and largest time step at initialisation.
        bidirectional: run the same recurrence over the reversed sequence too, with a second output matrix (the last H
            rows of ``C``), and add both outputs. Both directions are cut together. Such a layer has no `step`.

    Shape:
        input and output ``(batch, length, d_model)``.
    """

    log_decay: nn.Parameter
    frequency: nn.Parameter
    log_step: nn.Parameter
    B_re: nn.Parameter
    B_im: nn.Parameter
    C_re: nn.Parameter
    C_im: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_state: int,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        if d_model < 1 or d_state < 1:
            raise ValueError(f"d_model and d_state must be at least 1; got {d_model} and {d_state}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"expected 0 < dt_min <= dt_max; got dt_min={dt_min}, dt_max={dt_max}")
        self.d_model, self.bidirectional = d_model, bidirectional
        frequency, vectors = hippo(d_state)
        B = vectors.mH @ (torch.randn(2 * d_state, d_model, dtype=torch.float64) / math.sqrt(d_model)).to(vectors)
        C = (torch.randn((1 + bidirectional) * d_model, 2 * d_state, dtype=torch.float64) / math.sqrt(2 * d_state)).to(
            vectors
        ) @ vectors
        self.log_decay = nn.Parameter(torch.full((d_state,), 0.5).log())
        self.frequency = nn.Parameter(frequency.float())
        low, high = math.log(dt_min), math.log(dt_max)
        self.log_step = nn.Parameter(low + (high - low) * torch.rand(d_state))
        self.B_re, self.B_im = nn.Parameter(B.real.float().contiguous()), nn.Parameter(B.imag.float().contiguous())
        self.C_re, self.C_im = nn.Parameter(C.real.float().contiguous()), nn.Parameter(C.imag.float().contiguous())
        self.D = nn.Parameter(torch.randn(d_model))

    @property
    def d_state(self) -> int:
        """State dimension n: the number of complex states, read off the parameters."""
        return self.log_decay.shape[0]

    def forward(self, u: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The output, of the shape of ``u``.

        Args:
            u: shape ``(batch, length, d_model)``.
            lengths: length of each sequence if rows are padded at their end, shape ``(batch,)``. Only a bidirectional
                layer uses it. None for full rows.
        """
        discrete, C_re, C_im, H = self._discrete(), 2 * self.C_re, 2 * self.C_im, self.d_model
        y = lti_scan(u, *discrete, C_re[:H], C_im[:H], D=self.D)
        if self.bidirectional:
            if lengths is not None:
                lengths = checked_lengths(lengths, *u.shape[:2]).to(u.device)
            y = y + reverse(lti_scan(reverse(u, lengths), *discrete, C_re[H:], C_im[H:]), lengths)
        return y

    def initial_state(self, batch: int) -> Tensor:
        """The zero state of `step`: real and imaginary part, shape ``(batch, 2, d_state)``."""
        return self.log_decay.new_zeros(batch, 2, self.d_state)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``u`` of shape ``(batch, d_model)`` to ``y`` of the same shape, and the next state.

        Raises:
            ValueError: the layer is bidirectional, so its output depends on later inputs.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional S5 has no single steps: its output depends on inputs still to come")
        y, state = lti_step(state, u, *self._discrete(), 2 * self.C_re, 2 * self.C_im)
        return (y + self.D * u).to(u.dtype), state

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``log |lam|``, phase, and real and imaginary part of the discrete B."""
        hold_re, hold_im, log_abs, phase = zero_order_hold(self.log_decay, self.frequency, self.log_step)
        B_re = hold_re[:, None] * self.B_re - hold_im[:, None] * self.B_im
        B_im = hold_re[:, None] * self.B_im + hold_im[:, None] * self.B_re
        return log_abs, phase, B_re, B_im

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}"


def zero_order_hold(log_decay: Tensor, frequency: Tensor, log_step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real and imaginary part of ``(exp(z) - 1) / Lam``, and of ``z = Lam step``, without cancellation for small z.

    Args:
        log_decay, frequency, log_step: of an `S5`, shape ``(n,)``.
    """
    step, decay = log_step.exp(), log_decay.exp()
    a, b = -decay * step, frequency * step
    # exp(a + ib) - 1, with 1 - cos b = 2 sin^2(b/2)
    real = torch.expm1(a) * torch.cos(b) - 2 * torch.sin(b / 2).square()
    imag = torch.exp(a) * torch.sin(b)
    square = decay.square() + frequency.square()
    return (frequency * imag - decay * real) / square, (-decay * imag - frequency * real) / square, a, b


def hippo(n: int) -> tuple[Tensor, Tensor]:
    """The normal part of HiPPO-LegS of order 2n: imaginary parts of its eigenvalues ``-1/2 + i frequency`` of the upper
    half plane, ascending, shape ``(n,)``, and their eigenvectors, shape ``(2n, n)``; float64 and complex128.

    ``A_jk = -sqrt(2j+1) sqrt(2k+1)`` below the diagonal and ``-(j+1)`` on it; with ``p_j = sqrt(j + 1/2)``,
    ``A + p p^T`` is ``-1/2`` plus a skew-symmetric matrix.
    """
    index = torch.arange(2 * n, dtype=torch.float64)
    root = (2 * index + 1).sqrt()
    product = root[:, None] * root[None, :]
    skew = (product.triu(1) - product.tril(-1)) / 2
    frequency, vectors = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    return frequency[n:], vectors[:, n:]


__all__ = ["S5", "hippo", "zero_order_hold"]
