"""The geometry of a selective layer's recurrence, read off its signals for one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressm.errors import UnsupportedModelError
from compressm.theory.geometry import Geometry, Kind
from compressm.theory.recurrence import Signals


def of_signals(
    layer: nn.Module,
    signals: Signals,
    *,
    states: int,
    keys_convolved: bool,
    keeps_last: bool,
    state_dtype: torch.dtype | None,
) -> Geometry:
    """The geometry of a selective layer.

    Args:
        layer: only read.
        signals: of its recurrence for one token, see `one_token`.
        states: its state dimension.
        keys_convolved: whether B and C pass through the convolutions.
        keeps_last: whether the convolution's window includes the present input, as in transformers and mamba_ssm.
        state_dtype: of the recurrence's state; None for that of the signals.
    """
    convolutions = [one for one in layer.modules() if isinstance(one, nn.Conv1d)]
    channels, kind = signals.x.shape[-1], _kind(signals)
    taps = max((one.kernel_size[0] for one in convolutions), default=0)
    return Geometry(
        kind,
        states,
        channels,
        groups=signals.B.shape[2],
        heads=_heads(layer, kind, channels, signals.B.shape[2]),
        convolved=sum(one.weight.shape[0] for one in convolutions),
        keys_convolved=keys_convolved,
        window=taps - (0 if keeps_last else min(taps, 1)),
        state_dtype=signals.x.dtype if state_dtype is None else state_dtype,
        window_dtype=convolutions[0].weight.dtype if convolutions else torch.float32,
    )


def one_token(layer: nn.Module) -> Tensor:
    """A token of zeros for a layer, shape ``(1, 1, d_model)``, with the dtype and device of its first projection.

    The width is the layer's ``hidden_size`` where it tells one, as those of transformers do: the projection that was
    built first may be the one at the layer's end (Qwen3.5). Elsewhere it is what the first projection reads.

    Raises:
        UnsupportedModelError: the layer has no projection, so that its width is not known.
    """
    for module in layer.modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, Tensor):
            told: Any = getattr(layer, "hidden_size", None)
            return weight.new_zeros(1, 1, told if isinstance(told, int) else module.in_features)
    raise UnsupportedModelError(
        f"{type(layer).__name__} has no linear projection that tells its width: override its adapter's geometry"
    )


def _kind(signals: Signals) -> Kind:
    if signals.gain is not None and signals.gain.ndim == 4:
        return "channels"
    by_state = signals.step.ndim == 4 or signals.step.shape[-1] != signals.x.shape[-1]
    if signals.erase is not None:
        return "kda" if by_state else "delta"
    if by_state:
        return "gla"
    return "ssd" if signals.rates.numel() == 1 else "s6"


_HEADS = ("num_v_heads", "num_value_heads", "num_heads", "n_heads", "nheads", "n_head")


def _heads(layer: nn.Module, kind: Kind, channels: int, groups: int) -> int:
    """The number of heads that a layer's attributes tell, as far as it divides the channels."""
    if kind in ("s6", "channels"):
        return channels
    named = (getattr(layer, name, None) for name in _HEADS)
    found = next((count for count in named if isinstance(count, int) and count > 0), groups)
    return found if channels % found == 0 else groups


__all__ = ["of_signals", "one_token"]
