"""What data say about a linear layer: second moments of its states and of its adjoint states.

    P = E[x_t x_t^T],    Q = E[lambda_t lambda_t^T],    lambda_t = d loss / d x_t

in the stacked real coordinates ``(Re x, Im x)``, with the expectations over tokens, and with the loss of one sequence.
White inputs and white output gradients of unit variance give the Gramians of `balancing.real_gramians`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressm.errors import InvalidSystemError
from compressm.theory.gramians import real_gramians
from compressm.theory.sums import Sums
from compressm.theory.systems import DiagonalSystem

# Negative eigenvalues up to this share of the largest are rounding of float32 sums.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Covariances(Sums):
    """Second moments of the states and adjoint states of one layer, as sums that add over batches and processes.

    Attributes:
        tokens: number of tokens, shape ``()``. A layer that runs several times over a sequence counts its tokens every
            time.
        sequences: number of sequences, shape ``()``.
        weights: sum of the squares of the sequences' weights, shape ``()``; ``sequences`` where all weigh 1.
        states, adjoints: sums of ``x x^T`` and of ``lambda lambda^T``, shape ``(*batch, 2n, 2n)``.
        spread_states, spread_adjoints: sums over sequences of ``||sum_t x x^T||_F^2``, with every state divided by its
            amplitude under white noise (see `white_scales`), shape ``(*batch,)``.

    All are float64 on the CPU.
    """

    quadratic = frozenset({"weights", "spread_states", "spread_adjoints"})

    tokens: Tensor
    sequences: Tensor
    weights: Tensor
    states: Tensor
    adjoints: Tensor
    spread_states: Tensor
    spread_adjoints: Tensor

    @property
    def P(self) -> Tensor:
        """``E[x x^T]``, shape ``(*batch, 2n, 2n)``."""
        return _symmetric(self.states) / self.tokens

    @property
    def Q(self) -> Tensor:
        """``E[lambda lambda^T]``, shape ``(*batch, 2n, 2n)``."""
        return _symmetric(self.adjoints) / self.tokens

    @property
    def length(self) -> float:
        """Tokens per sequence."""
        return float(self.tokens / self.sequences)

    def independent(self, system: DiagonalSystem) -> tuple[Tensor, Tensor]:
        """How many independent tokens P and Q are worth, at least 1, shape ``(*batch,)`` each.

        Tokens of a sequence resemble each other; sequences are independent. The mean of N independent Gaussian vectors
        of covariance P has ``E||P_N - P||_F^2 = (tr(P)^2 + ||P||_F^2) / N``. The left side is estimated from how much
        the sequences differ, and N is solved for. Sequences count as equally long; where they are not, N comes out
        smaller.
        """
        scales = white_scales(system)
        pairs = zip((self.P, self.Q), (self.spread_states, self.spread_adjoints), scales, strict=True)
        P, Q = (self._samples(moment, spread, scale) for moment, spread, scale in pairs)
        return P, Q

    def _samples(self, moment: Tensor, spread: Tensor, scale: Tensor) -> Tensor:
        scaled = moment / scale[..., :, None] / scale[..., None, :]
        trace, square = scaled.diagonal(dim1=-2, dim2=-1).sum(-1), scaled.square().sum((-2, -1))
        once = float(self.weights / self.sequences**2)  # 1 / number of sequences, where they weigh alike
        if once >= 1:
            return torch.ones_like(trace)
        variance = (spread / self.tokens**2 - square * once) / (1 - once)
        count = (trace.square() + square) / variance.clamp_min(1e-300)
        return count.clamp(1.0, max(1.0, float(self.tokens)))


def white_scales(system: DiagonalSystem) -> tuple[Tensor, Tensor]:
    """Amplitude of every state and adjoint state under white noise, ``E[|x_i|^2]^1/2``, shape ``(*batch, 2n)`` each.

    Divided by these, states do not depend on the scale of their mode, which is free.
    """
    leak = -torch.expm1(2 * system.lam.abs().clamp_min(1e-300).log())
    states, adjoints = (
        power.real.div(leak).sqrt() for power in (system.B.abs().square().sum(-1), system.C.abs().square().sum(-2))
    )
    return _both(states), _both(adjoints)


def _both(scale: Tensor) -> Tensor:
    scale = torch.where(scale > 0, scale, 1.0)
    return torch.cat([scale, scale], -1)


def shrunk(
    system: DiagonalSystem, evidence: Covariances, alpha: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P and Q with a share of what white noise would give: directions that the data have not shown yet are kept.

        P' = (1 - alpha) P + alpha c P_white,    c = tr(Q P) / tr(Q P_white);    likewise Q'

    so that both terms put the same power into the loss, whatever basis the states are in.

    The posterior mean of a covariance under an inverse Wishart prior around ``c P_white``, with the fewest degrees of
    freedom that give the prior a mean (two more than dimensions), is that with ``alpha = 1 / (N + 1)``, where N is the
    number of independent tokens: the prior is worth one of them. See `Covariances.independent`.

    Args:
        system: the layer's, shape ``(*batch,)``.
        evidence: of the layer.
        alpha: in [0, 1], for both; by default as above.

    Returns:
        P', Q', shape ``(*batch, 2n, 2n)``; and the two alphas, shape ``(*batch,)``.
    """
    P, Q = evidence.P, evidence.Q
    if alpha is None:
        alpha_P, alpha_Q = (1 / (count + 1) for count in evidence.independent(system))
    else:
        alpha_P = alpha_Q = torch.full(P.shape[:-2], float(alpha), dtype=torch.float64)
    if alpha == 0:
        return P, Q, alpha_P, alpha_Q
    white_P, white_Q = real_gramians(system)
    return _mixed(P, white_P, Q, alpha_P), _mixed(Q, white_Q, P, alpha_Q), alpha_P, alpha_Q


