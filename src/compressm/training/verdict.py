"""The verdict about a cut: keep it, undo it, or watch it longer; and what evaluations can resolve at all."""

from __future__ import annotations

import math
from typing import Literal

from compressm.training.noise import Loss, quantile

Verdict = Literal["keep", "undo", "watch"]

# How sure it must be that a cut cost more than max_drop, before it is undone: at an early examination, and at the last.
# Right after a cut nothing but the cut can be the cause of a loss. One that did not show then needs stronger proof.
_SHOWN, _HIDDEN = (0.985, 0.8), (0.995, 0.95)


def verdict(loss: Loss, max_drop: float, *, shown: bool, last: bool) -> Verdict:
    """What is to become of a cut.

    Args:
        loss: the loss by the cut, from all examinations so far.
        max_drop: the loss that is allowed.
        shown: whether the metric lost more than that right after the cut.
        last: whether there is no other examination.
    """
    # Equal metrics in a row, such as those of an untrained model, are no proof that there is no noise.
    believed = shown or last or loss.error != 0
    if believed and loss.exceeds(max_drop, (_SHOWN if shown else _HIDDEN)[last]):
        return "undo"
    # Noise may hide a loss that showed, and look like one that did not show.
    error = loss.error or 0.0
    may_be_otherwise = loss.value + (error if shown else -error) > max_drop
    return "watch" if may_be_otherwise and not last else "keep"


def too_fine(max_drop: float, loss: Loss) -> str:
    """Why ``max_drop`` is finer than the evaluations can resolve, and what would make them finer; empty if it is not.

    Args:
        max_drop: the loss that is allowed.
        loss: from `compressm.training.noise.foreseen`.
    """
    finest = loss.noise(_SHOWN[1])
    if finest <= max_drop:
        return ""
    digit = 10.0 ** (math.floor(math.log10(finest)) - 1)
    finest = math.ceil(finest / digit) * digit  # rounded up, so that the advice can be followed
    text = (
        f"max_drop={max_drop:g} is finer than these evaluations can resolve: a loss of less than about {finest:.2g} "
        "cannot be told from noise, and only larger ones are undone; "
    )
    allowed = max_drop / quantile(_SHOWN[1], loss.freedom)
    if loss.training is None or loss.training >= allowed:
        fluctuates = "" if loss.training is None else f" (its standard error is {loss.training:.2g})"
        return text + (
            f"more validation samples alone do not help, since the training itself fluctuates{fluctuates}: give "
            f"max_drop={finest:.2g} or more, or cut later, where the metric holds still"
        )
    needed = math.ceil(loss.examples * loss.sampling**2 / (allowed**2 - loss.training**2))
    return text + f"give max_drop={finest:.2g} or more, or {needed:,} validation samples instead of {loss.examples:,}"


__all__ = ["Verdict", "too_fine", "verdict"]
