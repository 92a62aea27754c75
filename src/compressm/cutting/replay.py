"""The error that a cut causes in a layer's output, measured by running the layer before and after on the same inputs.

While the model reads the data, a copy of each layer, with the cut already written, gets the same inputs. With ``y`` the
layer's output and ``y'`` that of the copy,

    error = sqrt(sum |y' - y|^2 / sum |y|^2)

over all tokens of all calls, without padding. The error includes everything between the layer's input and its output:
gates, norms, projections, and the path that bypasses the state. It does not include the cuts of other layers, since
each layer reads its former input.

The copies take no more memory than the layers themselves. One pass over the data costs one run of the model and a
second run of these layers. Only some sums per layer are kept between batches.

In selective layers a cut is fitted to the data, and the error above is that of the fit. `error_held_out` comes from two
more cuts, each made from half of the sequences and measured on the other half (see `held_out`). It estimates the error
on other data of the same kind. It is more likely too large than too small, since each half has less data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressm.adapters import LayerChange, find_layers, layers_that_need_data
from compressm.adapters.changes import write
from compressm.adapters.registry import tell_written
from compressm.errors import UnsupportedModelError
from compressm.observing.held_out import Dealer
from compressm.observing.inputs import calls
from compressm.observing.layer_calls import named_arguments
from compressm.observing.moments import Sample
from compressm.observing.padding import Padding, mask_in
from compressm.runtime.copies import copied_module
from compressm.runtime.modes import modes_kept
from compressm.runtime.paging import is_paging
from compressm.runtime.processes import gathered
from compressm.runtime.warned import warn


class NotMeasuredWarning(UserWarning):
    """A layer's error on the data could not be measured: its smaller copy could not be run on them, or could not
    continue from the layer's states."""


@dataclass(frozen=True)
class Errors:
    """Relative errors of one layer's output; see the module's text.

    Attributes:
        on_data: of the cut itself, on the data that it was made from.
        held_out: of cuts made from half of the sequences, on the other half; None if there are no such cuts.
    """

    on_data: float
    held_out: float | None = None


@torch.no_grad()
def errors_on_data(
    model: nn.Module,
    changes: Mapping[str, LayerChange],
    data: Any,
    by_halves: Mapping[str, tuple[LayerChange, LayerChange]] | None = None,
) -> dict[str, Errors]:
    """Relative error that changes would cause in each layer's output on some data; see the module's text.

    Args:
        model: the model before the changes. It is only read, and is in evaluation mode while it reads the data.
        changes: by layer name.
        data: batches, as `compressm.observing.over_data.gather` takes them.
        by_halves: by layer name, the two changes computed from the first and the second half of the sequences. ``data``
            must be the same data in the same order.

    In several processes all of them must call this, each with its share of the data.

    Returns:
        errors by layer name, without the layers that the data did not reach. An error is infinite if the output was
        zero and is no longer zero.
    """
    if not changes:
        return {}
    padding = Padding(model)
    replays = {
        name: _Replay(name, model.get_submodule(name), change, padding, (by_halves or {}).get(name, ()))
        for name, change in changes.items()
    }
    handles: list[RemovableHandle] = []
    for name, replay in replays.items():
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(replay.begins, with_kwargs=True))
        handles.append(layer.register_forward_hook(replay.compare, with_kwargs=True))
    for module in padding.tellers:
        handles.append(module.register_forward_pre_hook(partial(_told, padding), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(_over, padding), always_call=True))
    try:
        with modes_kept(model):
            model.eval()
            for call in calls(model, data):
                padding.begin(mask_in(call.kwargs))
                call(model)
    finally:
        for handle in handles:
            handle.remove()
    return _errors(replays)


@torch.no_grad()
def errors_on_samples(
    model: nn.Module, changes: Mapping[str, LayerChange], samples: Mapping[str, Sample]
) -> dict[str, Errors]:
    """As `errors_on_data`, on one sequence that each layer has read before. It is cheap enough for a training loop.

    Args:
        model: the model before the changes; only read.
        changes: by layer name.
        samples: by layer name; layers without one are left out.
    """
    replays: dict[str, _Replay] = {}
    for name, (layer, adapter) in find_layers(model).items():
        if name not in changes or name not in samples:
            continue
        hidden, padding = samples[name].hidden.to(next(layer.parameters()).device), Padding(layer)
        padding.begin(samples[name].present)  # in the order in which the layer read them
        replays[name] = replay = _Replay(name, layer, changes[name], padding, run=adapter.run)
        with modes_kept(layer), torch.autocast(hidden.device.type, enabled=False):
            layer.eval()
            try:
                output = adapter.run(layer, hidden)
            except _FAILURES as error:
                replay.failed = f"its smaller copy failed: {_first_line(error)}"
            else:
                replay.compare(layer, (hidden,), {}, output)
    return _errors(replays)


