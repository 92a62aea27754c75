"""Export for deployment: a model over whole sequences, or one time step of it, to ONNX or as a `torch.export` program.

    from compressm.saving.export import to_onnx
    report = to_onnx(model, "model-step.onnx", step=True)      # needs pip install "compressm[deploy]"

Every file is run and compared with the model before it gets its name: what has been written computes the same.

Names in the graph: the sequence model has ``input`` (batch, length, ...) and ``output``, with batch and length free.
The step has ``input`` (batch, ...), ``output``, and every tensor of the state twice, as input ``state...`` and as
output ``next_state...``; the state starts as zeros.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressm.cutting import state_dims
from compressm.errors import ExportError, MissingExtraError, UnsupportedModelError
from compressm.observing.inputs import calls
from compressm.saving.export_report import ExportReport
from compressm.saving.quantise import quantise

StrPath = str | os.PathLike[str]
Runner = Callable[[Sequence[Tensor]], list[Tensor]]


def to_onnx(
    model: nn.Module,
    path: StrPath,
    *,
    step: bool = False,
    int8: bool = False,
    example: Any = None,
    tolerance: float = 1e-4,
    lengths: bool = False,
    int8_error: float = 0.02,
) -> ExportReport:
    """Write a model as one ONNX file, in float32.

    Args:
        model: any of `compressm.layers`, or a model of your own that `torch.export` can trace; for ``step`` it has
            ``initial_state(batch)`` and ``step(u, state)``, with nested dicts, lists or tuples of tensors as state.
        path: the file; its folder exists.
        step: export `step` instead of the forward pass.
        int8: store the weights of matrix products as 8-bit integers, and compute with such (see
            `compressm.saving.quantise`), in all layers where ``int8_error`` allows it.
        example: input sequences to check with, shape ``(batch, length, ...)``, or data in another form that
            `compressm.observing.inputs` knows, of which the first batch is taken; by default two random ones of 1000
            steps. Models of your own need it. With ``int8`` give sequences of your data: what rounding costs depends
            on them, and recurrences add it up over the whole length.
        tolerance: largest error allowed, times the largest output where that is above 1; not applied to ``int8``.
        lengths: give the graph a second input, ``lengths``, int64 of shape ``(batch,)``, for rows that are padded at
            their end; for models whose ``forward`` takes it, as those of `compressm.layers` do. Not for ``step``: of a
            sequence that is over, no more steps are asked.
        int8_error: largest error that ``int8`` may cause: root mean square over the whole example sequences, as a
            share of the outputs' standard deviation. Layers that would cost more keep a higher precision; the report
            says which, and what each would have cost.

    Raises:
        ExportError: the model cannot be traced, the file cannot be written, it computes something else, or no layer can
            be stored in 8 bits within ``int8_error``.
        MissingExtraError: the ``deploy`` extra is not installed.
    """
    _require_onnx()
    if not 0 < int8_error < float("inf"):
        raise ExportError(f"int8_error must be a positive number, a share of the outputs' deviation; got {int8_error}")
    path = Path(path)
    traced = _trace(model, example, step, lengths)
    with _scratch(path) as scratch:
        scopes, reference = _write_onnx(traced, scratch), _reference(traced)
        report = _verify(traced, reference, onnx_runner(scratch), tolerance)  # of the float model, quantised or not
        if int8:
            rounded = scratch.with_suffix(".int8")

            def error_of(file: Path) -> float:
                return _verify(traced, reference, onnx_runner(file), None)["relative_error"]

            with _quiet():
                made = quantise(scratch, rounded, error_of, int8_error, scopes)
            report = _verify(traced, reference, onnx_runner(rounded), None)
            report |= {"precisions": made.precisions, "costs": made.costs}
            os.replace(rounded, scratch)
        os.replace(scratch, path)
    return _report(traced, path, "onnx", int8, {**report, "calibrated": example is not None})


def to_torch(
    model: nn.Module,
    path: StrPath,
    *,
    step: bool = False,
    example: Any = None,
    tolerance: float = 1e-4,
    lengths: bool = False,
) -> ExportReport:
    """Write a model as a `torch.export` program (``.pt2``): it runs without compressm and without the model's code.

    Args:
        model: see `to_onnx`.
        path: see `to_onnx`.
        step: see `to_onnx`.
        example: see `to_onnx`.
        tolerance: see `to_onnx`.
        lengths: see `to_onnx`.

    Raises:
        ExportError: the model cannot be traced, the file cannot be written, or it computes something else.
    """
    path = Path(path)
    traced = _trace(model, example, step, lengths)
    with _scratch(path) as scratch, _quiet():
        torch.export.save(traced.program, scratch)
        program: Any = torch.export.load(scratch).module()

        def run(inputs: Sequence[Tensor]) -> list[Tensor]:
            outputs = program(*inputs)
            return [outputs] if isinstance(outputs, Tensor) else list(outputs)

        report = _verify(traced, _reference(traced), run, tolerance)
        os.replace(scratch, path)
    return _report(traced, path, "torch", False, {**report, "calibrated": example is not None})


def onnx_runner(path: StrPath) -> Runner:
    """A function that runs an ONNX file on one thread of the CPU, from tensors in the order of its inputs to the list
    of its outputs."""
    _require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = (tensor.numpy() for tensor in inputs)
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


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


@dataclass(frozen=True)
class _Traced:
    model: nn.Module  # a float32 copy on the CPU, in evaluation mode
    program: torch.export.ExportedProgram
    dynamic_shapes: Any
    example: Tensor
    lengths: Tensor | None  # of the example's sequences, where they are an input
    state: dict[str, Tensor] | None  # of two sequences; None for the sequence model
    metadata: dict[str, Any]

    @property
    def inputs(self) -> dict[str, list[int | str]]:
        free = 1 if self.state is not None else 2
        shapes: dict[str, list[int | str]] = {"input": [*("batch", "length")[:free], *self.example.shape[2:]]}
        if self.lengths is not None:
            shapes["lengths"] = ["batch"]
        return shapes | {name: ["batch", *leaf.shape[1:]] for name, leaf in (self.state or {}).items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("output", *(f"next_{name}" for name in self.state or {}))


def _trace(model: nn.Module, example: Any, step: bool, padded: bool) -> _Traced:
    from compressm import __version__  # not at the top: the package may import this module

    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    if padded and (step or "lengths" not in inspect.signature(model.forward).parameters):
        why = "a step reads one input at a time" if step else f"{type(model).__name__}.forward does not take them"
        raise ExportError(f"lengths=True, but {why}: leave it out")
    if step and not (hasattr(model, "step") and hasattr(model, "initial_state")):
        raise ExportError(
            f"step=True, but {type(model).__name__} has no step(u, state) and initial_state(batch): add them, or "
            "export the sequence model"
        )
    example = _random_example(model) if example is None else _example(model, example)
    if example.ndim < 2 or 0 in example.shape:
        raise ExportError(f"example must be (batch, length, ...), none of them 0; got shape {tuple(example.shape)}")
    # Traced with 2 sequences of 16 steps: torch takes sizes of 0 and 1 for constants.
    sequence = example[:1, :1].expand(2, 16, *example.shape[2:]).contiguous()
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    state = flatten_state(getattr(model, "initial_state")(2)) if step else None  # noqa: B009  # not every nn.Module's
    if state is None:
        root, arguments, dynamic = model, (sequence,), ({0: batch, 1: length},)
        if padded:
            arguments, dynamic = (sequence, torch.tensor([16, 9])), (*dynamic, {0: batch})
    else:
        root, arguments = _Step(model), (sequence[:, 0], *state.values())
        dynamic = {"input": {0: batch}, "state": tuple({0: batch} for _ in state)}
    try:
        with _quiet():
            program = torch.export.export(root, arguments, dynamic_shapes=dynamic, strict=False)
        for part in program.graph_module.modules():
            for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # paths on this machine
    except Exception as error:  # torch raises errors of many kinds, about the model's code or about the shapes
        raise ExportError(f"torch.export cannot trace this {type(model).__name__}: {_first_line(error)}") from error
    metadata: dict[str, Any] = {
        "compressm": __version__,
        "class": type(model).__name__,
        "kind": "step" if step else "sequence",
    }
    with suppress(UnsupportedModelError):  # a model of other layers
        metadata["state_dims"] = state_dims(model)
    lengths = torch.linspace(1, example.shape[1], len(example)).round().long() if padded else None
    return _Traced(model, program, dynamic, example, lengths, state, metadata)


def _example(model: nn.Module, data: Any) -> Tensor:
    """The input of the first batch of some data."""
    if isinstance(data, Tensor) and 0 in data.shape:
        return data  # refused with the example's own words
    call = next(calls(model, data))
    given = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    return given[0].cpu()


def _random_example(model: nn.Module) -> Tensor:
    generator, shape = torch.Generator().manual_seed(0), (2, 1000)
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


def _write_onnx(traced: _Traced, path: Path) -> dict[str, str]:
    """Write the file; returns the module that every node of the graph comes from, where the exporter knows it."""
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    try:
        with _quiet():
            program: Any = torch.onnx.export(
                traced.program,
                dynamo=True,
                verbose=False,
                input_names=list(traced.inputs),
                output_names=list(traced.outputs),
                dynamic_shapes=traced.dynamic_shapes,
            )
            graph = program.model
            # What depends on parameters only (lam, gamma B) is computed now, whatever its size.
            optimizer.optimize_ir(graph, input_size_limit=2**40, output_size_limit=2**40)
            scopes = _scopes(graph.graph)
            # Names of modules and histories of foldings, larger than many a model.
            common.ClearMetadataAndDocStringPass()(graph)
            common.RemoveUnusedNodesPass()(graph)
            graph.metadata_props["compressm"] = json.dumps(traced.metadata)
            onnx_ir.save(graph, path)
        return scopes
    except Exception as error:  # conversion errors, of onnx_ir's and torch's own kinds
        raise ExportError(f"{type(traced.model).__name__} cannot be written as ONNX: {_first_line(error)}") from error


def _scopes(graph: Iterable[Any]) -> dict[str, str]:
    """The innermost module of every node, or what it follows where that is not known: a `step` is no module's call."""
    found, last = dict[str, str](), "the input"
    for node in graph:
        try:
            names = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))[:-1]
        except (ValueError, SyntaxError):
            names = []
        inner = str(names[-1]).removeprefix("model.") if names else ""
        last = inner or last
        found[str(node.name)] = f"in {inner}" if inner else f"after {last}"
    return found


