"""The base of all balanced layers: Hankel singular values, and the operator whose eigenvalues they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Balanced(ABC):
    """A layer's systems with their Hankel singular values.

    Attributes:
        hsv: Hankel singular values, decreasing, float64, shape ``(*batch, m)``.
    """

    hsv: Tensor

    @property
    @abstractmethod
    def energy(self) -> Tensor:
        """Hankel energy per state, decreasing, shape ``(*batch, n)``; rank rules read it."""

    @abstractmethod
    def hankel_operator(self) -> Tensor:
        """``(P^1/2 Q P^1/2)^1/2`` in the layer's own coordinates, shape ``(*batch, m, m)``. Its eigenvalues are the
        Hankel singular values."""

    @abstractmethod
    def state(self) -> Any:
        """The tensors from which the layer was balanced, as a dict or a list, for a checkpoint."""

    def mean_hsv(self) -> Tensor:
        """Hankel singular values, decreasing, shape ``(m,)``; their mean if the layer has several systems (channels of
        S4D, heads, groups)."""
        return self.hsv.reshape(-1, self.hsv.shape[-1]).mean(0)


def hankel_operator(P: Tensor, factor_Q: Tensor) -> Tensor:
    """``(P^1/2 Q P^1/2)^1/2`` with ``Q = L_Q L_Q*``, Hermitian.

    Args:
        P: Hermitian positive semidefinite, shape ``(*batch, m, m)``.
        factor_Q: ``L_Q``, same shape.
    """
    values, vectors = torch.linalg.eigh(P)
    root_P = (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mH
    left, singular, _ = torch.linalg.svd(root_P @ factor_Q)
    return (left * singular[..., None, :]) @ left.mH


__all__ = ["Balanced", "hankel_operator"]
