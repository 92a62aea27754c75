"""The trip of one parameter through a cut: which packages meet it between `Compressor.step` and the written weight."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import compressm
from compressm.layers import LRU, Mamba2

SOURCE = compressm.__file__.removesuffix("__init__.py")


def memory(tensor: Tensor) -> int:
    """Where a tensor's numbers are; sparse tensors have no such place, and are known by themselves."""
    return id(tensor) if tensor.is_sparse else tensor.untyped_storage().data_ptr()


class Trip(TorchDispatchMode):
    """Notes which modules of ours compute with some tensors, or with what has been computed from them, and who calls.

    Attributes:
        calls: at every such operation, the modules on the stack, from the inside out: ``theory/systems.py``.
    """

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.calls: list[tuple[str, ...]] = []
        self._held = list(tensors)  # so that no other tensor gets their memory
        self._known = {memory(tensor) for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if any(memory(one) in self._known for one in given):
            made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
            self._held += made
            self._known |= {memory(one) for one in made if one.is_sparse or memory(one)}  # 0 if there are no numbers
            self.calls.append(tuple(self._modules()))
        return result

    @staticmethod
    def _modules() -> list[str]:
        frame, found = sys._getframe(1), list[str]()
        while frame is not None:
            if (file := frame.f_code.co_filename).startswith(SOURCE):
                found.append(file.removeprefix(SOURCE))
            frame = frame.f_back
        return found


def trip_of(name: str, layer: nn.Module, inputs: Callable[[], Tensor]) -> Trip:
    """Train a layer for two steps, cut half of its states after the second one, and follow a parameter through that."""
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
    compressor = compressm.Compressor(layer, optimizer, 2, fraction=0.5, cuts=1, window=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        layer(inputs()).square().mean().backward()
        optimizer.step()
        parameter = layer.get_parameter(name)
        averages = [value for value in optimizer.state[parameter].values() if value.dim() > 0]
        with Trip(parameter.detach(), *averages) as trip:
            event = compressor.step()
    assert event is not None
    assert event.kind == "cut"
    assert len(averages) == 2
    return trip


def packages(calls: list[tuple[str, ...]], depth: int | None = None) -> set[str]:
    """The packages of these modules, of the innermost ``depth`` ones. `from_first_rank` runs what it is given, and the
    watch over the optimizer's steps copies a parameter of the cut layer."""
    met = [call for call in calls if call[0] != "training/steps.py"]
    modules = {module for call in met for module in call[:depth]} - {"runtime/processes.py"}
    return {module.partition("/")[0] for module in modules}


def test_the_input_matrix_of_an_lru_meets_four_packages() -> None:
    trip = trip_of("B_re", LRU(4, 8), lambda: torch.randn(2, 12, 4))
    assert packages(trip.calls) == {"training", "cutting", "adapters", "theory"}
    assert packages(trip.calls, depth=1) == {"cutting", "adapters", "theory"}


def test_the_projection_of_a_mamba2_meets_three_packages_and_a_copy_of_it_is_run() -> None:
    trip = trip_of("in_proj.weight", Mamba2(8, 8, head_dim=8), lambda: torch.randn(2, 12, 8))
    trial = [call for call in trip.calls if "cutting/replay.py" in call]  # the error of the cut on the data
    assert packages([call for call in trip.calls if call not in trial]) == {"training", "cutting", "adapters"}
    assert packages(trial) - {"training", "cutting", "adapters"} == {"runtime", "layers", "scans"}
