"""Long convolutions as state space models: balanced truncation of a filter by its Hankel matrix.

A filter ``h_0 .. h_{L-1}`` is a system of order L: a delay line, ``x_k = N x_{k-1} + e_1 u_k``, ``y_k = h . x_k``. Its
controllability Gramian is the identity. Its observability Gramian is the square of the Hankel matrix ``H_ij = h_{i+j}``
(zero beyond the end). So its Hankel singular values are the absolute eigenvalues of the symmetric ``H = V diag(mu)
V^T``. With ``s = |mu|``, balanced truncation to the r largest of them gives

    A = s^1/2 V^T N V s^-1/2,   B = s^1/2 V_1,   C = h^T V s^-1/2,   ||G - G_r||_inf <= 2 sum_{i>r} s_i

This is the method of Ho and Kalman (1966) in Kung's form (1978), applied to the whole filter. Distillation of trained
filters is due to Massaroli et al. (Laughing Hyena, 2023), who fit poles by gradient descent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.s5 import hold
from compressm.errors import InvalidRankRuleError, InvalidSystemError, UnsupportedModelError
from compressm.layers.hyena import Convolution
from compressm.layers.s4d import S4D
from compressm.theory.certificate import MAX_CONDITION
from compressm.theory.systems import DiagonalSystem, decay_rate


@dataclass(frozen=True)
class Realization:
    """State space models that approximate filters.

    Attributes:
        system: one per filter, shape ``(filters,)``, single input, single real output. Those with fewer states than
            others are padded with states whose C is zero.
        hsv: Hankel singular values of the filters, decreasing, shape ``(filters, L)``.
        bound: ``2 sum`` of the discarded ones, the bound of the H-infinity error, shape ``(filters,)``.
        h2_error, h2_norm: H2 norms of the difference, over all time and not only the filter's length, and of the
            filters, shape ``(filters,)``.
    """

    system: DiagonalSystem
    hsv: Tensor
    bound: Tensor
    h2_error: Tensor
    h2_norm: Tensor

    @property
    def relative_h2_error(self) -> float:
        """``||G - G_r||_2 / ||G||_2`` of all filters together."""
        return float(self.h2_error.norm() / self.h2_norm.norm().clamp_min(1e-300))


def realize(filters: Tensor, order: int) -> Realization:
    """State space models of a given order for filters, by balanced truncation of their delay lines.

    Takes ``O(L^3)`` operations per filter, in float64 on the CPU: 0.1 s for L = 1,000.

    Args:
        filters: impulse responses, shape ``(filters, L)``.
        order: real order, at most: a complex state counts for two, and for one if its eigenvalue is real.

    Raises:
        InvalidRankRuleError: order below 1.
        InvalidSystemError: filters of another shape, or not finite.
    """
    if order < 1:
        raise InvalidRankRuleError(f"order must be at least 1; got {order}")
    if filters.ndim != 2 or 0 in filters.shape:
        raise InvalidSystemError(f"filters must be (filters, L); got {tuple(filters.shape)}")
    h = filters.detach().to("cpu", torch.float64)
    if not bool(h.isfinite().all()):
        raise InvalidSystemError("filters must be finite; the layer has diverged")
    parts = [_realize_one(response, min(order, h.shape[1])) for response in h]
    states = max(part[0].shape[0] for part in parts)

    def stacked(values: list[Tensor], fill: float) -> Tensor:
        return torch.stack([F.pad(v, (0, states - v.shape[0]), value=fill) for v in values])

    # A padding state gets an eigenvalue that is not zero, so that it can be trained.
    lam, c = stacked([part[0] for part in parts], 0.5), stacked([part[1] for part in parts], 0.0)
    hsv, bound = torch.stack([part[2] for part in parts]), torch.stack([2 * part[2][part[3] :].sum() for part in parts])
    system = DiagonalSystem(lam, torch.ones_like(lam)[..., None], c[:, None])
    length = h.shape[1]
    within = h - system.kernel(length)[..., 0, 0]
    beyond = DiagonalSystem(lam, system.B, (c * lam**length)[:, None]).h2_norm()
    error = (within.square().sum(1) + beyond.square()).sqrt()
    return Realization(system, hsv, bound, error, h.norm(dim=1))


def _realize_one(h: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Eigenvalues and residues of complex states, all Hankel singular values, and the order realised, of one filter.

    A delay line is not diagonalisable, and models of nearly its order are ill conditioned. So the order is lowered
    until the eigenvectors are well conditioned.
    """
    length = h.shape[0]
    index = torch.arange(length)
    padded = torch.cat([h, h.new_zeros(length)])
    mu, vectors = torch.linalg.eigh(padded[index[:, None] + index])
    decreasing = mu.abs().argsort(descending=True)
    hsv = mu[decreasing].abs()
    resolved = int((hsv > hsv[0] * length * torch.finfo(h.dtype).eps).sum())
    order = min(order, resolved)
    while order > 0:
        V, half = vectors[:, decreasing[:order]], hsv[:order].sqrt()
        A = half[:, None] * (V[1:].mT @ V[:-1]) / half
        eigenvalues, basis = torch.linalg.eig(A)
        values = torch.linalg.svdvals(basis)
        if bool((eigenvalues.abs() < 1).all()) and float(values[0]) < MAX_CONDITION * float(values[-1]):
            residues = ((h @ V) / half).to(basis) @ basis * torch.linalg.solve(basis, (half * V[0]).to(basis))
            upper, real = eigenvalues.imag > 0, eigenvalues.imag == 0
            # y = Re(sum c lam^j): a conjugate pair is one state with twice its residue.
            return (
                torch.cat([eigenvalues[upper], eigenvalues[real]]),
                torch.cat([2 * residues[upper], residues[real]]),
                hsv,
                order,
            )
        order -= 1  # also because equal Hankel singular values on both sides of the cut leave a mode on the unit circle
    return torch.full((1,), 0.5, dtype=torch.complex128), torch.zeros(1, dtype=torch.complex128), hsv, 0


