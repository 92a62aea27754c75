"""The scan of a diagonal linear time-invariant system with several inputs and outputs.

    x_k = diag(lam) x_{k-1} + B u_k,   y_k = Re(C x_k) + D u_k,   lam = exp(log_radius + i phase)

The states of all steps (batch x length x n) are never stored. There are three forms, and the one with the lowest count
of operations is used:

- ``direct`` (`lti_direct`): step by step, in one compiled pass on a CPU, with one sequence per vector lane. Best for
  narrow layers and batches that fill the lanes.
- ``chunked`` (`lti_chunked`): a block-Toeplitz matrix of the impulse response inside chunks of T steps, and a chain of
  states between chunks. All large operations are real matrix products; the cost grows with n.
- ``fft`` (`lti_fft`): convolution with the whole impulse response. The cost per sequence does not depend on n. Best
  for narrow layers with large states.

Negligible powers of ``lam`` are set to exactly zero (see `powers`). They would otherwise become denormal floats, which
slow a CPU down by a factor of twenty.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from compressm.scans import lti_chunked, lti_direct, lti_fft, native, rates
from compressm.scans.frame import check_engine, check_shapes, empty, empty_scan, loop, without_autocast
from compressm.scans.graph import exporting
from compressm.scans.transforms import transformed

Engine = Literal["auto", "direct", "chunked", "fft", "loop"]


@overload
def lti_scan(
    u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor,
    initial_state: Tensor | None = None, return_state: Literal[False] = False, engine: Engine = "auto",
    D: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def lti_scan(
    u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor,
    initial_state: Tensor | None = None, *, return_state: Literal[True], engine: Engine = "auto",
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@without_autocast
def lti_scan(
    u: Tensor,
    log_radius: Tensor,
    phase: Tensor,
    B_re: Tensor,
    B_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    engine: Engine = "auto",
    D: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the system over a batch of sequences; differentiable in every tensor argument.

    Args:
        u: real input, shape ``(batch, length, p)``; half precision is widened to float32 inside.
        log_radius: ``log |lam|``, negative, shape ``(n,)``.
        phase: ``arg lam`` in radians, shape ``(n,)``.
        B_re, B_im: input matrix, shape ``(n, p)``.
        C_re, C_im: output matrix, shape ``(q, n)``.
        initial_state: ``x_{-1}`` as real and imaginary part, shape ``(batch, 2, n)``; zero by default.
        return_state: also return the state after the last step.
        engine: ``"direct"`` (compiled, on CPUs), ``"chunked"``, ``"fft"`` (without states), or ``"loop"``, the
            definition, for reference; ``"auto"`` takes the one with the lowest count of operations.
        D: diagonal feedthrough, shape ``(p,)`` with ``q = p``; none by default.

    Returns:
        ``y``, real, shape ``(batch, length, q)``, of the dtype of ``u``; with ``return_state`` also the last state,
        shape ``(batch, 2, n)``.

    Raises:
        ValueError: shapes that do not fit together, an unknown engine, ``"fft"`` with a state, or ``"direct"`` where
            there are no compiled kernels.
    """
    check_engine(engine, "auto", "direct", "chunked", "fft", "loop")
    _check(u, log_radius, phase, B_re, B_im, C_re, C_im, initial_state, D)
    dtype = torch.promote_types(torch.promote_types(u.dtype, B_re.dtype), torch.float32)
    poles = (log_radius.to(dtype), phase.to(dtype))
    system = (*poles, B_re.to(dtype), B_im.to(dtype), C_re.to(dtype), C_im.to(dtype))
    feedthrough = None if D is None else D.to(dtype)
    stateful = initial_state is not None or return_state
    if engine == "fft" and stateful:
        raise ValueError('engine="fft" knows no states: use "chunked" with initial_state or return_state')
    start = None if initial_state is None else initial_state.to(dtype)
    if engine == "auto" and not empty(u):
        engine = _cheapest(u, C_re.shape[0], C_re.shape[1], stateful)
    y, state = _by_engine(engine, u.to(dtype), system, feedthrough, start)
    return (y.to(u.dtype), state) if return_state else y.to(u.dtype)