def _reference(traced: _Traced) -> list[Tensor]:
    """The model's own outputs over the example sequences: of the whole and of a single step, or step by step."""
    example, model = traced.example, traced.model
    with torch.no_grad():
        if traced.state is None:
            return [model(*inputs) for inputs in _whole_and_least(traced)]
        stepper: Any = model
        state, outputs = stepper.initial_state(len(example)), list[Tensor]()
        for now in example.unbind(1):
            output, state = stepper.step(now, state)
            outputs.append(output)
        return outputs


def _whole_and_least(traced: _Traced) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs of the whole example, and of one step of one sequence: batch and length are free axes."""
    lengths = () if traced.lengths is None else (traced.lengths,)
    least = (traced.example[:1, :1], *(torch.ones_like(value[:1]) for value in lengths))
    return (traced.example, *lengths), least


def _outputs(traced: _Traced, run: Runner) -> Iterator[Tensor]:
    """The exported file's outputs, in the order of `_reference`; a step goes on from its own state."""
    example = traced.example
    if traced.state is None:
        yield from (run(list(inputs))[0] for inputs in _whole_and_least(traced))
        return
    initial: Any = getattr(traced.model, "initial_state")(len(example))  # noqa: B009  # not every nn.Module's
    leaves = list(flatten_state(initial).values())
    for now in example.unbind(1):
        output, *leaves = run([now.contiguous(), *leaves])
        yield output


