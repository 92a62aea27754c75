"""Several sequences in one row: every scan, in every engine, gives what the sequences give one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compressm.scans import gla_scan
from scan_cases import BATCH, DEFINITIONS, ENGINES, SCANS, arguments

LENGTH = 150
CASES = [pytest.param(name, engine, id=f"{name}-{engine}") for name, engine in ENGINES if name not in ("lti", "siso")]
# In the first row a sequence begins at once, one has a single step, and chunks begin and end inside of others; the
# second row goes on from its initial state.
BEGINNINGS = ((0, 1, 40, 63, 64, 130), (17, 149))


def starts() -> Tensor:
    found = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    for row, places in zip(found, BEGINNINGS, strict=True):
        row[list(places)] = True
    return found


def one_by_one(name: str, args: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition on each sequence alone, put together again; and each row's last state."""
    rows, last = list[Tensor](), list[Tensor]()
    for b, places in enumerate(BEGINNINGS):
        pieces, state = list[Tensor](), args[-1][b : b + 1]
        for begin, end in zip((0, *places), (*places, LENGTH), strict=True):
            now = [arg[b : b + 1, begin:end] if arg.shape[:2] == (BATCH, LENGTH) else arg for arg in args[:-1]]
            if begin in places:
                state = torch.zeros_like(state)
            if begin < end:
                y, state = DEFINITIONS[name](*now, state)
                pieces.append(y)
        rows.append(torch.cat(pieces, 1))
        last.append(state)
    return torch.cat(rows), torch.cat(last)


def with_gradients(outputs: tuple[Tensor, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, weights)]


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_packed_sequences_are_what_they_are_alone(name: str, engine: str) -> None:
    torch.manual_seed(0)
    args = [arg.float() for arg in arguments(name, LENGTH)]
    exact = [arg.double().requires_grad_() for arg in args]
    truth = with_gradients(one_by_one(name, exact), exact)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        leaves = [arg.to(dtype, copy=True).requires_grad_() for arg in args]
        outputs: Any = SCANS[name](*leaves, return_state=True, engine=engine, starts=starts())
        for got, right in zip(with_gradients(outputs, leaves), truth, strict=True):
            assert (got - right).abs().max() <= tolerance * right.abs().max(), dtype


@pytest.mark.parametrize("name", ["selective", "ssd", "gla", "delta"])
def test_nothing_of_a_sequence_is_in_the_next_one(name: str) -> None:
    """Where the second sequence writes nothing, it reads nothing, in half precision too."""
    args = [arg.bfloat16() for arg in arguments(name, 20)]
    first = torch.zeros(BATCH, 20, dtype=torch.bool)
    first[:, 9] = True
    args[0] = args[0].clone()
    args[0][:, 9:] = 0
    y, state = SCANS[name](*args, return_state=True, starts=first)
    assert y[:, 8].abs().max() > 0.01
    assert y[:, 9:].abs().max() < 1e-36
    assert state.abs().max() < 1e-36


def test_packing_does_not_shorten_the_chunks_of_gated_linear_attention() -> None:
    """Chunks get shorter where decays are strong, and then more states are kept; between sequences none is needed."""
    leaves = [arg.float().requires_grad_() for arg in arguments("gla", LENGTH)]
    kept = list[int]()
    for packed in (None, starts()):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (kept.append(kept.pop() + tensor.numel()), tensor)[1], lambda tensor: tensor
        ):
            gla_scan(*leaves, engine="chunked", starts=packed)
    assert kept[1] < 1.5 * kept[0]


@pytest.mark.parametrize("name", ["selective", "ssd", "gla", "delta"])
def test_starts_of_another_shape_or_dtype_are_refused(name: str) -> None:
    args = arguments(name, 20)
    for wrong in (torch.zeros(BATCH, 21, dtype=torch.bool), torch.zeros(BATCH, 20, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"starts must be bool of shape \(2, 20\)"):
            SCANS[name](*args, starts=wrong)
