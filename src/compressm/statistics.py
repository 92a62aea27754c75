"""Moments of selective layers, gathered while the model does its ordinary work.

A layer is observed by a hook that fires once, at its next call, and then removes itself: it reads the layer's input for
a sequence of the batch, and computes from that what the recurrence gets. So it works with every kernel behind the
layer, fused ones included, and costs nothing between observations.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressm.adapters import SelectiveAdapter, find_layers
from compressm.distributed import gathered, world_size
from compressm.errors import UnsupportedModelError
from compressm.layers import SequenceClassifier
from compressm.selective import Moments, moments

# Moments of weights that have changed since are forgotten: the weight of all before, at every observation.
MEMORY = 0.9
_PADDING = "padding of "


@dataclass(frozen=True)
class Sample:
    """A sequence that a layer read.

    Attributes:
        hidden: the layer's input, shape ``(1, length, d_model)``.
        present: 1 for tokens and 0 for padding, shape ``(1, length)``; None for no padding.
    """

    hidden: Tensor
    present: Tensor | None = None


class Statistics:
    """Running moments of a model's selective layers.

    Args:
        model: any model with layers that compressm knows; only read.
        sequences: how many sequences of a batch an observation looks at; None for all.
        memory: weight of what was observed before, at every observation; 1 for plain sums.
    """

    def __init__(self, model: nn.Module, sequences: int | None = 1, memory: float = MEMORY) -> None:
        self.sequences, self.memory = sequences, memory
        found = find_layers(model).items()
        self._layers = {name: (layer, a) for name, (layer, a) in found if isinstance(a, SelectiveAdapter)}
        self._moments: dict[str, Moments] = {}
        self._samples: dict[str, Sample] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        # Models that know which of their inputs are padding tell it before their layers are called.
        self._padded = [module for module in model.modules() if isinstance(module, SequenceClassifier)]
        self._present: Tensor | None = None

    @property
    def layers(self) -> list[str]:
        """Names of the selective layers."""
        return list(self._layers)

    @property
    def unseen(self) -> list[str]:
        """Names of those of them that there are no moments of."""
        return [name for name in self._layers if name not in self._moments]

    def observe_next(self, training_only: bool = True) -> None:
        """Observe every selective layer at its next call (by default its next call in training mode)."""
        for name, (layer, adapter) in self._layers.items():
            if name not in self._hooks:
                hook = _LayerHook(self, name, adapter, training_only)
                self._hooks[name] = layer.register_forward_pre_hook(hook, with_kwargs=True)
        for index, module in enumerate(self._padded if self._layers else ()):
            if (name := f"{_PADDING}{index}") not in self._hooks:
                self._hooks[name] = module.register_forward_pre_hook(
                    _PaddingHook(self, name, training_only), with_kwargs=True
                )

    def observe(
        self,
        name: str,
        layer: nn.Module,
        adapter: SelectiveAdapter,
        hidden: Tensor,
        present: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> None:
        """Add what a layer does with some inputs.

        Args:
            name, layer, adapter: the layer.
            hidden: its input, shape ``(batch, length, d_model)``.
            present: 1 for tokens and 0 for padding, shape ``(batch, length)``; by default what the model said before it
                called its layers.
            starts: True at the first token of every sequence, where a row holds several, shape ``(batch, length)``.
        """
        present = self._present if present is None else present
        present = None if present is None or present.shape != hidden.shape[:2] else present.detach()[: self.sequences]
        hidden = hidden.detach()[: self.sequences]
        if starts is not None:  # nothing is carried over from one to the next, by no convolution either
            starts = starts[: self.sequences]
            present = hidden.new_ones(hidden.shape[:2]) if present is None else present
            hidden, present = _unpacked(hidden, starts), _unpacked(present, starts)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(next(layer.parameters()).dtype)
            if present is not None:  # as transformers does, so that convolutions do not reach into padding either
                hidden = hidden * present[..., None].to(hidden)
            new = moments(adapter.signals(layer, hidden), present)
        if float(new.tokens) == 0:
            return
        self._samples[name] = Sample(hidden[:1].clone(), None if present is None else present[:1].clone())
        before = self._moments.get(name)
        if before is not None and before.P.shape == new.P.shape:
            new = before.plus(new, self.memory)
        self._moments[name] = new

    def remember_padding(self, model: SequenceClassifier, u: Tensor) -> None:
        """Remember which inputs of the coming forward pass are tokens."""
        self._present = model.present(u)

    def forget_hook(self, name: str) -> None:
        """Remove a layer's hook, if there is one."""
        if name in self._hooks:
            self._hooks.pop(name).remove()

    def close(self) -> None:
        """Remove all hooks; the moments stay."""
        for name in list(self._hooks):
            self.forget_hook(name)

    def reset(self) -> None:
        """Forget all moments and samples."""
        self._moments.clear()
        self._samples.clear()

    def moments(self) -> dict[str, Moments]:
        """The moments by layer name, summed over the processes of `torch.distributed` where it is initialised; then
        every process must call this at the same time.

        Raises:
            UnsupportedModelError: a layer was never observed; on all processes.
        """
        unseen = [name for names in gathered(self.unseen) for name in names]
        if unseen:
            raise UnsupportedModelError(not_seen(unseen[0]))
        return {name: summed(self._moments[name]) for name in self._layers}

    @property
    def samples(self) -> dict[str, Sample]:
        """The sequence that every layer read last while it was observed."""
        return dict(self._samples)

    @samples.setter
    def samples(self, samples: Mapping[str, Sample]) -> None:
        self._samples = dict(samples)

    def state_dict(self) -> dict[str, Any]:
        """The moments, as dicts of tensors."""
        return {name: value.tensors() for name, value in self._moments.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._moments = {name: Moments(**tensors) for name, tensors in state_dict.items()}


class _Once:
    """A forward pre-hook that sees one call, in training mode if only that counts, and removes itself."""

    def __init__(self, statistics: Statistics, name: str, training_only: bool) -> None:
        self.statistics, self.name, self.training_only = statistics, name, training_only

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        """Copies of the model are nobody's training, and are not observed."""
        return _nothing

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.training_only and not module.training:
            return
        self.statistics.forget_hook(self.name)
        self.see(module, args, kwargs)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The call."""
        raise NotImplementedError


class _LayerHook(_Once):
    """Observes a selective layer."""

    def __init__(self, statistics: Statistics, name: str, adapter: SelectiveAdapter, training_only: bool) -> None:
        super().__init__(statistics, name, training_only)
        self.adapter = adapter

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
                present = mask if isinstance(mask, Tensor) and mask.shape == value.shape[:2] else None
                self.statistics.observe(self.name, module, self.adapter, value, present, _starts(value, kwargs))
                return


def _starts(hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Where sequences begin that are packed one after the other, from the arguments that tell a layer so.

    Args:
        hidden: shape ``(batch, length, d_model)``.
        kwargs: of the layer's call: ``seq_idx``, the number of every token's sequence, shape ``(batch, length)``; or
            ``cu_seqlens``, the places where sequences begin in the only row, and its length.

    Returns:
        True at the first token of a sequence, shape ``(batch, length)``; None where nothing is packed.
    """
    numbers, places = kwargs.get("seq_idx"), kwargs.get("cu_seqlens")
    if isinstance(numbers, Tensor) and numbers.shape == hidden.shape[:2]:
        return nn.functional.pad(numbers.diff(dim=1) != 0, (1, 0), value=True)
    if isinstance(places, Tensor) and hidden.shape[0] == 1:
        starts = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        starts[0, places[:-1].long()] = True
        return starts
    return None


def _unpacked(packed: Tensor, starts: Tensor) -> Tensor:
    """Packed sequences one to a row, zeros after: ``(batch, length, ...)`` to ``(sequences, longest, ...)``."""
    places = starts.flatten().nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(places, [*places[1:], starts.numel()], strict=True)]
    return nn.utils.rnn.pad_sequence(list(packed.flatten(0, 1).split(lengths)), batch_first=True)


