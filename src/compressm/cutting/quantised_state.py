"""Optimizer state that is stored in few bits: read as ordinary numbers, and written again.

bitsandbytes stores codes in blocks: the value of an entry is ``qmap[code] absmax[block]``. torchao has tensors of its
own classes, which can be read (``dequantize``) and copied into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_quantised(state: Mapping[str, Any], key: str) -> bool:
    """Whether an entry of a parameter's state is stored in few bits."""
    value = state.get(key)
    return isinstance(value, Tensor) and (_is_wrapper(value) or _has_codes(state, key))


def read_state(state: Mapping[str, Any], key: str) -> Tensor:
    """An entry of a parameter's state as ordinary numbers, in float64 on the CPU."""
    value: Tensor = state[key]
    if _is_wrapper(value):
        value = value.dequantize()
    elif _has_codes(state, key):
        number = key[len("state") :]
        absmax, codes = state[f"absmax{number}"], value.flatten().int()
        scale = absmax.repeat_interleave(_block(value, absmax))[: codes.numel()]
        value = (state[f"qmap{number}"][codes] * scale).view(value.shape)
    return value.detach().to("cpu", torch.float64)


def write_state(state: Mapping[str, Any], key: str, new: Tensor) -> None:
    """Write ordinary numbers into an entry of a parameter's state, in place.

    Args:
        state: holds an entry of the right shape already.
        key: of the entry.
        new: the numbers, of the entry's shape.
    """
    value: Tensor = state[key]
    if not _has_codes(state, key):
        value.copy_(new.to(value.device, torch.float32) if _is_wrapper(value) else new.to(value))
        return
    number = key[len("state") :]
    absmax, qmap = state[f"absmax{number}"], state[f"qmap{number}"]
    block, flat = _block(value, absmax), new.flatten().to(qmap)
    padded = torch.nn.functional.pad(flat, (0, block * absmax.numel() - flat.numel())).view(-1, block)
    largest = padded.abs().amax(1)
    absmax.copy_(largest)
    share = padded / torch.where(largest > 0, largest, 1)[:, None]
    middles = (qmap[1:] + qmap[:-1]) / 2
    codes = torch.searchsorted(middles, share).flatten()[: flat.numel()]
    value.copy_(codes.view(value.shape).to(value.dtype))


def _is_wrapper(value: Tensor) -> bool:
    return type(value).dequantize is not Tensor.dequantize


def _has_codes(state: Mapping[str, Any], key: str) -> bool:
    return key.startswith("state") and state[key].dtype == torch.uint8 and f"absmax{key[len('state') :]}" in state


def _block(codes: Tensor, absmax: Tensor) -> int:
    """Entries of a block: a power of two, of which the last block may have fewer."""
    return 1 << (-(-codes.numel() // absmax.numel()) - 1).bit_length()


__all__ = ["is_quantised", "read_state", "write_state"]
