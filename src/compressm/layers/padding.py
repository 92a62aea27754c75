"""Sequences of unequal length in one batch: each is followed by padding up to the end of its row.

The outputs of a causal layer do not depend on the padding after a sequence. Three operations need the lengths. A layer
that reads backwards reverses each sequence within its own length. A mean over time and the statistics of a batch norm
leave padding out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def checked_lengths(lengths: Tensor, batch: int, length: int) -> Tensor:
    """Check the lengths of a batch's sequences, and return them.

    Args:
        lengths: integers from 1 to ``length``, shape ``(batch,)``.
        batch: number of sequences.
        length: length of the rows, including padding.

    Raises:
        ValueError: another shape, no integers, or integers outside of that range.
    """
    if not isinstance(lengths, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"lengths must be a tensor of whole numbers of shape ({batch},); got {lengths!r:.60}")
    whole = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if not whole or lengths.ndim != 1 or lengths.shape[0] != batch:  # this form keeps sizes dynamic in a trace
        raise ValueError(
            f"lengths must be whole numbers of shape ({batch},), one for each sequence; got {lengths.dtype} of shape "
            f"{tuple(lengths.shape)}"
        )
    if torch.compiler.is_compiling() or not batch:
        return lengths
    fits = (lengths >= 1).logical_and(lengths <= length).all()
    if lengths.device.type != "cpu":  # reading the answer would make the host wait for the device
        torch.ops.aten._assert_async.msg(fits, f"lengths must be from 1 to {length}, the length of the padded rows")
    elif not fits:
        raise ValueError(
            f"lengths must be from 1 to {length}, the length of the padded rows; got {int(lengths.min())} to "
            f"{int(lengths.max())}"
        )
    return lengths


def within(lengths: Tensor, length: int) -> Tensor:
    """True within the sequences, False at padding: lengths ``(batch,)`` to bool ``(batch, length)``."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def checked_padding(padding: int | None, vocabulary: int | None) -> int | None:
    """Check the token that pads sequences, and return it; None if every token counts.

    Raises:
        ValueError: it is not a token of the vocabulary, or the model has no vocabulary.
    """
    if padding is None:
        return None
    if vocabulary is None:
        raise ValueError(f"padding={padding!r} is a token, and this model takes numbers: pass lengths= to its forward")
    whole = isinstance(padding, int) and not isinstance(padding, bool)  # the value may come from a file
    if not whole or not 0 <= padding < vocabulary:
        raise ValueError(
            f"padding must be a token, 0 to {vocabulary - 1}, or None where every token counts; got {padding!r}"
        )
    return padding


def counted(u: Tensor, lengths: Tensor | None, padding: int | None) -> Tensor | None:
    """False at padding, bool, shape ``(batch, length)``, or ``(batch,)`` for one step; None if there is no padding.

    Args:
        u: tokens or numbers, shape ``(batch, length, ...)``; for one step ``(batch, ...)``.
        lengths: lengths of the sequences, shape ``(batch,)``. If given, ``padding`` is ignored.
        padding: the token that pads; None if there is none.
    """
    if lengths is not None:
        return within(checked_lengths(lengths, *u.shape[:2]).to(u.device), u.shape[1])
    return None if padding is None else u != padding


def blank(u: Tensor, present: Tensor | None) -> Tensor:
    """Set padding to zero. Its values may be anything, even NaN.

    Args:
        u: shape ``(batch, length, ...)``.
        present: False at padding, bool, shape ``(batch, length)``; None if there is no padding.
    """
    return u if present is None else u.masked_fill(~present.view(*present.shape, *[1] * (u.ndim - present.ndim)), 0)


def ends(present: Tensor) -> Tensor:
    """Lengths of the sequences: the index after the last True, bool ``(batch, length)`` to ``(batch,)``."""
    places = torch.arange(1, present.shape[1] + 1, device=present.device)
    return (present * places).amax(1) if present.shape[1] else present.new_zeros(present.shape[0], dtype=torch.int64)


def reverse(u: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Reverse each sequence within its own length. Padding stays in place.

    The function is its own inverse: ``reverse(reverse(u, lengths), lengths)`` is ``u``.

    Args:
        u: shape ``(batch, length, channels)``.
        lengths: integers, shape ``(batch,)``; None if all rows are full.
    """
    if lengths is None:
        return u.flip(1)
    places = torch.arange(u.shape[1], device=u.device)
    mirrored = lengths[:, None] - 1 - places
    return u.gather(1, torch.where(mirrored < 0, places, mirrored)[..., None].expand_as(u))


__all__ = ["blank", "checked_lengths", "checked_padding", "counted", "ends", "reverse", "within"]
