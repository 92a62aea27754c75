"""Observation of calls of layers: hooks, arguments by name, packed sequences, and values that are not finite.

A call counts if it belongs to the observed training. Calls in evaluation mode do not count. Neither do forward passes
that a backward pass repeats for gradient checkpointing, since the same call was already observed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressm.adapters.composed import is_linear
from compressm.layers import Bidirectional
from compressm.layers.packing import starts_of
from compressm.observing.hooks import OwnHook


class Observer(Protocol):
    """The receiver of observed calls."""

    def counts(self, module: nn.Module) -> bool: ...
    def model_called(self, arguments: dict[str, Any]) -> None: ...
    def model_done(self) -> None: ...
    def layer_called(self, name: str, layer: nn.Module, arguments: dict[str, Any]) -> None: ...
    def entered_aside(self, name: str, layer: nn.Module, hidden: Any) -> None: ...
    def padding_told(self, model: nn.Module, arguments: dict[str, Any]) -> None: ...
    def padding_over(self) -> None: ...


class _Hook(OwnHook):
    """A hook that notifies an observer."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer


class ModelCalled(_Hook):
    """A forward pre-hook of the whole model."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self.observer.counts(module):
            self.observer.model_called(named_arguments(module, args, kwargs))


class ModelDone(_Hook):
    """A forward hook of the whole model."""

    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.observer.model_done()


class PaddingTold(_Hook):
    """A forward pre-hook of a model that knows which of its inputs are padding."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.observer.padding_told(module, named_arguments(module, args, kwargs))


class PaddingOver(_Hook):
    """A forward hook of a model that knows which of its inputs are padding."""

    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.observer.padding_over()


class LayerWatch:
    """The hooks of one layer: on the layer itself, and on the submodule that every call of the layer uses.

    Args:
        observer: is notified of the calls.
        name, layer: the layer.
    """

    def __init__(self, observer: Observer, name: str, layer: nn.Module) -> None:
        self.observer, self.name, self.layer = observer, name, layer
        self._inside = 0

    def install(self, entrance: str | None) -> list[Any]:
        """Handles of the hooks.

        Args:
            entrance: the submodule that reads the layer's own input; by default the layer's first linear map.
        """
        parts = dict(self.layer.named_children())
        first = next((part for part in parts.values() if is_linear(part)), None)
        part = parts.get(entrance or "", first)
        handles = [
            self.layer.register_forward_pre_hook(_LayerBegins(self.observer, self), with_kwargs=True),
            self.layer.register_forward_hook(_LayerEnds(self.observer, self), always_call=True),
        ]
        if part is not None:
            handles.append(part.register_forward_pre_hook(_PartBegins(self.observer, self)))
        return handles

    def begins(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The layer is called."""
        self._inside += 1
        if self.observer.counts(self.layer):
            self.observer.layer_called(self.name, self.layer, named_arguments(self.layer, args, kwargs))

    def ends(self) -> None:
        """The layer's call returns or raises."""
        self._inside = max(0, self._inside - 1)

    def part_begins(self, args: tuple[Any, ...]) -> None:
        """The submodule is called: by a call of the layer, or by ``layer.forward`` or ``layer.step``, which do not run
        the layer's own hooks."""
        if self._inside == 0 and self.observer.counts(self.layer):
            self.observer.entered_aside(self.name, self.layer, args[0] if args else None)


class _LayerHook(_Hook):
    def __init__(self, observer: Observer, watch: LayerWatch) -> None:
        super().__init__(observer)
        self.watch = watch


class _LayerBegins(_LayerHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.watch.begins(args, kwargs)


class _LayerEnds(_LayerHook):
    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.watch.ends()


class _PartBegins(_LayerHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self.watch.part_begins(args)


def in_backward() -> bool:
    """Whether autograd is running a backward pass, in which gradient checkpointing calls layers again."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def input_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype in which a layer reads its input: that of its first linear map.

    Its other parameters may have another one. Published checkpoints keep ``A_log`` and ``D`` in float32 beside weights
    in bfloat16.
    """
    linear = [module.weight.dtype for module in layer.modules() if isinstance(module, nn.Linear)]
    floating = [dtype for dtype in (*linear, next(layer.parameters()).dtype) if dtype.is_floating_point]
    return floating[0] if floating else torch.get_default_dtype()


def named_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a module's call by their names in its forward, or by position if it does not name them."""
    forward: Any = inspect.unwrap(type(module).forward)
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    places = {names[i] if i < len(names) else f"argument {i}": value for i, value in enumerate(args)}
    return {**places, **kwargs}


# Arguments that describe packed sequences: by the number of every token's sequence, and by places.
PACKING = ("seq_idx", "cu_seqlens", "cu_seq_lens_q")


def sequence_starts(hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """The first tokens of packed sequences, from the arguments that describe the packing.

    Args:
        hidden: shape ``(batch, length, d_model)``.
        arguments: of the layer's call: ``seq_idx``, the number of every token's sequence, shape ``(batch, length)``; or
            ``cu_seqlens`` or ``cu_seq_lens_q``, the positions where sequences begin in the only row, followed by its
            length.

    Returns:
        True at the first token of a sequence, shape ``(batch, length)``; None if no sequences are packed.
    """
    numbers, *others = (arguments.get(name) for name in PACKING)
    places = next((value for value in others if value is not None), None)
    if isinstance(numbers, Tensor) and numbers.shape == hidden.shape[:2]:
        return starts_of(numbers)
    if isinstance(places, Tensor) and hidden.shape[0] == 1:
        starts = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        starts[0, places[:-1].long()] = True
        return starts
    return None


def unpacked(packed: Tensor, starts: Tensor) -> Tensor:
    """Packed sequences, one per row, padded with zeros: ``(batch, length, ...)`` to ``(sequences, longest, ...)``."""
    places = starts.flatten().nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(places, [*places[1:], starts.numel()], strict=True)]
    return nn.utils.rnn.pad_sequence(list(packed.flatten(0, 1).split(lengths)), batch_first=True)


def reversed_layers(model: nn.Module) -> set[str]:
    """Names of the modules that read a model's sequences from their end: inside ``backwards`` of a `Bidirectional`."""
    found: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, Bidirectional):
            inside = f"{name}.backwards".lstrip(".")
            parts = {inside if part == "" else f"{inside}.{part}" for part, _ in module.backwards.named_modules()}
            found ^= parts  # reversing twice restores the order
    return found


def not_finite(arguments: Mapping[str, Any]) -> str | None:
    """A message about the first argument with entries that are not finite: its name, how many, and the first place."""
    for name, value in _tensors(arguments):
        if value.is_floating_point() or value.is_complex():
            bad = ~value.detach().isfinite()
            if count := int(bad.sum()):
                place = ", ".join(str(i) for i in bad.nonzero()[0].tolist())
                what = "entry that is" if count == 1 else "entries that are"
                return f"{name} has {count} {what} not finite, the first at [{place}]"
    return None


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors({f"{name}[{key!r}]": part for key, part in value.items()})
        elif isinstance(value, list | tuple):
            yield from _tensors({f"{name}[{index}]": part for index, part in enumerate(value)})


__all__ = [
    "PACKING",
    "LayerWatch",
    "ModelCalled",
    "ModelDone",
    "PaddingOver",
    "PaddingTold",
    "in_backward",
    "input_dtype",
    "named_arguments",
    "not_finite",
    "reversed_layers",
    "sequence_starts",
    "unpacked",
]
