from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressm.runtime.copies import copied_module


class Keeps(nn.Module):
    """A layer that keeps its last state in itself, as transformers' RecurrentGemma does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.state: Any = None

    def forward(self, u: Tensor) -> Tensor:
        self.state = self.inner(u)
        return self.state


def test_a_state_that_a_forward_pass_has_left_is_copied_without_its_graph() -> None:
    model = nn.Sequential(Keeps())
    y = model(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    other = copied_module(model)
    state: Any = other[0].state
    assert torch.equal(state, y)
    assert not state.requires_grad
    assert state.data_ptr() != y.data_ptr()
    y.sum().backward()  # the graph of the original is whole
    assert model[0].inner.weight.grad is not None  # type: ignore[union-attr]
    assert other[0].inner.weight.grad is None  # type: ignore[union-attr]
    assert all(a is not b and torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
