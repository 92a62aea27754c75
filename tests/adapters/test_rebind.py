"""A layer's own forward with other functions under some of its names, and nothing else changed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.rebind import global_names, not_fused, rebound_forward


def scale(x: Tensor) -> Tensor:
    return 2 * x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = 5.0

    def forward(self, x: Tensor, factor: float = 3.0, *, sign: float = -1.0) -> Tensor:
        return sign * factor * scale(x) + self.offset


class Inside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert __class__ is Inside  # type: ignore[name-defined] # a closure
        return scale(x)


def test_the_function_is_replaced_for_one_instance_only() -> None:
    layer, x = Layer(), torch.ones(2)
    rebound = rebound_forward(layer, {"scale": lambda x: 10 * x})
    assert rebound.__self__ is layer
    assert rebound.__name__ == "forward"
    assert rebound(x).tolist() == [-25.0, -25.0]  # defaults are the forward's own
    assert rebound(x, 1.0, sign=1.0).tolist() == [15.0, 15.0]
    assert layer(x).tolist() == Layer()(x).tolist() == [-1.0, -1.0]
    assert rebound_forward(Inside(), {"scale": torch.zeros_like})(x).tolist() == [0.0, 0.0]


def test_wrappers_around_the_forward_are_left_out() -> None:
    def wrapped(forward: Any) -> Any:
        @functools.wraps(forward)
        def around(*args: Any, **kwargs: Any) -> Any:
            return -forward(*args, **kwargs)

        return around

    class Wrapped(Layer):
        forward = wrapped(Layer.forward)

    assert Wrapped()(torch.ones(1)).tolist() == [1.0]
    assert rebound_forward(Wrapped(), {})(torch.ones(1)).tolist() == [-1.0]
    assert global_names(Wrapped()) == global_names(Layer()) >= {"scale", "offset"}


def test_a_forward_that_is_not_written_in_python_has_no_names() -> None:
    class Foreign(nn.Module):
        forward = torch.relu  # type: ignore[assignment]

    assert global_names(Foreign()) == frozenset()
    assert not_fused(1, 2, x=3) is None  # type: ignore[func-returns-value]