def _told(padding: Padding, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a model, or a part of one, that knows which of its inputs are padding."""
    padding.told(model, named_arguments(model, args, kwargs))


def _over(padding: Padding, *_: Any) -> None:
    """A forward hook of the same."""
    padding.over()


class _Replay:
    """Compares one layer with its copy after a change.

    ``sums`` holds ``sum |y' - y|^2``, ``sum |y|^2``, the former for the cuts of the halves, and the number of tokens.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        change: LayerChange,
        padding: Padding,
        by_halves: Sequence[LayerChange] = (),
        run: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.padding, self.run = name, padding, run or _called
        _, self.adapter = layers_that_need_data(layer).get("", (layer, None))
        self.halved, self._changes = bool(by_halves), (change, *by_halves)
        self._made = None if is_paging() else [cut_copy(layer, one) for one in self._changes]
        self.dealer = Dealer()
        self.sums = [0.0, 0.0, 0.0, 0.0]
        self.failed = ""

    def begins(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: note if the layer continues from a state, since the copy has no such state."""
        if self.failed or self.adapter is None:
            return
        try:
            goes_on = self.adapter.carried(layer, named_arguments(layer, args, kwargs)) is not None
        except UnsupportedModelError:
            goes_on = True
        if goes_on:
            self.failed = "since it goes on from a carried state, which only the layer itself has; give whole sequences"

    def compare(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook: add one call of the layer."""
        if self.failed:
            return
        state = named_arguments(layer, args, kwargs).get("state")  # of xLSTM, whose cache is a tuple of tensors
        args = tuple(None if _is_cache(value) or value is state else value for value in args)
        kwargs = {key: None if _is_cache(value) or value is state else value for key, value in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False  # some layers store their states in themselves
        try:
            y = sequence_of(output)
            others = [sequence_of(self.run(one, *args, **kwargs)) for one in self._copies(layer)]
            changed, *by_halves = [(other.double() - y.double()).square().sum(-1) for other in others]
        except _FAILURES as error:
            self.failed = f"its smaller copy failed: {_first_line(error)}"
            return
        held_out = torch.zeros_like(changed)
        half = self.dealer.halves(self.name, y.shape[0]).to(y.device)
        for which, of_half in enumerate(by_halves):
            held_out[half != which] = of_half[half != which]
        weights = self._weights(y, kwargs)
        for place, value in enumerate((changed, y.double().square().sum(-1), held_out, torch.ones_like(changed))):
            self.sums[place] += float((value * weights).sum())

    def _copies(self, layer: nn.Module) -> Iterable[nn.Module]:
        """The layer with each of the changes. If the model lives in files, copies are made anew for every call."""
        return self._made or (_unobserved(layer, one) for one in self._changes)

    def _weights(self, output: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """1 for tokens and 0 for padding, as far as that is known for this output, shape ``(batch, length)``."""
        for mask in (kwargs.get("attention_mask"), self.padding.of_layer(self.name)):
            if isinstance(mask, Tensor) and mask.shape == output.shape[:-1]:
                return mask.to(output.device, torch.float64)
        return torch.ones(output.shape[:-1], dtype=torch.float64, device=output.device)


# Errors that the copy of an unknown layer may raise. They only prevent the measurement; the cut itself is sound.
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _called(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)


def _unobserved(layer: nn.Module, change: LayerChange) -> nn.Module:
    """As `cut_copy`, of a layer that is being observed: without its hooks, which refer to the observer."""
    hooks = [(layer, name, vars(layer)[name]) for name in ("_forward_hooks", "_forward_pre_hooks")]
    for owner, name, own in hooks:
        setattr(owner, name, type(own)())
    try:
        return cut_copy(layer, change)
    finally:
        for owner, name, own in hooks:
            setattr(owner, name, own)


def cut_copy(layer: nn.Module, change: LayerChange) -> nn.Module:
    """A copy of a layer with a change written into it, in evaluation mode."""
    smaller = copied_module(layer).eval()
    write(smaller, change)
    tell_written(smaller)
    return smaller


def relative(changed: float, before: float) -> float:
    """``sqrt(changed / before)``, and 0 if nothing changed."""
    if before == 0:
        return 0.0 if changed == 0 else float("inf")
    return (changed / before) ** 0.5


def _errors(replays: Mapping[str, _Replay]) -> dict[str, Errors]:
    """The errors over all processes together."""
    shares = gathered({name: (one.sums, one.failed) for name, one in replays.items()})
    found: dict[str, Errors] = {}
    for name, replay in replays.items():
        failed = next((share[name][1] for share in shares if share[name][1]), "")
        changed, before, held_out, tokens = (sum(share[name][0][place] for share in shares) for place in range(4))
        if failed:
            message = f"the error of {name!r} on the data could not be measured, {failed}"
            warn(message, NotMeasuredWarning)
        elif tokens > 0:
            found[name] = Errors(relative(changed, before), relative(held_out, before) if replay.halved else None)
    return found


def _is_cache(value: object) -> bool:
    """Whether an argument is a cache for the layer's state. It has the shape of the larger state, and the layer has
    already written into it."""
    return "Cache" in type(value).__name__


def sequence_of(output: Any) -> Tensor:
    """The sequence in a layer's return value: the value itself, or the first tensor in it."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise TypeError(f"no sequence in a layer's output of type {type(output).__name__}")


__all__ = [
    "Errors",
    "NotMeasuredWarning",
    "cut_copy",
    "errors_on_data",
    "errors_on_samples",
    "relative",
    "sequence_of",
]
