"""Ways to make a cut better right after it, which `refinement.py` compares. None is part of the library.

A reduced system is ``x_k = Lam x_{k-1} + B u_k, y_k = Re(C x_k)``, here a tuple ``(lam, B, C)`` of complex tensors of
shapes ``(r,)``, ``(r, p)`` and ``(q, r)``. Its impulse response is ``K_j = Re(C Lam^j B)``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compressm.observing.damage import LinearSample
from compressm.theory.balancing import Balancing, Reduction
from compressm.theory.gramians import real_gramians
from compressm.theory.systems import DiagonalSystem
from compressm.theory.truncation import diagonalise

System = tuple[Tensor, Tensor, Tensor]
Objective = Callable[[System], Tensor]
# Balanced dimensions below this share of the largest Hankel singular value are left out of a singular perturbation.
_FAST = 1e-7


def of(system: DiagonalSystem) -> System:
    """The tensors of a system."""
    return system.lam, system.B, system.C


def inner(one: System, other: System) -> Tensor:
    """``<G, H> = sum_j tr(K_j^T L_j)`` of two systems, in closed form: with ``(lam, B, C)`` and ``(mu, F, H)``

    1/2 Re sum_ab [ (C^T H)_ab (B F^T)_ab / (1 - lam_a mu_b) + (C^* H)_ab (conj(B) F^T)_ab / (1 - conj(lam_a) mu_b) ]
    """
    lam, B, C = one
    mu, F, H = other
    plain = (C.mT @ H) * (B @ F.mT) / (1 - lam[:, None] * mu)
    conjugate = (C.mH @ H) * (B.conj() @ F.mT) / (1 - lam.conj()[:, None] * mu)
    return (plain.sum().real + conjugate.sum().real) / 2


def h2_error(system: System) -> Objective:
    """``||G - G_r||_2^2 / ||G||_2^2``, by the closed form above; as in Sakamoto and Sato (arXiv 2507.10078)."""
    norm = inner(system, system)
    return lambda reduced: 1 + (inner(reduced, reduced) - 2 * inner(system, reduced)) / norm


def taps(system: System, length: int) -> Tensor:
    """``K_0 .. K_{length-1}``, shape ``(length, q, p)``."""
    lam, B, C = system
    powers = torch.exp(torch.arange(length, dtype=torch.float64)[:, None] * lam.log())
    return torch.einsum("qn,jn,np->jqp", C, powers, B).real


def weighted_error(system: System, u: Tensor, g: Tensor) -> Objective:
    """The H2 error weighted by the spectra of the layer's input and of the loss's gradients, relative to no layer.

        sum_w tr(S_g(w) E(w) S_u(w) E(w)^*),    E(w) = sum_j (1 - j / L) (K_j - K_rj) e^{-i w j}

    This is ``E[(sum_t g_t . dy_t)^2]``, twice the predicted divergence, if ``u`` and ``g`` are independent stationary
    processes. The factor ``1 - j / L`` is the share of a sequence's tokens that see its input j steps ago.

    Args:
        system: before the cut.
        u, g: the layer's inputs, and gradients at its outputs, shape ``(sequences, L, channels)``.
    """
    length = u.shape[1]
    inputs, gradients = (_spectrum(x.to(torch.float64)) for x in (u, g))
    seen = (1 - torch.arange(length, dtype=torch.float64) / length)[:, None, None]
    whole = taps(system, length)

    def power(kernel: Tensor) -> Tensor:
        E = torch.fft.rfft(seen * kernel, 2 * length, 0)
        return torch.einsum("fab,fbc,fcd,fad->", gradients, E, inputs, E.conj()).real

    norm = power(whole)
    return lambda reduced: power(whole - taps(reduced, length)) / norm


def _spectrum(x: Tensor) -> Tensor:
    """``E[X(w) X(w)^*]``, at the frequencies of a transform of twice the length, each as often as it occurs."""
    X = torch.fft.rfft(x, 2 * x.shape[1], 1)
    spectrum = torch.einsum("sfa,sfb->fab", X, X.conj()) / x.shape[0]
    often = torch.full((spectrum.shape[0], 1, 1), 2.0**0.5, dtype=torch.float64)
    often[0] = often[-1] = 1
    return spectrum * often


def refined(reduction: Reduction, objective: Objective, steps: int = 300) -> Reduction:
    """The reduction after an optimisation of its eigenvalues, B and C, by L-BFGS from the truncation; stable, since
    eigenvalues are ``exp(-exp(nu) + i phase)``."""
    lam, B, C = of(reduction.system)
    decay = -lam.abs().clamp_min(1e-12).log()
    sizes = B.norm(dim=1, keepdim=True), C.norm(dim=0, keepdim=True)  # free numbers are of order one
    free = [
        decay.log(),
        torch.zeros_like(decay),
        *(part.clone() for x, size in zip((B, C), sizes, strict=True) for part in (x.real / size, x.imag / size)),
    ]
    for x in free:
        x.requires_grad_()

    def system() -> System:
        nu, turn, B_re, B_im, C_re, C_im = free
        eigenvalues = torch.exp(torch.complex(-nu.exp(), lam.angle() + decay * turn))
        return eigenvalues, torch.complex(B_re, B_im) * sizes[0], torch.complex(C_re, C_im) * sizes[1]

    optimizer = torch.optim.LBFGS(free, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(system())
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    lam, B, C = (x.detach() for x in system())
    return replace(reduction, system=DiagonalSystem(lam, B, C))


@dataclass(frozen=True)
class Perturbed:
    """A singular perturbation: a reduction, and the direct term ``y += E u`` that belongs to it, shape ``(q, p)``."""

    reduction: Reduction
    direct: Tensor


def singular_perturbation(balancing: Balancing, cut: Reduction) -> Perturbed:
    """Removed states at their steady state instead of at zero (Liu and Anderson 1989), which keeps the gain at ``z=1``.

    With the balanced system in blocks, kept states first, and ``W = (I - A22)^-1 A21``:

        A_r = A11 + A12 W,             B_r = B1 + A12 (I - A22)^-1 B2,
        C_r = C1 + C2 W A_r^-1,        E = C2 (I - A22)^-1 B2 - C2 W A_r^-1 B_r

    ``E`` is a dense ``(q, p)`` matrix. A layer whose feed-through is a vector, ``D * u``, takes its diagonal only.

    Args:
        balancing: of the layer's system, by the real method.
        cut: the plain truncation of it; the result has no more states.
    """
    system, n = balancing.system, balancing.system.n
    resolved = int((balancing.hsv > _FAST * balancing.hsv[0]).sum())
    half = balancing.hsv[:resolved].rsqrt()
    to_new = half[:, None] * (balancing.U[:, :resolved].mT @ balancing.factor_Q.mT)
    to_old = (balancing.factor_P @ balancing.V[:, :resolved]) * half
    re, im = torch.diag(system.lam.real), torch.diag(system.lam.imag)
    A = to_new @ torch.cat([torch.cat([re, -im], 1), torch.cat([im, re], 1)]) @ to_old
    B = to_new @ torch.cat([system.B.real, system.B.imag])
    C = torch.cat([system.C.real, -system.C.imag], 1) @ to_old
    for order in range(min(2 * cut.system.n, resolved - 1), 0, -1):
        fast = torch.eye(resolved - order, dtype=torch.float64) - A[order:, order:]
        slaved, driven = torch.linalg.solve(fast, A[order:, :order]), torch.linalg.solve(fast, B[order:])
        A_r = A[:order, :order] + A[:order, order:] @ slaved
        B_r = B[:order] + A[:order, order:] @ driven
        C_r = C[:, :order] + C[:, order:] @ slaved @ torch.linalg.inv(A_r)
        modes = diagonalise(system.lam, to_new[:order], to_old[:, :order] + to_old[:, order:] @ slaved, "real")
        if modes.count > cut.system.n or not modes.stable:  # moments of data promise no stability
            continue
        r = modes.count
        basis = modes.left @ to_old[:, :order], to_new[:order] @ modes.right  # reduced coordinates to modes and back
        B_modes, C_modes = basis[0] @ B_r, C_r @ basis[1]
        reduced = DiagonalSystem(
            modes.lam,
            torch.complex(B_modes[:r], B_modes[r:]),
            torch.complex(C_modes[:, :r], -C_modes[:, r:]),
        )
        direct = C[:, order:] @ (driven - slaved @ torch.linalg.solve(A_r, B_r))
        return Perturbed(Reduction(reduced, modes.left, modes.right, cut.certificates), direct)
    raise ValueError(f"no order below {resolved} fits in {cut.system.n} of {n} states")


def gain_kept(system: DiagonalSystem, reduction: Reduction, direction: Tensor) -> Reduction:
    """The reduction with the least change of its C, in H2, that restores the response to a constant input.

        min ||dC||_P  with  dC x = (G(1) - G_r(1)) v,    x = (I - A_r)^-1 B_r v:    dC = (...) x^T P^-1 / (x^T P^-1 x)

    Args:
        system: before the cut.
        direction: the constant input v, shape ``(p,)``.
    """
    reduced, r, v = reduction.system, reduction.system.n, direction.to(torch.complex128)

    def response(of: DiagonalSystem) -> Tensor:
        return (of.C @ ((of.B @ v) / (1 - of.lam))).real

    steady = (reduced.B @ v) / (1 - reduced.lam)
    x = torch.cat([steady.real, steady.imag])
    P = real_gramians(reduced)[0]
    weighed = torch.linalg.lstsq(P + 1e-12 * P.trace() * torch.eye(2 * r, dtype=torch.float64), x).solution
    change = torch.outer(response(system) - response(reduced), weighed / (x @ weighed))
    C = reduced.C + torch.complex(change[:, :r], -change[:, r:])
    return replace(reduction, system=replace(reduced, C=C))


def distilled(
    layer: nn.Module, old: nn.Module, inputs: Sequence[Tensor], steps: int, rate: float, weight: Tensor | None = None
) -> list[float]:
    """Train a layer to give the old one's outputs on recorded inputs, by Adam. Nothing else of the model runs.

    Args:
        layer: the cut layer; changed.
        old: the layer before the cut.
        inputs: recorded batches of the layer's input, shape ``(batch, length, p)``; used in turn.
        steps, rate: of Adam; the rate falls to zero.
        weight: ``E[g g^T]`` of the loss's gradients at the output, shape ``(q, q)``; None for the identity.

    Returns:
        the error relative to the power of the old layer's recurrence, at every step.
    """
    old = copy.deepcopy(old).requires_grad_(False)
    with torch.no_grad():
        factor = torch.eye(inputs[0].shape[-1]) if weight is None else _root(weight)
        targets = [old(u) @ factor for u in inputs]
        power = torch.stack([y.square().mean() for y in targets]).mean()
    optimizer = torch.optim.Adam(layer.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    errors = list[float]()
    for step in range(steps):
        at = step % len(inputs)
        error = (layer(inputs[at]) @ factor - targets[at]).square().mean() / power
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        errors.append(float(error.detach()))
    return errors


def _root(weight: Tensor) -> Tensor:
    """The symmetric root of a matrix, in the scale in which its trace is its size, float32."""
    values, vectors = torch.linalg.eigh(weight.to(torch.float64) / weight.trace() * weight.shape[0])
    return ((vectors * values.clamp_min(0).sqrt()) @ vectors.mT).float()


def joined(passes: Sequence[Sequence[LinearSample]]) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of all recorded sequences, shape ``(sequences, length, channels)``."""
    calls = [call for one in passes for call in one]
    return torch.cat([call.u for call in calls]), torch.cat([call.g for call in calls])
