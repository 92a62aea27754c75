"""Batches of no sequence, and sequences of no step."""

from __future__ import annotations

import pytest
import torch

from scan_cases import ENGINES, SCANS, arguments, run

CASES = [pytest.param(name, engine, id=f"{name}-{engine}") for name, engine in ENGINES]
SIZES = [(0, 5), (3, 0), (0, 0)]


@pytest.mark.parametrize(("name", "engine"), CASES)
@pytest.mark.parametrize(("batch", "length"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_states_and_gradients(name: str, engine: str, batch: int, length: int, dtype: torch.dtype) -> None:
    like = run(name, engine, arguments(name, 4, 3, dtype))
    args = [arg.requires_grad_() for arg in arguments(name, length, batch, dtype)]
    y, *states = run(name, engine, args)
    assert y.shape == (batch, length, *like[0].shape[2:])
    assert y.dtype == like[0].dtype
    for state, full in zip(states, like[1:], strict=True):
        assert state.shape == (batch, *full.shape[1:])
        assert state.dtype == full.dtype
        torch.testing.assert_close(state, args[-1].to(state.dtype))
    leaves = args if states else args[:-1]
    total = y.sum() + sum(state.sum() for state in states)
    for i, (arg, grad) in enumerate(zip(leaves, torch.autograd.grad(total, leaves), strict=True)):
        assert grad.shape == arg.shape
        assert grad.dtype == arg.dtype
        # The last state is the first one.
        torch.testing.assert_close(
            grad, torch.ones_like(arg) if states and i == len(args) - 1 else torch.zeros_like(arg)
        )


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_no_initial_state_is_zero_and_nan_does_not_spread(name: str, batch: int, length: int) -> None:
    args = [torch.full_like(arg, torch.nan) for arg in arguments(name, length, batch)]
    y, state = SCANS[name](*args[:-1], return_state=True)
    assert y.shape[:2] == (batch, length)
    assert state.shape == args[-1].shape
    assert not state.any()


@pytest.mark.parametrize("name", SCANS)
def test_an_unknown_engine_is_refused_there_too(name: str) -> None:
    args = arguments(name, 0)
    with pytest.raises(ValueError, match=r"engine must be 'auto', .* got 'cuda'"):
        SCANS[name](*args, engine="cuda")
    with pytest.raises(ValueError, match="must have shape"):
        SCANS[name](*args[:-1], args[-1][:1])


@pytest.mark.parametrize("name", SCANS)
def test_under_transforms(name: str) -> None:
    args = arguments(name, 0)
    y, tangent = torch.func.jvp(lambda u: run(name, "auto", [u, *args[1:]])[0], (args[0],), (args[0],))
    assert y.shape == tangent.shape == (2, 0, *y.shape[2:])
    several = torch.stack([args[0]] * 3)
    assert torch.vmap(lambda u: run(name, "auto", [u, *args[1:]])[0])(several).shape == (3, *y.shape)