def _by_engine(
    engine: Engine, u: Tensor, system: tuple[Tensor, ...], D: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs and last state, for tensors of one dtype. ``"fft"`` returns the initial state, which is not used."""
    log_radius, phase, B_re, B_im, C_re, C_im = system
    start = u.new_zeros(u.shape[0], 2, C_re.shape[1]) if initial is None else initial
    if empty(u):
        return empty_scan((*u.shape[:2], C_re.shape[0]), start, u, *system, D)
    if engine in ("direct", "fft") and transformed():
        engine = "chunked"
    if engine == "direct":
        if not native.usable(u):
            raise ValueError(f'engine="direct" needs the compiled kernels, and a CPU; u is on {u.device}')
        return lti_direct.scan(u, log_radius, phase, B_re, B_im, C_re, C_im, D, initial)
    if engine == "fft":
        return lti_fft.scan(u, log_radius, phase, B_re, B_im, C_re, C_im, D), start
    if engine == "chunked":
        y, state = lti_chunked.scan(u, log_radius, phase, B_re, B_im, C_re, C_im, start)
    else:
        y, state = loop(lambda x, u: lti_step(x, u, log_radius, phase, B_re, B_im, C_re, C_im), start, u)
    return (y if D is None else torch.addcmul(y, D, u)), state


def lti_step(
    state: Tensor, u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor
) -> tuple[Tensor, Tensor]:
    """One step, for generation and control.

    Args:
        state: real and imaginary part, shape ``(batch, 2, n)``.
        u: shape ``(batch, p)``.
        log_radius, phase, B_re, B_im, C_re, C_im: the system, as for `lti_scan`.

    Returns:
        ``y`` of shape ``(batch, q)`` and the next state.
    """
    radius = log_radius.exp()
    lam_re, lam_im = radius * phase.cos(), radius * phase.sin()
    re, im = state[:, 0], state[:, 1]
    added = (u @ torch.cat([B_re, B_im]).T).view_as(state)
    state = torch.stack([lam_re * re - lam_im * im, lam_re * im + lam_im * re], 1) + added
    return state.flatten(1) @ torch.cat([C_re, -C_im], 1).T, state


def _check(
    u: Tensor, log_radius: Tensor, phase: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor,
    initial_state: Tensor | None, D: Tensor | None,
) -> None:  # fmt: skip
    if u.ndim != 3 or C_re.ndim != 2:
        raise ValueError(f"u must be (batch, length, p) and C_re (q, n); got {tuple(u.shape)} and {tuple(C_re.shape)}")
    (batch, _, p), (q, n) = u.shape, C_re.shape
    if D is not None and q != p:
        raise ValueError(f"D is diagonal: it needs as many outputs as inputs; got q = {q} and p = {p}")
    check_shapes(
        {"u": u, "C_re": C_re},
        {
            "log_radius": (log_radius, (n,)),
            "phase": (phase, (n,)),
            "B_re": (B_re, (n, p)),
            "B_im": (B_im, (n, p)),
            "C_im": (C_im, (q, n)),
            "initial_state": (initial_state, (batch, 2, n)),
            "D": (D, (p,)),
        },
    )


def _cheapest(u: Tensor, q: int, n: int, stateful: bool) -> Engine:
    """The form with the fewest operations, each weighted by the inverse of its speed.

    The weights are for a CPU with vector units, relative to a large matrix product. On a GPU small products and
    transforms are slower than that, so the FFT has to win by a margin.
    """
    (batch, length, p), size = u.shape, u.element_size()
    if exporting():
        return "chunked"
    costs: dict[Engine, float] = {"chunked": lti_chunked.cost(batch, length, p, q, n)}
    if not stateful:
        costs["fft"] = lti_fft.cost(batch, length, p, q, n, lti_fft.compiled(u, q), size)
    if native.usable(u):
        costs["direct"] = lti_direct.cost(batch, length, p, q, n, size)
    if native.usable(u):
        costs = {name: value * rates.factor(name) for name, value in costs.items()}
    best: Engine = "chunked"
    for name, value in costs.items():  # not min(), since under torch.compile the costs are symbolic
        if value < costs[best]:
            best = name
    return best
