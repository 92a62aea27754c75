"""States that are kept for ever and states that are forgotten at once, side by side, in single precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from compressm.scans import native
from scan_cases import ENGINES, LOG_DECAY, SCANS, STATELESS, arguments, defined, run

# log |lam| or log of a decay: from 1 - 1e-7 over 1e-7 and the denormals of both precisions to exactly zero.
EXTREMES = [-1e-7, 0.0, -1e-3, math.log(1e-7), math.log(1e-39), math.log(2e-45), -1e3, -1e4, -math.inf]
CASES = [pytest.param(name, engine, id=f"{name}-{engine}") for name, engine in ENGINES]


def with_extremes(name: str, length: int, values: list[float]) -> list[Tensor]:
    """Arguments in float32, in which decays are drawn from ``values``."""
    args = arguments(name, length, dtype=torch.float32)
    if name == "selective":  # exp(delta A)
        args[2] = -torch.rand_like(args[2]) - 0.1
        args[1] = torch.tensor([-v for v in values if math.isfinite(v)])[
            torch.randint(len([v for v in values if math.isfinite(v)]), args[1].shape)
        ]
        args[0] = args[0] / args[1].clamp_min(1)  # inputs of size delta u
    else:
        at = LOG_DECAY[name]
        args[at] = torch.tensor(values)[torch.randint(len(values), args[at].shape)]
    if name == "delta":
        args[4] = args[4] / args[4].norm(dim=-1, keepdim=True)
    return args


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
    total: Any = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(("name", "engine"), CASES)
@pytest.mark.parametrize("length", [5, 300])
def test_outputs_states_and_gradients_in_single_precision(name: str, engine: str, length: int) -> None:
    for draw in range(3):
        torch.manual_seed(draw)
        args = with_extremes(name, length, EXTREMES if draw else EXTREMES[2:])
        exact = [arg.double() for arg in args]
        got, expected = run(name, engine, args), defined(name, engine, exact)
        for y, right in zip(got, expected, strict=True):
            assert (y - right).abs().max() <= 1e-5 * right.abs().max()

        weights = [torch.randn_like(right) for right in expected]
        leaves, right_leaves = [a.requires_grad_() for a in args], [a.requires_grad_() for a in exact]
        got = gradients(run(name, engine, args), leaves, [w.float() for w in weights])
        expected = gradients(defined(name, engine, exact), right_leaves, weights)
        for to, right in zip(got, expected, strict=True):
            assert (to - right).abs().max() <= 3e-5 * right.abs().max()


@pytest.mark.parametrize("engine", ["direct", "chunked", "loop"])
@pytest.mark.parametrize("magnitude", [1e-39, 3e-42, 2e-45, 1e-45])
def test_a_denormal_eigenvalue_leaves_the_newest_input(engine: str, magnitude: float) -> None:
    """Where lam is next to nothing, the state is what the last step has written."""
    args = arguments("lti", 40, dtype=torch.float32)
    args[1] = torch.full_like(args[1], math.log(magnitude))
    state = run("lti", engine, args)[1]
    written = args[0][:, -1] @ torch.cat([args[3], args[4]]).T
    torch.testing.assert_close(state, written.view_as(state), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ssd", "gla", "delta"])
@pytest.mark.parametrize("least", [-1e3, -1e4])
def test_what_is_forgotten_costs_no_digits(name: str, least: float) -> None:
    """Differences of running sums: one strong decay in a chunk must not spoil the weak ones after it."""
    args = with_extremes(name, 128, [-1e-3, -1e-2, least])
    got, expected = run(name, "chunked", args), defined(name, "chunked", [arg.double() for arg in args])
    for y, right in zip(got, expected, strict=True):
        assert (y - right).abs().max() <= 3e-6 * right.abs().max()


@pytest.mark.parametrize(("name", "engine"), [case for case in ENGINES if case[1] not in STATELESS])
def test_strided_arguments(name: str, engine: str) -> None:
    args = arguments(name)
    strided = [torch.stack([arg, torch.full_like(arg, torch.nan)], -1)[..., 0] for arg in args]
    reversed_axes = [arg.permute(*range(arg.ndim)[::-1]).contiguous().permute(*range(arg.ndim)[::-1]) for arg in args]
    weights = [torch.randn_like(y) for y in defined(name, engine, args)]
    expected = defined(name, engine, leaves := [a.clone().requires_grad_() for a in args])
    for given in (strided, reversed_axes):
        mine = [a.detach().requires_grad_() for a in given]
        got = run(name, engine, mine)
        for y, right in zip(got, expected, strict=True):
            torch.testing.assert_close(y, right)
        rights = gradients(defined(name, engine, leaves), leaves, weights)
        for to, right in zip(gradients(got, mine, weights), rights, strict=True):
            torch.testing.assert_close(to, right)


@pytest.mark.parametrize(("name", "engine"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_have_states_in_float32(name: str, engine: str, dtype: torch.dtype) -> None:
    """Rounded arguments go in, and only the outputs and gradients are rounded again; parameters may be float32."""
    args = [arg.to(dtype) for arg in arguments(name, 20)]
    args[-1] = args[-1].float()
    leaves = [arg.requires_grad_() for arg in args]
    exact = [arg.detach().double().requires_grad_() for arg in args]
    got, expected = run(name, engine, leaves), defined(name, engine, exact)
    assert got[0].dtype == dtype
    assert all(state.dtype == torch.float32 for state in got[1:])
    tolerance = 2 * torch.finfo(dtype).eps
    assert (got[0] - expected[0]).abs().max() <= tolerance * expected[0].abs().max()
    for state, right in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(state, right.float(), rtol=1e-4, atol=1e-4)
    weights = [torch.randn_like(y) for y in expected]
    weights[0] = weights[0].to(dtype).double()
    mine = gradients(got, leaves, [w.to(y.dtype) for w, y in zip(weights, got, strict=True)])
    for to, right, leaf in zip(mine, gradients(expected, exact, weights), leaves, strict=True):
        assert to.dtype == leaf.dtype
        assert (to - right).abs().max() <= 2 * tolerance * right.abs().max() + 1e-6


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("name", ["selective", "ssd", "gla", "delta"])
def test_half_precision_is_kept_as_it_came(name: str) -> None:
    """No wider copy of an argument waits for the backward pass."""

    def kept(dtype: torch.dtype) -> int:
        leaves = [arg.to(dtype).requires_grad_() for arg in arguments(name, 200)]
        given, found = {leaf.untyped_storage().data_ptr() for leaf in leaves}, dict[int, Tensor]()

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            SCANS[name](*leaves, engine="native")
        return sum(tensor.untyped_storage().nbytes() for at, tensor in found.items() if at not in given)

    assert kept(torch.bfloat16) <= kept(torch.float32) + 256