def _mixed(data: Tensor, white: Tensor, other: Tensor, alpha: Tensor) -> Tensor:
    """``(1 - alpha) data + alpha c white``, with c from the traces of both with the other moment."""
    scale = _product(other, data) / _product(other, white).clamp_min(1e-300)
    return (1 - alpha)[..., None, None] * data + (alpha * scale)[..., None, None] * white


def check_evidence(system: DiagonalSystem, evidence: Covariances) -> None:
    """That the moments are those of a layer with this system.

    Raises:
        InvalidSystemError: other shapes, no tokens, entries that are not finite, or matrices that are no covariances.
    """
    expected = (*system.batch_shape, 2 * system.n, 2 * system.n)
    for name, moment in (("states", evidence.states), ("adjoints", evidence.adjoints)):
        if tuple(moment.shape) != expected:
            raise InvalidSystemError(
                f"{name} has shape {tuple(moment.shape)}; a layer of {system.n} states needs {expected}: gather the "
                "moments again after every cut"
            )
        if not bool(torch.isfinite(moment).all()):
            raise InvalidSystemError(
                f"the second moments of the layer's {name} are not finite: go back to a checkpoint from before the "
                "model diverged, or lower the learning rate"
            )
    if not float(evidence.tokens) > 0:
        raise InvalidSystemError("tokens is 0; the layer must have seen at least one: pass data through the model")
    for name, moment in (("states", evidence.states), ("adjoints", evidence.adjoints)):
        values = torch.linalg.eigvalsh(_symmetric(moment))
        if bool((values[..., 0] < -_ROUNDING * values[..., -1].abs()).any()):
            raise InvalidSystemError(
                f"{name} has the eigenvalue {float(values.min()):.3g}; second moments are positive semidefinite: sum "
                "outer products"
            )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``tr(a b)``."""
    return (a * b.mT).sum((-2, -1))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


__all__ = ["Covariances", "check_evidence", "shrunk", "white_scales"]