def _verify(traced: _Traced, reference: list[Tensor], run: Runner, tolerance: float | None) -> dict[str, Any]:
    """Compare with the model over the example sequences."""
    error = largest = squares = 0.0
    for index, (got, expected) in enumerate(zip(_outputs(traced, run), reference, strict=True)):
        if got.shape != expected.shape:
            raise ExportError(f"the exported model gives shape {tuple(got.shape)}, PyTorch {tuple(expected.shape)}")
        difference = (got - expected).abs().nan_to_num(float("inf"), float("inf"))
        error = max(error, difference.max().item())
        largest = max(largest, expected.abs().max().item())
        if traced.state is not None or index == 0:  # the whole sequence
            squares += difference.double().square().sum().item()
    if tolerance is not None and error > tolerance * max(1.0, largest):
        raise ExportError(
            f"the exported model differs from PyTorch by {error:.1e} where outputs reach {largest:.1e}, more than the "
            f"tolerance {tolerance:.0e}; nothing was written"
        )
    whole = torch.stack(reference) if traced.state is not None else reference[0]
    spread = (whole.double() - whole.double().mean()).square().sum().item() or whole.double().square().sum().item()
    relative = (squares / spread) ** 0.5 if spread else float("inf") if squares else 0.0
    steps = traced.example.shape[1]
    return {"max_error": error, "largest_output": largest, "checked_steps": steps, "relative_error": relative}


def _report(traced: _Traced, path: Path, format: str, int8: bool, check: dict[str, Any]) -> ExportReport:
    return ExportReport(
        path=str(path),
        format=format,
        step=traced.state is not None,
        int8=int8,
        bytes=path.stat().st_size,
        inputs=traced.inputs,
        outputs=traced.outputs,
        **check,
    )


@contextmanager
def _scratch(path: Path) -> Generator[Path]:
    """A file in a temporary folder beside ``path``, so that it can be renamed into place."""
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.absolute().parent) as folder:
            yield Path(folder) / path.name
    except OSError as error:
        raise ExportError(f"{path}: cannot be written ({error.strerror or error}); choose another file") from error


@contextmanager
def _quiet() -> Generator[None]:
    """Without the exporters' own warnings and log lines, which are about their insides."""
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxruntime  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        raise MissingExtraError(f'{error.name} is needed to export: pip install "compressm[deploy]"') from error


__all__ = ["ExportReport", "flatten_state", "onnx_runner", "to_onnx", "to_torch"]
