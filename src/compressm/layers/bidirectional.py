"""Two layers, one for each direction of time."""

from __future__ import annotations

from torch import Tensor, nn

from compressm.layers.padding import checked_lengths, reverse, within


class Bidirectional(nn.Module):
    """Reads a sequence in both directions and adds the outputs: ``y = forwards(u) + reversed(backwards(reversed(u)))``.

    Each direction has its own states and is cut by itself, to the rank that it needs. In ``S5(bidirectional=True)``
    both directions share their states and are cut together.

    Args:
        forwards, backwards: two layers from ``(batch, length, d_model)`` to the same shape, of any kind.
    """

    def __init__(self, forwards: nn.Module, backwards: nn.Module) -> None:
        super().__init__()
        if forwards is backwards:
            raise ValueError("forwards and backwards must be two layers; one layer for both has no states of its own")
        self.forwards, self.backwards = forwards, backwards

    def present(self, u: Tensor, lengths: Tensor | None = None) -> Tensor | None:
        """Which of the inputs count and which are padding, bool, shape ``(batch, length)``; None where all count."""
        return None if lengths is None else within(lengths.to(u.device), u.shape[1])

    def forward(self, u: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The output, of the shape of ``u``. Its values at padding are meaningless.

        Args:
            u: shape ``(batch, length, d_model)``.
            lengths: length of each sequence if rows are padded at their end, integers of at least 1, shape
                ``(batch,)``. Each sequence is reversed within its own length. None for full rows.
        """
        if lengths is not None:
            lengths = checked_lengths(lengths, *u.shape[:2]).to(u.device)
        return self.forwards(u) + reverse(self.backwards(reverse(u, lengths)), lengths)
