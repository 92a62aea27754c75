"""Optimizers of torch and of other packages, with settings under which every part of their state is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressm.layers import Mamba

Make = Callable[[Iterable[nn.Parameter]], Optimizer]


def of(package: str, name: str, **settings: Any) -> Make:
    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        module = pytest.importorskip(package)
        optimizer: Any = getattr(module, name)(parameters, **settings)
        if callable(train := getattr(optimizer, "train", None)):
            train()
        return optimizer

    return make


def adam_mini(parameters: Iterable[nn.Parameter], name: str = "mixer.x_proj.weight") -> Optimizer:
    kind: Any = pytest.importorskip("adam_mini").Adam_mini
    named = [(f"{i}.{name}", parameter) for i, parameter in enumerate(parameters)]
    return kind(named, lr=1e-2, dim=8, n_heads=2, weight_decay=0.0, verbose=False)


TORCH: dict[str, Make] = {
    "SGD": of("torch.optim", "SGD", lr=1e-2, momentum=0.9),
    "Adam": of("torch.optim", "Adam", lr=1e-2, amsgrad=True),
    "AdamW": of("torch.optim", "AdamW", lr=1e-2),
    "RAdam": of("torch.optim", "RAdam", lr=1e-2),
    "NAdam": of("torch.optim", "NAdam", lr=1e-2),
    "Adamax": of("torch.optim", "Adamax", lr=1e-2),
    "Adagrad": of("torch.optim", "Adagrad", lr=1e-2),
    "RMSprop": of("torch.optim", "RMSprop", lr=1e-3, momentum=0.9),
    "RMSprop centered": of("torch.optim", "RMSprop", lr=1e-3, momentum=0.9, centered=True),
    "Adadelta": of("torch.optim", "Adadelta"),
    "Rprop": of("torch.optim", "Rprop", lr=1e-2),
    "ASGD": of("torch.optim", "ASGD", lr=1e-2, t0=1),
    "Adafactor": of("torch.optim", "Adafactor", lr=1e-2),
    "Muon": of("torch.optim", "Muon", lr=1e-2, weight_decay=0.0),
}
OTHERS: dict[str, Make] = {
    "transformers Adafactor": of("transformers.optimization", "Adafactor", scale_parameter=False),
    "transformers Adafactor with momentum": of("transformers.optimization", "Adafactor", beta1=0.9),
    "schedule-free AdamW": of("schedulefree", "AdamWScheduleFree", lr=1e-2),
    "schedule-free RAdam": of("schedulefree", "RAdamScheduleFree", lr=1e-2),
    "schedule-free SGD": of("schedulefree", "SGDScheduleFree", lr=1e-2),
    "Lion": of("lion_pytorch", "Lion", lr=1e-3),
    "Prodigy": of("prodigyopt", "Prodigy"),
    "Adan": of("adan_pytorch", "Adan", lr=1e-2),
    "Adam-mini": adam_mini,
}
ALL = {**TORCH, **OTHERS}


def tensors_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """The entries of a parameter's state that are no numbers."""
    return {
        key: value
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor) and value.ndim
    }


class Keeps(Optimizer):
    """Keeps for each parameter what ``make`` returns, and makes steps of gradient descent."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    def make(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"average": torch.zeros_like(parameter)}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.state[parameter].update(self.make(parameter))
                    parameter.data.sub_(group["lr"] * parameter.grad)


def layer_and_data() -> tuple[Mamba, Tensor]:
    torch.manual_seed(0)
    return Mamba(4, 8), torch.randn(3, 10, 4)
