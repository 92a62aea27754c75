"""Which calls of a training loop are training steps: those in which the optimizer changed the weights."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

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

    Steps of other optimizers that train the watched parameters are noticed too, by a hook on all of torch's optimizers:
    whether such a one took the place of those that are watched or works beside them, no cut would carry its state.

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
        self._other, self._ours = "", {id(parameter) for parameter in self._parameters()}
        self._members = members_of(optimizer)
        self._counts: dict[int, int] = {}  # steps of each optimizer since the last question
        self._several = 0  # questions for which there were several, up to the warning
        self._idle = self._longest = 0  # calls since the last step, and the most that there were before one
        for member in self._members:
            if hasattr(member, "_optimizer_step_post_hooks"):  # absent where Optimizer.__init__ was not called
                handle = member.register_step_post_hook(_Hook(self))
                weakref.finalize(self, handle.remove).atexit = False
        _listen()
        _watches.add(self)
        for layer in layers:
            handle = layer.register_load_state_dict_post_hook(_LoadedHook(self))
            weakref.finalize(self, handle.remove).atexit = False

    def other_stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has made a step, and may be another one than those that are watched."""
        if any(_same_training(optimizer, member) for member in self._members):
            return
        shared = [one for group in optimizer.param_groups for one in group["params"] if id(one) in self._ours]
        if not shared:
            return
        # One that holds parameters without gradients leaves them alone; but some optimizers drop the gradients.
        if any(one.grad is not None for one in shared) or not (
            self._made or _same(self._sampled, self._copy_of_sample())
        ):
            self._other = type(optimizer).__name__

    def stepped(self, optimizer: Optimizer, skipped: bool) -> None:
        """``optimizer.step`` is over.

        Args:
            optimizer: one of those that are watched.
            skipped: whether it left the weights alone.
        """
        self._called, self._values = True, {}
        self._counts[id(optimizer)] = self._counts.get(id(optimizer), 0) + (not skipped)
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
            UnsupportedOptimizerError: an optimizer that is not watched has trained the parameters.
        """
        if guarded and self._other:
            raise UnsupportedOptimizerError(
                f"{self._other} trains parameters that a cut changes, and is not the optimizer that the Compressor was "
                "built with: build a new Compressor with it, or with a list of all optimizers"
            )
        self._other = ""
        made = self._made if self._called else self._changed()
        if guarded:
            self._warn_of_several(max(self._counts.values(), default=0))
        self._idle += not made
        if guarded and self._idle == _IDLE + 4 * self._longest:
            warn(
                f"compressor.step() was called {self._idle} times in a row without a step of the optimizer, and no cut "
                "will come: see that the model and the optimizer that the Compressor has are those that train"
            )
        return made

    def _warn_of_several(self, steps: int) -> None:
        """Warn where one question comes for several steps, as after every epoch; once is no habit."""
        self._several += steps > 1 and self._several < 2
        if steps > 1 and self._several == 2:
            self._several += 1
            warn(
                f"compressor.step() came for {steps} steps of the optimizer, and counts them as one: call it after "
                "every optimizer.step(), or give total_steps as the number of its calls"
            )

    def _changed(self) -> bool:
        now = self._copies()
        return now.keys() != self._values.keys() or not all(_same(now[key], self._values[key]) for key in now)

    def forget(self) -> None:
        """Count from here."""
        self._counts.clear()
        self._made, self._idle, self._longest = False, 0, max(self._longest, self._idle)
        self._values, self._sampled = {} if self._called else self._copies(), self._copy_of_sample()

    def _copy_of_sample(self) -> Tensor:
        return torch.empty(0) if self._sample is None else self._sample.detach().clone()

    def _copies(self) -> dict[int, Tensor]:
        return {id(parameter): parameter.detach().clone() for parameter in self._parameters()}


def _same_training(optimizer: Optimizer, member: Optimizer) -> bool:
    """Whether an optimizer is a member of the training, is inside of it or around it, or shares its state."""
    within = _held(member)
    around = _held(optimizer)
    one = optimizer is member or any(optimizer is held for held in within) or any(member is held for held in around)
    return one or optimizer.param_groups is member.param_groups or optimizer.state is member.state


def _held(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers in an optimizer's attributes, and in lists and dicts among these."""
    found = list[Any]()
    for name, value in vars(optimizer).items():
        if name not in ("state", "param_groups"):  # large, and no place for optimizers
            found += (
                value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
            )
    return [one for one in found if isinstance(one, Optimizer)]


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
            watch.stepped(optimizer, skipped=found is not None and bool(found))


class _LoadedHook(OwnHook):
    """The hook on ``load_state_dict`` of a layer. It does not keep the watch alive."""

    def __init__(self, watch: StepWatch) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, layer: nn.Module, *_: Any) -> None:
        if (watch := self._watch()) is not None:
            watch.loaded(layer)


_watches: weakref.WeakSet[StepWatch] = weakref.WeakSet()


@functools.cache
def _listen() -> None:
    """Be told of the steps of all optimizers. This hook stays: one that is removed by the garbage collector may be
    removed while torch goes through them."""
    register_optimizer_step_post_hook(_tell_all)


def _tell_all(optimizer: Optimizer, *_: Any) -> None:
    for watch in [*_watches]:
        watch.other_stepped(optimizer)


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
