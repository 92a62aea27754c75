"""Moments of selective layers, gathered during ordinary calls of the model.

Hooks read a layer's input, for one sequence of the batch, and compute the recurrence's signals from it. So observation
works with every kernel of the layer, fused ones included, and costs nothing between observations.

An observation lasts from `Statistics.observe_next` to the next one, or to `Statistics.close`; under a `Compressor` this
is one training step. Every call of a layer in that time counts: the layer may be used twice, or read a sequence in both
directions, or chunk by chunk. If the whole model is called several times in one step (accumulated gradients, pairs of
inputs), the first `MODEL_CALLS` calls count, which limits the cost of an observation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressm.adapters import SelectiveAdapter, layers_that_need_data
from compressm.errors import InvalidSystemError, UnsupportedModelError
from compressm.observing.layer_calls import (
    LayerWatch,
    ModelCalled,
    ModelDone,
    PaddingOver,
    PaddingTold,
    in_backward,
    input_dtype,
    not_finite,
    sequence_starts,
    unpacked,
)
from compressm.observing.padding import Padding, mask_in
from compressm.runtime.compiled_graphs import Pause
from compressm.runtime.modes import modes_kept
from compressm.runtime.processes import gathered, summed_tensors
from compressm.runtime.warned import warn
from compressm.theory.recurrence import Moments, moments

# Factor on all earlier moments at every observation, since they belong to weights that have changed.
MEMORY = 0.9

# How many calls of the whole model count in one observation.
MODEL_CALLS = 8


class NotFiniteWarning(UserWarning):
    """An observation had values that are not finite, and was left out."""


@dataclass(frozen=True)
class Sample:
    """A sequence that a layer read.

    Attributes:
        hidden: the layer's input, shape ``(1, length, d_model)``.
        present: 1 for tokens and 0 for padding, shape ``(1, length)``; None for no padding.
    """

    hidden: Tensor
    present: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """The inputs of one call of a layer.

    Attributes:
        hidden, present, starts, carried: see `Statistics.observe`.
        told: ``present`` comes from the model, and the layer reads padding like any input.
    """

    hidden: Tensor
    present: Tensor | None
    starts: Tensor | None
    carried: Any
    told: bool

    def of(self, rows: slice | Tensor) -> Reading:
        """Some of the sequences: by a slice, or by their numbers."""
        present, starts = (None if value is None else value[rows] for value in (self.present, self.starts))
        return replace(self, hidden=self.hidden[rows], present=present, starts=starts)


class Statistics:
    """Running moments of a model's selective layers.

    Args:
        model: any model with layers that compressm knows; only read.
        sequences: how many sequences of a batch an observation uses; None for all.
        memory: factor on all earlier moments at every observation; 1 for plain sums.
        strict: whether values that are not finite are an error. Otherwise calls with such values are left out and
            counted, with a warning the first time.

    Attributes:
        dropped: how many calls of each layer were left out, because their moments were not finite.
    """

    # True while an observer computes a layer's signals. It may call parts of the layer; no observer counts those calls.
    _looking = False

    def __init__(
        self, model: nn.Module, sequences: int | None = 1, memory: float = MEMORY, strict: bool = False
    ) -> None:
        self.sequences, self.memory, self.strict = sequences, memory, strict
        self._model = model
        self._layers = layers_that_need_data(model)
        self._moments: dict[str, Moments] = {}
        self._samples: dict[str, Sample] = {}
        self.dropped: dict[str, int] = {}
        self._why_dropped: dict[str, str] = {}
        self._missed: dict[str, str] = {}  # by layer, why a call could not be observed
        self._handles: list[RemovableHandle] = []
        self._pause = Pause()  # hooks must not be compiled
        self._seen: set[str] = set()  # layers seen in this observation
        self._training_only, self._when, self._calls = True, "", 0
        self._arguments: dict[str, Any] = {}  # of the model's present call
        self._padding = Padding(model)  # informed before layers are called

    @property
    def layers(self) -> list[str]:
        """Names of the selective layers."""
        return list(self._layers)

    @property
    def unseen(self) -> list[str]:
        """Names of the selective layers without moments."""
        return [name for name in self._layers if name not in self._moments]

    def problems(self) -> list[str]:
        """A line for every layer that could not be observed completely: its name, the reason, and what to do."""
        return [problem for name in self._layers if (problem := self._problem(name)) is not None]

    def _problem(self, name: str) -> str | None:
        if name in self._missed:
            return f"{name!r} is a selective layer that is not seen whole: {self._missed[name]}"
        if name not in self.unseen:
            return None
        if name in self.dropped:
            return f"all {self.dropped[name]} observations of {name!r} were left out: {self._why_dropped[name]}"
        return not_seen(name)

    def observe_next(self, training_only: bool = True, when: str = "") -> None:
        """Begin an observation: every call of a selective layer counts, until this is called again or `close`.

        Args:
            training_only: ignore calls in evaluation mode.
            when: the name of the coming data in messages, such as ``"batch 3"``.
        """
        self._training_only, self._when, self._calls = training_only, when, 0
        self._seen.clear()
        if self._handles or not self._layers:
            return
        self._pause.begin()
        self._handles = [
            self._model.register_forward_pre_hook(ModelCalled(self), with_kwargs=True, prepend=True),
            self._model.register_forward_hook(ModelDone(self), always_call=True),
        ]
        for module in self._padding.tellers:
            self._handles.append(module.register_forward_pre_hook(PaddingTold(self), with_kwargs=True))
            self._handles.append(module.register_forward_hook(PaddingOver(self), always_call=True))
        for name, (layer, adapter) in self._layers.items():
            self._handles += LayerWatch(self, name, layer).install(adapter.entrance)

    def counts(self, module: nn.Module) -> bool:
        """Whether a present call of a module belongs to the observation."""
        wanted = bool(self._handles) and (module.training or not self._training_only) and not Statistics._looking
        return wanted and self._calls <= MODEL_CALLS and not in_backward()

    def model_called(self, arguments: dict[str, Any]) -> None:
        """The whole model is called. It may be told of padding that its layers then read like any input."""
        self._calls += 1
        self._arguments = arguments
        self._padding.begin(mask_in(arguments))

    def model_done(self) -> None:
        """Its call is over."""
        self._arguments = {}
        self._padding.begin()

    def layer_called(self, name: str, layer: nn.Module, arguments: dict[str, Any]) -> None:
        """A layer is called."""
        mask, adapter = arguments.get("attention_mask"), self._layers[name][1]
        for value in arguments.values():
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
                present = mask if isinstance(mask, Tensor) and mask.shape == value.shape[:2] else None
                try:
                    carried = adapter.carried(layer, arguments)
                except UnsupportedModelError as error:
                    self._missed[name] = str(error)
                    return
                self.observe(name, layer, adapter, value, present, sequence_starts(value, arguments), carried)
                return

    def entered_aside(self, name: str, layer: nn.Module, hidden: Any) -> None:
        """A layer runs without its hooks: by ``layer.forward``, ``layer.step`` or a submodule."""
        adapter = self._layers[name][1]
        if adapter.entrance is not None and isinstance(hidden, Tensor) and hidden.ndim == 3:
            self.observe(name, layer, adapter, hidden)
        else:
            self._missed[name] = (
                f"the model calls parts or methods of it ({type(layer).__name__}.step or .forward), where its states "
                "cannot be followed; call the layer itself, layer(u), with u of shape (batch, length, d_model)"
            )

    def observe(
        self,
        name: str,
        layer: nn.Module,
        adapter: SelectiveAdapter,
        hidden: Tensor,
        present: Tensor | None = None,
        starts: Tensor | None = None,
        carried: Any = None,
    ) -> None:
        """Add the moments of a layer on some inputs.

        Args:
            name, layer, adapter: the layer.
            hidden: the layer's input, shape ``(batch, length, d_model)``.
            present: 1 for tokens and 0 for padding that the layer itself leaves out, shape ``(batch, length)``. By
                default the padding that the model knows; layers read that padding like any input.
            starts: True at the first token of every sequence, if a row holds several, shape ``(batch, length)``.
            carried: the state from which the call continues, see `SelectiveAdapter.carried`; None if states start at
                zero.
        """
        told = present is None
        if told:
            present = self._padding.of_layer(name)
        present = None if present is None or present.shape != hidden.shape[:2] else present.detach()
        self._look(name, layer, adapter, Reading(hidden.detach(), present, starts, carried, told))

    def _look(self, name: str, layer: nn.Module, adapter: SelectiveAdapter, reading: Reading) -> None:
        """As `observe`."""
        reading = reading.of(slice(self.sequences))
        hidden, present, starts, carried = reading.hidden, reading.present, reading.starts, reading.carried
        if starts is not None:  # neither states nor convolutions carry anything from one sequence to the next
            present = hidden.new_ones(hidden.shape[:2]) if present is None else present
            hidden, present = unpacked(hidden, starts), unpacked(present, starts)
        Statistics._looking = True
        try:
            # In evaluation mode, since dropout (of LoRA) would disturb the signals and the training's random numbers.
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), modes_kept(layer):
                layer.eval()
                hidden = hidden.to(input_dtype(layer))
                if present is not None and not reading.told:  # as transformers does, before convolutions
                    hidden = hidden * present[..., None].to(hidden)
                signals = (
                    adapter.signals(layer, hidden) if carried is None else adapter.signals_after(layer, hidden, carried)
                )
                new = moments(signals, present, padding_enters=reading.told)
        finally:
            Statistics._looking = False
        if not all(bool(value.isfinite().all()) for value in new.tensors().values()):
            self._drop(name, hidden)
        elif float(new.tokens) > 0:
            self._add(name, new)
            if carried is None:
                self._samples[name] = Sample(hidden[:1].clone(), None if present is None else present[:1].clone())

    def _add(self, name: str, new: Moments) -> None:
        memory = 1.0 if name in self._seen else self.memory
        self._moments[name] = new.after(self._moments.get(name), memory)
        self._seen.add(name)

    def _drop(self, name: str, hidden: Tensor) -> None:
        """Leave an observation out, and warn once with the reason."""
        why = f"{self._when}: {self._reason(name, hidden)}" if self._when else self._reason(name, hidden)
        if self.strict:
            raise InvalidSystemError(f"moments of {name!r}: {why}")
        if not self.dropped:
            warn(f"an observation of {name!r} is left out: {why}; further ones are only counted", NotFiniteWarning)
        self.dropped[name] = self.dropped.get(name, 0) + 1
        self._why_dropped[name] = why

    def _reason(self, name: str, hidden: Tensor) -> str:
        """Why moments are not finite: because of the data, the weights, or neither."""
        if bad := not_finite(self._arguments):
            return f"the model's input {bad}; mend or leave out such data"
        if bad := not_finite(dict(self._model.named_parameters())):
            return (
                f"the model has diverged, {bad}; go back to a checkpoint from before that, or lower the learning rate"
            )
        if bad := not_finite({"what enters the layer": hidden}):
            return f"{bad}, though weights are finite; see that the data are, and that nothing before it overflows"
        return f"the states of {name!r} overflow, though its weights and its input are finite"

    def padding_told(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        """A module that knows which of its inputs are padding is called; this holds during its call."""
        if self.counts(model):
            self._padding.told(model, arguments)
        else:
            self._padding.silent()

    def padding_over(self) -> None:
        """Its call is over."""
        self._padding.over()

    def close(self) -> None:
        """End the observation and remove all hooks. The moments are kept."""
        self._pause.end()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._padding.begin()
        self._arguments = {}

    def reset(self) -> None:
        """Drop all moments and samples, and reset the counts of dropped calls."""
        for record in (self._moments, self._samples, self._missed, self.dropped, self._why_dropped):
            record.clear()

    def moments(self) -> dict[str, Moments]:
        """The moments by layer name. If `torch.distributed` is initialised, they are summed over all processes, and
        every process must call this at the same time.

        Raises:
            UnsupportedModelError: a layer was never observed, or not completely; on all processes.
            InvalidSystemError: all observations of a layer were not finite; on all processes.
        """
        dropped = any(name in self.dropped for name in self.unseen)
        problems = [(line, bad) for lines, bad in gathered((self.problems(), dropped)) for line in lines]
        if problems:
            line, bad = problems[0]
            raise (InvalidSystemError if bad else UnsupportedModelError)(line)
        return {name: summed(self._moments[name]) for name in self._layers}

    @property
    def samples(self) -> dict[str, Sample]:
        """The last observed sequence of every layer."""
        return dict(self._samples)

    @samples.setter
    def samples(self, samples: Mapping[str, Sample]) -> None:
        self._samples = dict(samples)

    def state_dict(self) -> dict[str, Any]:
        """The moments, as dicts of tensors."""
        return {name: value.tensors() for name, value in self._moments.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the moments that `state_dict` returned."""
        self._moments = {name: Moments(**tensors) for name, tensors in state_dict.items()}


def not_seen(name: str) -> str:
    """The message for a layer that was never observed: the cause, and what to do."""
    return (
        f"{name!r} is a selective layer, and what its states carry depends on the data, of which none has passed "
        "through it yet: call model.train() before training, and see that the model's forward calls this layer, with "
        "data of shape (batch, length, d_model)"
    )


def summed(moments: Moments) -> Moments:
    """The moments summed over all processes; all of them must call this at the same time."""
    return Moments(**summed_tensors(moments.tensors()))
