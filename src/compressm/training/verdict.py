"""The verdict about a cut: keep it, undo it, or watch it longer; and what evaluations can resolve at all."""

from __future__ import annotations

import math
from typing import Literal

from compressm.training.noise import Loss, quantile

Verdict = Literal["keep", "undo", "watch"]

# How sure it must be that a cut cost more than max_drop, before it is undone: at an early examination, and at the last.
# Right after a cut nothing but the cut can be the cause of a loss. One that did not show then needs stronger proof.
_SHOWN, _HIDDEN = (0.985, 0.8), (0.995, 0.95)
_MOSTLY = 0.5  # validation samples that have at most this share of an error explain at most a quarter of its square


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


def too_fine(max_drop: float, loss: Loss, compared: str = "metric") -> str:
    """Why ``max_drop`` is finer than the evaluations can resolve, and what would make them finer; empty if it is not.

    Args:
        max_drop: the loss that is allowed.
        loss: from `compressm.training.noise.foreseen`, or from `beside`.
        compared: what the loss was computed from, evaluation by evaluation.
    """
    finest = loss.noise(_SHOWN[1])
    if finest <= max_drop:
        return ""
    digit = 10.0 ** (math.floor(math.log10(finest)) - 1)
    finest = math.ceil(finest / digit) * digit  # rounded up, so that the advice can be followed
    text = (
        f"max_drop={max_drop:g} is finer than these evaluations can resolve: a loss of less than about {finest:.2g} "
        f"cannot be told from noise, and only larger ones are undone; give max_drop={finest:.2g} or more"
    )
    allowed, moves = max_drop / quantile(_SHOWN[1], loss.freedom), loss.training or 0.0
    if moves >= allowed:
        return f"{text}, or cut later, where the {compared} holds still: {_cause(loss, compared)}"
    needed = math.ceil(loss.examples * loss.sampling**2 / (allowed**2 - moves**2))
    text += f", or {needed:,} validation samples instead of {loss.examples:,}"
    return (
        text if loss.training is not None else f"{text}, if the training itself fluctuates little, which is not known"
    )


def _cause(loss: Loss, compared: str) -> str:
    """What moves a metric from one evaluation to the next, as far as this is known."""
    if loss.training is None:
        return f"samples alone have a standard error of {loss.sampling:.2g}, and what the training adds is not known"
    moves = f"it moves from one evaluation to the next (standard error {loss.training:.2g}), "
    if not loss.examples:
        return f"{moves}by the training or by the validation data, which one number does not tell apart"
    if loss.sampling < _MOSTLY * loss.training:
        return f"{moves}mostly by the training itself, so that more validation samples alone do not help"
    return f"{moves}by the training, by too few validation samples, or both, so that more of these may not be enough"


__all__ = ["Verdict", "too_fine", "verdict"]
