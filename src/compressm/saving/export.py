"""Export for deployment: a model over whole sequences, or one time step of it, to ONNX or as a `torch.export` program.

    from compressm.saving.export import to_onnx
    report = to_onnx(model, "model-step.onnx", step=True)      # needs pip install "compressm[deploy]"

Every file is run and compared with the model before it gets its name. A file that exists computes what the model does.

Names in the graph: the sequence model has ``input`` (batch, length, ...) and ``output``, with batch and length free.
The step has ``input`` (batch, ...), ``output``, and every tensor of the state twice, as input ``state...`` and as
output ``next_state...``; the state starts as zeros.
"""

from __future__ import annotations

import ast
import json
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressm.errors import ExportError, MissingExtraError
from compressm.saving.export_report import ExportReport
from compressm.saving.quantise import quantise
from compressm.saving.tracing import Traced, first_line, flatten_state, quiet, trace

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
            steps. Models of your own need it. With ``int8`` give sequences of your data: the error of rounding
            depends on them, and a recurrence accumulates it over the whole length.
        tolerance: largest error allowed, times the largest output where that is above 1; not applied to ``int8``.
        lengths: give the graph a second input, ``lengths``, int64 of shape ``(batch,)``, for rows that are padded at
            their end; for models whose ``forward`` takes it, as those of `compressm.layers` do. Not for ``step``: the
            caller makes no more steps when a sequence is over.
        int8_error: largest error that ``int8`` may cause: root mean square over the whole example sequences, as a
            share of the outputs' standard deviation, of each output's own where there are several. Layers that would
            cost more keep a higher precision; the report says which, and what each would have cost.

    Raises:
        ExportError: the model cannot be traced, the file cannot be written, it computes something else, or no layer can
            be stored in 8 bits within ``int8_error``.
        MissingExtraError: the ``deploy`` extra is not installed.
    """
    _require_onnx()
    if not 0 < int8_error < float("inf"):
        raise ExportError(f"int8_error must be a positive number, a share of the outputs' deviation; got {int8_error}")
    path = Path(path)
    traced = trace(model, example, step, lengths)
    with _scratch(path) as scratch:
        scopes, reference = _write_onnx(traced, scratch), _reference(traced)
        report = _verify(traced, reference, onnx_runner(scratch), tolerance)  # of the float model, quantised or not
        if int8:
            rounded = scratch.with_suffix(".int8")

            def error_of(file: Path) -> float:
                return _verify(traced, reference, onnx_runner(file), None)["relative_error"]

            with quiet():
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
    traced = trace(model, example, step, lengths)
    with _scratch(path) as scratch, quiet():
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


def _write_onnx(traced: Traced, path: Path) -> dict[str, str]:
    """Write the file; returns the module that every node of the graph comes from, where the exporter knows it."""
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    try:
        with quiet():
            program: Any = torch.onnx.export(
                traced.program,
                dynamo=True,
                verbose=False,
                input_names=list(traced.inputs),
                output_names=list(traced.outputs),
                dynamic_shapes=traced.dynamic_shapes,
            )
            graph = program.model
            # Everything that depends on parameters only (lam, gamma B) is computed now, whatever its size.
            optimizer.optimize_ir(graph, input_size_limit=2**40, output_size_limit=2**40)
            scopes = _scopes(graph.graph)
            # The names of modules and the records of foldings can be larger than the model.
            common.ClearMetadataAndDocStringPass()(graph)
            common.RemoveUnusedNodesPass()(graph)
            graph.metadata_props["compressm"] = json.dumps(traced.metadata)
            onnx_ir.save(graph, path)
        return scopes
    except Exception as error:  # conversion errors, of onnx_ir's and torch's own kinds
        raise ExportError(f"{type(traced.model).__name__} cannot be written as ONNX: {first_line(error)}") from error


def _scopes(graph: Iterable[Any]) -> dict[str, str]:
    """The innermost module of every node. Where it is not known, as in a `step`, the last known one before it."""
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


def _reference(traced: Traced) -> list[Tensor]:
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


def _whole_and_least(traced: Traced) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs of the whole example, and of one step of one sequence: batch and length are free axes."""
    lengths = () if traced.lengths is None else (traced.lengths,)
    least = (traced.example[:1, :1], *(torch.ones_like(value[:1]) for value in lengths))
    return (traced.example, *lengths), least


def _outputs(traced: Traced, run: Runner) -> Iterator[Tensor]:
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


def _verify(traced: Traced, reference: list[Tensor], run: Runner, tolerance: float | None) -> dict[str, Any]:
    """Compare with the model over the example sequences."""
    error = largest = 0.0
    differences = list[Tensor]()
    for got, expected in zip(_outputs(traced, run), reference, strict=True):
        if got.shape != expected.shape:
            raise ExportError(f"the exported model gives shape {tuple(got.shape)}, PyTorch {tuple(expected.shape)}")
        differences.append((got - expected).abs().nan_to_num(float("inf"), float("inf")))
        error = max(error, differences[-1].max().item())
        largest = max(largest, expected.abs().max().item())
    if tolerance is not None and error > tolerance * max(1.0, largest):
        raise ExportError(
            f"the exported model differs from PyTorch by {error:.1e} where outputs reach {largest:.1e}, more than the "
            f"tolerance {tolerance:.0e}; nothing was written"
        )
    if traced.state is None:  # the whole sequence, and not the single step
        relative = _relative_error(differences[0], reference[0])
    else:
        relative = _relative_error(torch.stack(differences), torch.stack(reference))
    steps = traced.example.shape[1]
    return {"max_error": error, "largest_output": largest, "checked_steps": steps, "relative_error": relative}


def _relative_error(difference: Tensor, whole: Tensor) -> float:
    """Root mean square of the difference as a share of the standard deviation: of each output's own, where outputs are
    sequences, since one in large units would hide what happens to the others; of all together for single vectors.

    Args:
        difference, whole: shape ``(..., outputs)``.
    """
    columns = whole.shape[-1] if whole.ndim > 2 else 1
    difference, whole = (value.double().reshape(-1, columns) for value in (difference, whole))
    squares, spread = difference.square().sum(0), (whole - whole.mean(0)).square().sum(0)
    if not bool(spread.any()):
        spread = whole.square().sum(0)
    if not bool(spread.any()):
        return float("inf") if bool(squares.any()) else 0.0
    # An output that hardly moves is held against a thousandth of how the others do.
    return float((squares / spread.clamp_min(1e-6 * float(spread.mean()))).mean().sqrt())


def _report(traced: Traced, path: Path, format: str, int8: bool, check: dict[str, Any]) -> ExportReport:
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


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxruntime  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        raise MissingExtraError(f'{error.name} is needed to export: pip install "compressm[deploy]"') from error


__all__ = ["ExportReport", "flatten_state", "onnx_runner", "to_onnx", "to_torch"]
