"""Which calls of a training loop are training steps: those in which the optimizer changed the weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.cutting.optimizers import Together, members_of
from compressm.errors import UnsupportedOptimizerError
from compressm.observing.hooks import OwnHook
from compressm.runtime.warned import warn

_IDLE = 256  # calls without a step, beyond what the accumulation of gradients explains, after which to warn


class StepWatch:
    """Says whether an optimizer has made a step since the last question.

    A host may call `Compressor.step` after every batch, although the optimizer makes a step only at some of them:
    Accelerate's ``accumulate`` skips ``optimizer.step`` while gradients are accumulated, and a gradient scaler skips it
    if gradients are not finite. A hook on ``optimizer.step`` tells the difference. Fused optimizers are called even
    then, and get the scaler's finding as ``optimizer.found_inf``.

    Some optimizers change the weights without their ``step`` (``first_step`` and ``second_step`` of sharpness-aware
    minimisation). As long as the hook has not run once, a step is therefore also a change of the watched parameters,
    unless weights were loaded into them.

    Parameters that change without a step of these optimizers may have a new optimizer, which would not be counted and
    whose state no cut would carry. Other optimizers of the watched parameters are then watched too, see `made`.

    Args:
        optimizer: the optimizer, or several as one. Only hooks are added, which are removed with this object.
        parameters: returns the parameters that are compared.
        layers: the layers that have them. Loading weights into these is no step.
    """

    def __init__(
        self,
        optimizer: Optimizer | Together,
        parameters: Callable[[], Iterable[nn.Parameter]],
        layers: Iterable[nn.Module] = (),
    ) -> None:
        self._parameters = parameters
        self._called = self._made = False
        trained = [parameter for parameter in parameters() if parameter.requires_grad]
        self._sample = min(trained, key=Tensor.numel, default=None)  # an optimizer changes all; one is quick to compare
        self._values, self._sampled = self._copies(), self._copy_of_sample()
        self._known = {id(one) for one in members_of(optimizer)}
        self._surprises, self._other = 0, ""
        self._idle = self._longest = 0  # calls since the last step, and the most that there were before one
        for member in members_of(optimizer):
            self._known |= {id(part) for part in vars(member).values()}  # such as the optimizer inside another
            self._hook(member, _Hook(self))
        for layer in layers:
            handle = layer.register_load_state_dict_post_hook(_LoadedHook(self))
            weakref.finalize(self, handle.remove).atexit = False

    def _hook(self, optimizer: Optimizer, hook: Callable[..., None]) -> None:
        if hasattr(optimizer, "_optimizer_step_post_hooks"):  # absent where Optimizer.__init__ was not called
            handle = optimizer.register_step_post_hook(hook)
            weakref.finalize(self, handle.remove).atexit = False

    def _check_others(self) -> None:
        """Refuse a step of an optimizer that is not watched."""
        if not self._made and not _same(self._sampled, now := self._copy_of_sample()):
            self._sampled = now
            self._surprises += 1
            if self._surprises & (self._surprises - 1) == 0:  # at 1, 2, 4, 8, ...: the search looks at all objects
                self._watch_others()
        if self._other:
            raise UnsupportedOptimizerError(
                f"{self._other} trains parameters that a cut changes, and is not the optimizer that the Compressor was "
                "built with: build a new Compressor with it, or with a list of all optimizers"
            )

    def _watch_others(self) -> None:
        ours = {id(parameter) for parameter in self._parameters()}
        for other in gc.get_objects():
            if not issubclass(type(other), Optimizer) or id(other) in self._known:
                continue
            if any(id(parameter) in ours for group in other.param_groups for parameter in group["params"]):
                self._known.add(id(other))
                self._hook(other, _OtherHook(self))

    def other_stepped(self, name: str) -> None:
        """Another optimizer has made a step."""
        self._other = name

    def stepped(self, skipped: bool) -> None:
        """``optimizer.step`` is over.

        Args:
            skipped: whether it left the weights alone.
        """
        self._called, self._values = True, {}
        self._made = self._made or not skipped

    def loaded(self, layer: nn.Module) -> None:
        """Weights have been loaded into a layer."""
        parameters = list(layer.parameters())
        self._values.update({id(one): one.detach().clone() for one in parameters if id(one) in self._values})
        if any(one is self._sample for one in parameters):
            self._sampled = self._copy_of_sample()

    def made(self, guarded: bool = True) -> bool:
        """Whether a step was made since the last call of `forget`.

        Args:
            guarded: refuse other optimizers, as long as cuts are to come.

        Raises:
            UnsupportedOptimizerError: an optimizer that is not watched has changed the parameters.
        """
        if guarded:
            self._check_others()
        made = self._made if self._called else self._changed()
        self._idle += not made
        if guarded and self._idle == _IDLE + 4 * self._longest:
            warn(
                f"compressor.step() was called {self._idle} times in a row without a step of the optimizer, and no cut "
                "will come: see that the model and the optimizer that the Compressor has are those that train"
            )
        return made

    def _changed(self) -> bool:
        now = self._copies()
        return now.keys() != self._values.keys() or not all(_same(now[key], self._values[key]) for key in now)

    def forget(self) -> None:
        """Count from here."""
        self._made, self._idle, self._longest = False, 0, max(self._longest, self._idle)
        self._values, self._sampled = {} if self._called else self._copies(), self._copy_of_sample()

    def _copy_of_sample(self) -> Tensor:
        return torch.empty(0) if self._sample is None else self._sample.detach().clone()

    def _copies(self) -> dict[int, Tensor]:
        return {id(parameter): parameter.detach().clone() for parameter in self._parameters()}


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal; those of a model that was moved in between are not."""
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


class _Hook:
    """The hook on ``optimizer.step``. It does not keep the watch alive."""

    def __init__(self, watch: StepWatch) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        if (watch := self._watch()) is not None:
            found: Tensor | None = getattr(optimizer, "found_inf", None)
            watch.stepped(skipped=found is not None and bool(found))


class _LoadedHook(OwnHook):
    """The hook on ``load_state_dict`` of a layer. It does not keep the watch alive."""

    def __init__(self, watch: StepWatch) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, layer: nn.Module, *_: Any) -> None:
        if (watch := self._watch()) is not None:
            watch.loaded(layer)


class _OtherHook:
    """The hook on ``step`` of an optimizer that is not the training's."""

    def __init__(self, watch: StepWatch) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        if (watch := self._watch()) is not None:
            watch.other_stepped(type(optimizer).__name__)


def scale_of(scaler: object) -> float:
    """The factor of a gradient scaler; 1 without one."""
    return float(getattr(scaler, "get_scale", lambda: 1.0)())


def warn_of_scaler(scaler: object, gradients: bool) -> None:
    """Warn of a gradient scaler in use that was not passed, where gradients of the loss are observed.

    Args:
        scaler: the one that was passed.
        gradients: whether gradients are observed.
    """
    if scaler is not None or not gradients:
        return
    for one in gc.get_objects():
        if issubclass(type(one), torch.amp.GradScaler) and getattr(one, "_scale", None) is not None:  # it has scaled
            warn(
                "a GradScaler multiplies the gradients by a factor that changes, and the Compressor does not know it: "
                "pass Compressor(scaler=...), since predicted losses are too large by the square of it otherwise"
            )
            return


def factor_of_loss(loss_scale: float, scaler: object) -> float:
    """By what the loss is multiplied before ``backward``: by the user's factor, and by the scaler's."""
    return loss_scale * scale_of(scaler)


__all__ = ["StepWatch", "factor_of_loss", "scale_of", "warn_of_scaler"]