class _PaddingHook(_Once):
    """Asks a model which of its inputs are tokens and which are padding."""

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, SequenceClassifier)
        self.statistics.remember_padding(module, *args, **kwargs)


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


def not_seen(name: str) -> str:
    """What is wrong where a layer was never observed, and what to do."""
    return (
        f"{name!r} is a selective layer, and what its states carry depends on the data, of which none has passed "
        "through it yet: call model.train() before training, and see that the model's forward calls this layer, with "
        "data of shape (batch, length, d_model)"
    )


def summed(moments: Moments) -> Moments:
    """Over all processes; all of them must call this at the same time."""
    if world_size() == 1:
        return moments
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensors = {name: value.to(device, copy=True) for name, value in moments.tensors().items()}
    for value in tensors.values():
        torch.distributed.all_reduce(value)
    return Moments(**{name: value.cpu() for name, value in tensors.items()})


def gather(model: nn.Module, data: Iterable[Any], sequences: int | None = None) -> dict[str, Moments]:
    """Moments of every selective layer of a model over some data; empty where there is no such layer.

    Args:
        model: called in evaluation mode; the modes of all its parts are restored.
        data: batches: a tensor, a mapping of keyword arguments, or a list or tuple whose first element is the input
            (the rest, such as labels, is left out).
        sequences: how many sequences of each batch are looked at; by default all.

    Every layer takes as many operations as the data have tokens, times its width, times the square of its state
    dimension; and memory for one state of every sequence of a batch. Give fewer or smaller batches to spend less.

    In several processes all of them must call this, each with its share of the data.

    Raises:
        UnsupportedModelError: no layer that compressm knows, or one that no data went through.
    """
    statistics = Statistics(model, sequences, memory=1.0)
    if not statistics.layers:
        return {}
    observe_all(statistics, model, data)
    return statistics.moments()


def observe_all(statistics: Statistics, model: nn.Module, data: Iterable[Any]) -> None:
    """Let a model read some data, in evaluation mode, while its selective layers are observed."""
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            for batch in data:
                statistics.observe_next(training_only=False)
                feed(model, batch)
    finally:
        statistics.close()


def feed(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a tensor, a mapping of keyword arguments, or a list or tuple that begins with the
    input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


@contextmanager
def modes_kept(model: nn.Module) -> Generator[None]:
    """Put every module back into its own training mode at the end: some may be frozen, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


__all__ = ["Sample", "Statistics", "feed", "gather", "modes_kept", "not_seen", "observe_all", "summed"]
