"""Tracing a model with `torch.export`. Every export begins with it, whatever the format."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressm.cutting import state_dims
from compressm.errors import ExportError, UnsupportedModelError
from compressm.layers.hyena import Convolution, LongConvolution
from compressm.observing.inputs import calls
from compressm.runtime.copies import copied_module


@dataclass(frozen=True)
class Traced:
    """A traced model, and the example that its export is checked with.

    Attributes:
        model: a float32 copy on the CPU, in evaluation mode.
        program: the traced graph.
        dynamic_shapes: its free axes.
        example: sequences, shape ``(batch, length, ...)``.
        lengths: of these sequences, where they are an input.
        state: of two sequences, by name; None for the sequence model.
        metadata: plain values that an ONNX file records.
    """

    model: nn.Module
    program: torch.export.ExportedProgram
    dynamic_shapes: Any
    example: Tensor
    lengths: Tensor | None
    state: dict[str, Tensor] | None
    metadata: dict[str, Any]

    @property
    def inputs(self) -> dict[str, list[int | str]]:
        """Names and shapes of the graph's inputs; an axis with a name is free."""
        free = 1 if self.state is not None else 2
        shapes: dict[str, list[int | str]] = {"input": [*("batch", "length")[:free], *self.example.shape[2:]]}
        if self.lengths is not None:
            shapes["lengths"] = ["batch"]
        return shapes | {name: ["batch", *leaf.shape[1:]] for name, leaf in (self.state or {}).items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs."""
        return ("output", *(f"next_{name}" for name in self.state or {}))


def flatten_state(state: Any, name: str = "state") -> dict[str, Tensor]:
    """The tensors of a nested state, in order, by their names in an exported graph: ``state.blocks.0`` and so on."""
    if isinstance(state, Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {path: leaf for key, value in items for path, leaf in flatten_state(value, f"{name}.{key}").items()}


def _rebuild(template: Any, leaves: Iterator[Tensor]) -> Any:
    if isinstance(template, Tensor):
        return next(leaves)
    if isinstance(template, dict):
        return {key: _rebuild(value, leaves) for key, value in template.items()}
    return type(template)(_rebuild(value, leaves) for value in template)


class _Step(nn.Module):
    """One step of a model as a function of flat tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._template = model.initial_state(1)

    def forward(self, input: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        output, after = self.model.step(input, _rebuild(self._template, iter(state)))
        return (output, *flatten_state(after).values())


def trace(model: nn.Module, data: Any, step: bool, padded: bool) -> Traced:
    """Trace the forward pass of a model, or one time step of it.

    Args:
        model: see `compressm.saving.export.to_onnx`; it is copied.
        data: the example; None for random sequences.
        step: one time step instead of the forward pass.
        padded: whether the lengths of padded rows are an input.

    Raises:
        ExportError: the model does not offer what was asked for, or cannot be traced.
    """
    model = copied_module(model).cpu().float().eval().requires_grad_(False)
    _check_offers(model, step, padded)
    example = _random_example(model) if data is None else example_of(model, data)
    if example.ndim < 2 or 0 in example.shape:
        raise ExportError(f"example must be (batch, length, ...), none of them 0; got shape {tuple(example.shape)}")
    state = flatten_state(getattr(model, "initial_state")(2)) if step else None  # noqa: B009  # not every nn.Module's
    root, arguments, dynamic = _call(model, example, state, padded)
    try:
        with quiet():
            program = torch.export.export(root, arguments, dynamic_shapes=dynamic, strict=False)
        _forget_paths(program)
    except Exception as error:  # torch raises errors of many kinds, about the model's code or about the shapes
        raise ExportError(f"torch.export cannot trace this {type(model).__name__}: {first_line(error)}") from error
    lengths = torch.linspace(1, example.shape[1], len(example)).round().long() if padded else None
    return Traced(model, program, dynamic, example, lengths, state, _metadata(model, step))


def _check_offers(model: nn.Module, step: bool, padded: bool) -> None:
    """Whether the model has a graph for every length, and the step, or takes the lengths, that are to be exported."""
    filters = [name for name, one in model.named_modules() if isinstance(one, LongConvolution)]
    if filters:
        raise ExportError(
            f"{filters[0] or 'the model'} is a LongConvolution, which has an FFT of another size for every length, and "
            "a step that keeps all inputs: call compressm.distil(model, order=16), which makes it a state space model"
        )
    if padded and (step or "lengths" not in inspect.signature(model.forward).parameters):
        why = "a step reads one input at a time" if step else f"{type(model).__name__}.forward does not take them"
        raise ExportError(f"lengths=True, but {why}: leave it out")
    if step and not (hasattr(model, "step") and hasattr(model, "initial_state")):
        raise ExportError(
            f"step=True, but {type(model).__name__} has no step(u, state) and initial_state(batch): add them, or "
            "export the sequence model"
        )


def _call(model: nn.Module, example: Tensor, state: dict[str, Tensor] | None, padded: bool) -> tuple[Any, Any, Any]:
    """The module that is traced, the arguments that it is traced with, and their free axes."""
    # Two sequences of 16 steps: torch takes sizes of 0 and 1 for constants.
    sequence = example[:1, :1].expand(2, 16, *example.shape[2:]).contiguous()
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    if state is not None:
        dynamic = {"input": {0: batch}, "state": tuple({0: batch} for _ in state)}
        # A compiler takes the strides of these tensors for those of every call, and reads beside another tensor's rows.
        return _Step(model), tuple(leaf.contiguous() for leaf in (sequence[:, 0], *state.values())), dynamic
    if padded:
        return model, (sequence, torch.tensor([16, 9])), ({0: batch, 1: length}, {0: batch})
    return model, (sequence,), ({0: batch, 1: length},)


def _forget_paths(program: torch.export.ExportedProgram) -> None:
    """Remove stack traces, which hold paths on this machine."""
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _metadata(model: nn.Module, step: bool) -> dict[str, Any]:
    from compressm import __version__  # not at the top: the package may import this module

    metadata: dict[str, Any] = {
        "compressm": __version__,
        "class": type(model).__name__,
        "kind": "step" if step else "sequence",
    }
    with suppress(UnsupportedModelError):  # a model of other layers
        metadata["state_dims"] = state_dims(model)
    return metadata


def example_of(model: nn.Module, data: Any) -> Tensor:
    """The input of the first batch of some data."""
    if isinstance(data, Tensor) and 0 in data.shape:
        return data  # the caller refuses it, in the words for an example
    call = next(calls(model, data))
    given = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    return given[0].cpu()


def _random_example(model: nn.Module) -> Tensor:
    longest = min([1000, *(one.max_length for one in model.modules() if isinstance(one, Convolution))])
    generator, shape = torch.Generator().manual_seed(0), (2, longest)
    config: dict[str, Any] = getattr(model, "config", {})
    if config.get("vocabulary") is not None:
        return torch.randint(config["vocabulary"], shape, generator=generator)
    width = config.get("d_input", getattr(model, "d_model", None))
    if not isinstance(width, int):
        raise ExportError(
            f"compressm does not know the input of a {type(model).__name__}: pass example=, sequences of shape (batch, "
            "length, ...)"
        )
    return torch.randn(*shape, width, generator=generator)


@contextmanager
def quiet() -> Generator[None]:
    """Silence the exporters' warnings and log lines, which are about their own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "root")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


__all__ = ["Traced", "example_of", "first_line", "flatten_state", "quiet", "trace"]
