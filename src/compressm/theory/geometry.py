"""The sizes of a layer's recurrence, from which follow the bytes that it carries and the kernels that take it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

# Recurrences as kernels distinguish them: S6 (Mamba), SSD (Mamba-2, linear attention with one decay per head), SSD with
# rotations (Mamba-3), the delta rule, a decay per key (gated linear attention), the delta rule with a decay per key
# (KDA), channels that are states (RG-LRU), and linear time-invariant systems.
Kind = Literal["s6", "ssd", "rotated", "delta", "gla", "kda", "channels", "lti"]


@dataclass(frozen=True)
class Geometry:
    """What a layer carries from one token of a sequence to the next.

    Attributes:
        kind: the recurrence.
        states: the state dimension N, which a cut reduces.
        channels: numbers of the recurrence's state per state: the state holds ``channels * states`` numbers.
        groups: how many vectors B (key heads) there are per token.
        heads: how many heads (value heads) the recurrence has; ``channels`` where every channel decays by itself.
        convolved: channels of the short convolutions before the recurrence. Of Mamba-3, which has none: the numbers
            that it keeps beside its state, one for every channel and the rest in proportion to the states.
        keys_convolved: whether B and C (keys and queries) are among these channels. False if the convolutions read the
            layer's input. In S6, whose convolution reads x alone, it has no meaning.
        window: inputs that these convolutions keep of every channel.
        state_dtype, window_dtype: of the numbers that are kept.
    """

    kind: Kind
    states: int
    channels: int
    groups: int = 1
    heads: int = 1
    convolved: int = 0
    keys_convolved: bool = True
    window: int = 0
    state_dtype: torch.dtype = torch.float32
    window_dtype: torch.dtype = torch.float32

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrence's state of one sequence."""
        return self.channels * self.states * self.state_dtype.itemsize

    @property
    def window_bytes(self) -> int:
        """Bytes of the convolutions' last inputs of one sequence."""
        return self.convolved * self.window * self.window_dtype.itemsize

    def resized(self, states: int) -> Geometry:
        """The geometry after a cut to another state dimension. In RG-LRU the states are the convolution's channels."""
        convolved = self.convolved
        if self.kind == "channels":
            convolved = convolved * states // self.states
        elif self.kind == "rotated":
            convolved = self.channels + (convolved - self.channels) * states // self.states
        elif convolved and self.keys_convolved and self.kind != "s6":
            convolved += 2 * self.groups * (states - self.states)
        return replace(self, states=states, convolved=convolved)

    @property
    def head_dim(self) -> int:
        """Channels of one head (value dimension)."""
        return self.channels // self.heads


__all__ = ["Geometry", "Kind"]
