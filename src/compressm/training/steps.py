"""Which calls of a training loop are training steps: those in which the optimizer changed the weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.cutting.optimizers import Together, members_of


class StepWatch:
    """Says whether an optimizer has made a step since the last question.

    A host may call `Compressor.step` after every batch, although the optimizer makes a step only at some of them:
    Accelerate's ``accumulate`` skips ``optimizer.step`` while gradients are accumulated, and a gradient scaler skips it
    if gradients are not finite. A hook on ``optimizer.step`` tells the difference. Fused optimizers are called even
    then, and get the scaler's finding as ``optimizer.found_inf``.

    Some optimizers change the weights without their ``step`` (``first_step`` and ``second_step`` of sharpness-aware
    minimisation). As long as the hook has not run once, a step is therefore also a change of the watched parameters.

    Args:
        optimizer: the optimizer, or several as one. Only hooks are added, which are removed with this object.
        parameters: returns the parameters that are compared.
    """

    def __init__(self, optimizer: Optimizer | Together, parameters: Callable[[], Iterable[nn.Parameter]]) -> None:
        self._parameters = parameters
        self._called = self._made = False
        self._values = self._copies()
        for member in members_of(optimizer):
            if hasattr(member, "_optimizer_step_post_hooks"):  # absent where Optimizer.__init__ was not called
                hook = member.register_step_post_hook(_Hook(self))
                weakref.finalize(self, hook.remove).atexit = False

    def stepped(self, skipped: bool) -> None:
        """``optimizer.step`` is over.

        Args:
            skipped: whether it left the weights alone.
        """
        self._called, self._values = True, []
        self._made = self._made or not skipped

    def made(self) -> bool:
        """Whether a step was made since the last call of `forget`."""
        if self._called:
            return self._made
        now = self._copies()
        return len(now) != len(self._values) or not all(map(torch.equal, now, self._values))

    def forget(self) -> None:
        """Count from here."""
        self._made = False
        self._values = [] if self._called else self._copies()

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters()]


class _Hook:
    """The hook on ``optimizer.step``. It does not keep the watch alive."""

    def __init__(self, watch: StepWatch) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        if (watch := self._watch()) is not None:
            found: Tensor | None = getattr(optimizer, "found_inf", None)
            watch.stepped(skipped=found is not None and bool(found))


__all__ = ["StepWatch"]
