"""What a training step of a layer does, counted instead of timed: the same on every machine, however busy.

`tests/lab/bench/test_growth.py` holds these numbers against stored ones; ``python benchmarks/growth.py`` draws curves.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressm.layers.families import FAMILIES
from compressm.scans import native


@dataclass(frozen=True)
class Counts:
    """One forward and one backward pass.

    Attributes:
        operations: of PyTorch that reach its dispatcher and are not mere views; a compiled pass is one.
        kernels: calls of the compiled kernels.
        kept_bytes: what the forward pass keeps for the backward pass, parameters and input left out.
    """

    operations: int
    kernels: int
    kept_bytes: int

    def to_dict(self) -> dict[str, int]:
        """Plain values, for JSON."""
        return asdict(self)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count(layer: nn.Module, inputs: Tensor) -> Counts:
    """Count a training step of a layer, on inputs ``(batch, length, width)`` that require a gradient.

    The first step is not counted: caches are filled then.
    """
    given = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers(), inputs)}
    kept = dict[int, tuple[int, Tensor]]()  # by storage; the tensor keeps the address from being used again
    kernels = list[str]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    _step(layer, inputs)
    with native.watched(lambda name, _: kernels.append(name)), _Operations() as operations:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = layer(inputs).sum()
        total.backward()
    return Counts(operations.count, len(kernels), sum(size for size, _ in kept.values()))


def _step(layer: nn.Module, inputs: Tensor) -> None:
    layer(inputs).sum().backward()


# As many sequences as the longest vectors have lanes, so that the same engine is the cheapest on every processor.
BASE = {"n": 8, "length": 64, "batch": 16, "width": 32, "layers": 1}
# What is changed of `BASE`, by name.
SIZES: dict[str, dict[str, int]] = {
    "base": {},
    "longer": {"length": 256},
    "more states": {"n": 32},
    "more sequences": {"batch": 64},
    "wider": {"width": 64},
    "more layers": {"layers": 3},
}


def count_family(family: str) -> dict[str, dict[str, int]]:
    """The counts of a layer of `compressm.layers.families` at all `SIZES`, as plain values."""
    found = dict[str, dict[str, int]]()
    for name, changes in SIZES.items():
        size = BASE | changes
        torch.manual_seed(0)
        layers = [FAMILIES[family](size["width"], size["n"]) for _ in range(size["layers"])]
        inputs = torch.randn(size["batch"], size["length"], size["width"], requires_grad=True)
        found[name] = count(nn.Sequential(*layers), inputs).to_dict()
    return found