@dataclass(frozen=True)
class FilterReport:
    """The report of one layer's filters.

    Attributes:
        name: the convolution's name in the model.
        length: of the filters that were realised.
        order, states: the requested real order, and the number of complex states of the new layer.
        relative_h2_error: of all channels together, over all time.
        largest_bound: the largest H-infinity error bound of any channel.
        largest_gain: the largest ``2 sum`` of all Hankel singular values of any channel, for comparison.
    """

    name: str
    length: int
    order: int
    states: int
    relative_h2_error: float
    largest_bound: float
    largest_gain: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)


def distil(model: nn.Module, order: int = 16, length: int | None = None) -> tuple[FilterReport, ...]:
    """Replace every long convolution of a model, and every S4, by a diagonal state space model, in place.

    Each is replaced by an `S4D`, which can be trained and cut further, and generates in constant time per token. Build
    optimizers after this call, since the convolution's parameters no longer exist.

    Args:
        model: any module that contains a `compressm.layers.Convolution`: `Hyena` models and `S4`.
        order: real order per channel.
        length: how many entries of the filters to take, by default all: ``max_length``.

    Returns:
        a report of each convolution, in the order of the model.

    Raises:
        UnsupportedModelError: the model has no long convolution.
        InvalidRankRuleError, InvalidSystemError: see `realize`. The model is then unchanged.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Convolution)}
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no long convolution (compressm.layers.Convolution) to distil"
        )
    reports, layers = list[FilterReport](), dict[str, S4D]()
    for name, convolution in found.items():
        taps = convolution.max_length if length is None else length
        with torch.no_grad():
            realization = realize(convolution.filter(taps).T, order)
        layers[name] = as_s4d(realization.system, convolution.D)
        reports.append(
            FilterReport(
                name,
                taps,
                order,
                realization.system.n,
                realization.relative_h2_error,
                float(realization.bound.max()),
                2 * float(realization.hsv.sum(1).max()),
            )
        )
    for name, layer in layers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, layer)
    return tuple(reports)


def as_s4d(system: DiagonalSystem, D: Tensor) -> S4D:
    """An `S4D` that computes single-input single-output systems, one per channel, plus ``D u``.

    Args:
        system: shape ``(channels,)``, real output.
        D: shape ``(channels,)``; gives dtype and device.
    """
    lam, residues = system.lam, system.C[:, 0] * system.B[..., 0]
    decay = decay_rate(lam)
    log_step = decay.log().mean(1, keepdim=True)  # rates of order one, the scale for which S4D is designed
    frequency = lam.angle() / log_step.exp()
    log_decay = decay.log() - log_step
    gain, _ = hold(log_decay, frequency, log_step)
    C = residues / (2 * gain)
    layer = S4D(lam.shape[0], lam.shape[1]).to(D.device, D.dtype)
    values = {
        "log_decay": log_decay, "frequency": frequency, "log_step": log_step[:, 0], "C_re": C.real, "C_im": C.imag,
    }  # fmt: skip
    with torch.no_grad():
        for name, value in values.items():
            layer.get_parameter(name).copy_(value)
        layer.D.copy_(D)
    return layer


__all__ = ["FilterReport", "Realization", "as_s4d", "distil", "realize"]
