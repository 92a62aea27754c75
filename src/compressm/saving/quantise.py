"""Weights of an ONNX file as 8-bit integers, layer by layer, as far as its outputs stay within an error.

A layer is a matrix of weights and the products with it. It has one of three precisions:

- ``int8``: weights are 8-bit integers, one scale per channel, and so are the inputs of the product, whose scale is
  found anew at every call (ONNX Runtime's dynamic quantisation). The smallest file and the fastest product.
- ``int8 weights``: the weights only. The file is as small; the product is one of floating point numbers.
- ``float32``: as it was.

A recurrence accumulates the rounding errors of its inputs over thousands of steps. A single product therefore does not
show what a layer's precision does to the output, so this module measures it: it runs the file that it has written.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from compressm.errors import ExportError

PRECISIONS = ("int8", "int8 weights", "float32")
_CHANNELS = {"MatMul": 1, "Gemm": 1, "Gather": 0}  # the axis of a weight that has scales of its own


@dataclass(frozen=True)
class Quantised:
    """What became of every layer.

    Attributes:
        precisions: one of `PRECISIONS` by layer.
        costs: the error of the file's outputs if only this layer is ``int8``; empty where all layers could be.
        error: the error of the outputs as they are.
    """

    precisions: dict[str, str]
    costs: dict[str, float]
    error: float


def quantise(
    source: Path, target: Path, measure: Callable[[Path], float], tolerance: float, scopes: Mapping[str, str]
) -> Quantised:
    """Write the file with as many layers in 8 bits as its outputs allow.

    Args:
        source: an ONNX file in float32.
        target: the file to write.
        measure: the error of the outputs of a file.
        tolerance: the largest error allowed.
        scopes: the module that a node of the graph comes from, by the node's name.

    Raises:
        ExportError: no layer can be stored in 8 bits within the tolerance, or there is none.
    """
    layers = _layers(source, scopes)
    if not layers:
        raise ExportError(
            "int8: the graph has no matrix of weights that could be stored in 8 bits; export without int8"
        )
    chosen = dict.fromkeys(layers, "int8")

    def error_of(precisions: Mapping[str, str]) -> float:
        _write(source, target, {node: precisions[name] for name, nodes in layers.items() for node in nodes})
        return measure(target)

    error, costs = error_of(chosen), dict[str, float]()
    for now, better in itertools.pairwise(PRECISIONS):
        if error <= tolerance:
            break
        # The error if only this layer is rounded.
        alone = {name: error_of({**dict.fromkeys(layers, "float32"), name: now}) for name in layers}
        costs = costs or alone
        waiting = sorted(layers, key=alone.__getitem__)  # the most expensive last
        while waiting and error > tolerance:
            chosen[waiting.pop()] = better
            # Squares of independent errors add up. While their sum is far above the tolerance, no run is needed.
            if sum(alone[name] ** 2 for name in waiting) ** 0.5 <= 2 * tolerance or not waiting:
                error = error_of(chosen)
    if set(chosen.values()) == {"float32"} or error > tolerance:
        target.unlink(missing_ok=True)
        raise ExportError(
            f"int8_error = {tolerance:g}: on the example sequences, rounding a single layer changes the outputs by at "
            f"least {min(costs.values()):.2g} of their standard deviation; nothing was written: allow more, or export "
            "without int8"
        )
    return Quantised(chosen, costs, error)


def _layers(source: Path, scopes: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of the nodes that use each matrix of weights, by a name for it that people know."""
    graph = _load(source).graph
    sizes = {weight.name: len(weight.dims) for weight in graph.initializer}
    found: dict[str, list[str]] = {}
    for node in graph.node:
        weight = _weight_of(node, sizes)
        if weight is not None:
            known = "." in weight  # the model's own name, or one that the exporter made up for a transposed copy
            label = weight.removeprefix("model.") if known else f"{node.name} {scopes.get(node.name, '')}".strip()
            found.setdefault(label, []).append(node.name)
    return found


def _weight_of(node: Any, ranks: Mapping[str, int]) -> str | None:
    """The matrix of weights that a node multiplies by, or looks up rows in; None if there is none."""
    if node.op_type not in _CHANNELS:
        return None
    name = node.input[0 if node.op_type == "Gather" else 1]
    return name if ranks.get(name) == 2 else None


def _write(source: Path, target: Path, precisions: Mapping[str, str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix=".quantise-", dir=target.parent) as folder:
        between = Path(folder) / "weights.onnx"
        _store_weights(source, between, {name for name, one in precisions.items() if one == "int8 weights"})
        wanted = [name for name, one in precisions.items() if one == "int8"]
        if not wanted:
            os.replace(between, target)
            return
        # ONNX Runtime first splits products with a bias, into nodes with names of their own.
        both = [f"{name}{end}" for name in wanted for end in ("", "_MatMul")]
        quantize_dynamic(between, target, weight_type=QuantType.QInt8, per_channel=True, nodes_to_quantize=both)


def _store_weights(source: Path, target: Path, nodes: Iterable[str]) -> None:
    """Store the weights of some nodes as integers, each with a node that turns them back into numbers."""
    import onnx
    from onnx import numpy_helper

    model, wanted = _load(source), set(nodes)
    weights = {weight.name: weight for weight in model.graph.initializer}
    ranks, made = {name: len(weight.dims) for name, weight in weights.items()}, dict[tuple[str, int], str]()
    for node in [node for node in model.graph.node if node.name in wanted]:
        name = cast("str", _weight_of(node, ranks))
        axis = _CHANNELS[node.op_type]
        if node.op_type == "Gemm" and any(one.name == "transB" and one.i for one in node.attribute):
            axis = 0
        if (name, axis) not in made:
            made[name, axis] = f"{name}/int8/{axis}"
            integers, scales = _integers(numpy_helper.to_array(weights[name]), axis)
            parts = [f"{name}/int8/{axis}/{part}" for part in ("integers", "scales")]
            for part, array in zip(parts, (integers, scales), strict=True):
                model.graph.initializer.append(numpy_helper.from_array(array, part))
            restored = onnx.helper.make_node("DequantizeLinear", parts, [made[name, axis]], axis=axis)
            model.graph.node.insert(0, restored)
        node.input[list(node.input).index(name)] = made[name, axis]
    used = {name for node in model.graph.node for name in _all_inputs(node)}
    for name in [name for name in weights if name not in used]:
        model.graph.initializer.remove(weights[name])
    onnx.save(model, os.fspath(target))


def _integers(weight: Any, axis: int) -> tuple[Any, Any]:
    """8-bit integers and a scale per channel: ``weight ≈ integers * scale``."""
    largest = np.abs(weight).max(axis=1 - axis, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales.reshape(-1)


def _all_inputs(node: Any) -> Iterable[str]:
    """Names that a node reads, also inside of its loop bodies."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _all_inputs(inner)


def _load(path: Path) -> Any:
    import onnx

    return onnx.load(os.fspath(path))


__all__ = ["PRECISIONS", "Quantised", "quantise"]
