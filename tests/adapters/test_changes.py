"""Changes of layers as values, and what is left of a layer after one is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressm.adapters.changes import LayerChange, ParameterChange, layer_values, write


def change(names: tuple[str, ...], *values: torch.Tensor, **attributes: object) -> LayerChange:
    nothing = torch.zeros(1, 1)
    parts = tuple(
        ParameterChange((name,), (value,), 0, nothing, nothing) for name, value in zip(names, values, strict=True)
    )
    return LayerChange(parts, {name.replace("__", "."): value for name, value in attributes.items()})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4)
        self.register_buffer("table", torch.arange(4.0))
        self.state_size = 4


def test_values_and_attributes_are_written_and_parameters_stay_the_same_objects() -> None:
    block = Block()
    weight, bias = block.proj.weight, block.proj.bias
    block.proj(torch.randn(2, 3)).sum().backward()
    new, table = torch.randn(2, 3).double(), torch.tensor([7.0, 8.0])
    write(block, change(("proj.weight",), new, proj__out_features=2, state_size=2, table=table))
    assert block.proj.weight is weight
    assert weight.dtype == torch.float64  # as planned
    assert torch.equal(weight.data, new)
    assert weight.grad is None
    assert bias.grad is not None  # it was not written
    assert (block.proj.out_features, block.state_size) == (2, 2)
    assert torch.equal(block.table, table)  # type: ignore[arg-type]
    assert "table" in dict(block.named_buffers())
    # Both are copies: the change may be written into other models too.
    new.zero_()
    table.zero_()
    assert bool(weight.any())
    assert bool(block.table.any())  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(4, 3), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_have_the_new_shape_while_an_old_loss_is_held(shape: tuple[int, int], dtype: torch.dtype) -> None:
    linear = nn.Linear(3, 4, bias=False).to(dtype)
    u = torch.ones(2, 3, dtype=dtype)
    loss = linear(u).sum()  # its graph refers to the old shape
    transposed = torch.zeros(shape[1], shape[0], dtype=dtype).mT
    write(linear, change(("weight",), transposed))
    linear(u).sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.shape == shape
    assert linear.weight.is_contiguous()
    assert bool(loss.isfinite())


def test_a_change_on_the_cpu_is_the_same_change() -> None:
    one = change(("a", "b"), torch.ones(2, device="meta"), torch.zeros(3), c=torch.ones(1, device="meta"), d=5)
    assert list(one.values()) == ["a", "b"]
    with pytest.raises(NotImplementedError, match="meta"):  # a tensor without values cannot be moved: so it is tried
        one.cpu()
    two = change(("a", "b"), torch.ones(2), torch.zeros(3), c=torch.ones(1), d=5)
    moved = two.cpu()
    assert moved.attributes.keys() == {"c", "d"}
    assert moved.attributes["d"] == 5
    assert torch.equal(moved.attributes["c"], torch.ones(1))
    assert [(part.names, part.axis) for part in moved.parameters] == [(("a",), 0), (("b",), 0)]
    assert all(torch.equal(moved.values()[name], value) for name, value in two.values().items())


def test_values_of_a_layer_are_its_parameters_and_buffers_without_gradients() -> None:
    block = Block()
    found = layer_values(block)
    assert list(found) == ["proj.weight", "proj.bias", "table"]
    assert not any(value.requires_grad for value in found.values())
    assert found["proj.weight"].data_ptr() == block.proj.weight.data_ptr()  # no copies
