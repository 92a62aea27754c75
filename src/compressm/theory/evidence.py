"""Evidence of a linear layer: second moments of its states and of its adjoint states on data.

    P = E[x_t x_t^T],    Q = E[lambda_t lambda_t^T],    lambda_t = d loss / d x_t

in the stacked real coordinates ``(Re x, Im x)``. The expectations are over tokens; the loss is that of one sequence.
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

# Negative eigenvalues up to this share of the largest are rounding errors of float32 sums.
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
        """Effective numbers of independent tokens behind P and Q, at least 1, shape ``(*batch,)`` each.

        Tokens of one sequence are correlated; sequences are independent. The sample covariance ``P_N`` of N independent
        Gaussian vectors of covariance P has ``E||P_N - P||_F^2 = (tr(P)^2 + ||P||_F^2) / N``. The left side is
        estimated from the variance between sequences, and the equation is solved for N. The estimate treats sequences
        as equally long; if they are not, N comes out smaller.
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

    The scale of a mode is arbitrary. States divided by these amplitudes do not depend on it.
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
    """P and Q shrunk towards the Gramians, which keeps directions that the data have not shown yet.

        P' = (1 - alpha) P + alpha c P_white,    c = tr(Q P) / tr(Q P_white);    likewise Q'

    With this c both terms put the same power into the loss, in every basis of the states.

    With ``alpha = 1 / (N + 1)``, where N is the number of independent tokens (see `Covariances.independent`), P' is the
    posterior mean of a covariance under an inverse Wishart prior around ``c P_white``. The prior has the fewest degrees
    of freedom for which its mean exists (two more than dimensions), and counts as much as one token.

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
    """``(1 - alpha) data + alpha c white``, with ``c = tr(other data) / tr(other white)``."""
    scale = _product(other, data) / _product(other, white).clamp_min(1e-300)
    return (1 - alpha)[..., None, None] * data + (alpha * scale)[..., None, None] * white


def check_evidence(system: DiagonalSystem, evidence: Covariances) -> None:
    """Check that the moments fit a layer with this system.

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
