"""Two layers, one for each direction of time."""

from __future__ import annotations

from torch import Tensor, nn


class Bidirectional(nn.Module):
    """Reads a sequence in both directions and adds the outputs: ``y = forwards(u) + reversed(backwards(reversed(u)))``.

    The directions have states of their own, and are cut apart, each to the rank that it needs. Where both share their
    states, as in ``S5(bidirectional=True)``, they are cut together.

    Args:
        forwards, backwards: two layers from ``(batch, length, d_model)`` to the same shape, of any kind.
    """

    def __init__(self, forwards: nn.Module, backwards: nn.Module) -> None:
        super().__init__()
        if forwards is backwards:
            raise ValueError("forwards and backwards must be two layers; one layer for both has no states of its own")
        self.forwards, self.backwards = forwards, backwards

    def forward(self, u: Tensor) -> Tensor:
        return self.forwards(u) + self.backwards(u.flip(1)).flip(1)
