"""Forward mode, `torch.func`, vmap and second derivatives of every scan and engine, against the definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from scan_cases import ENGINES, SCANS, STATELESS, arguments, defined, run

NAMES = list(SCANS)
CASES = [pytest.param(name, engine, id=f"{name}-{engine}") for name, engine in ENGINES]


def tangents(args: list[Tensor]) -> list[Tensor]:
    return [torch.randn_like(arg) for arg in args]


def difference(name: str, engine: str, args: list[Tensor], along: list[Tensor]) -> list[Tensor]:
    """Central differences of the definition in float64, extrapolated to step 0."""

    def at(step: float) -> list[Tensor]:
        ahead, behind = (
            defined(name, engine, [a + sign * step * v for a, v in zip(args, along, strict=True)]) for sign in (1, -1)
        )
        return [(x - y) / (2 * step) for x, y in zip(ahead, behind, strict=True)]

    return [(4 * fine - coarse) / 3 for fine, coarse in zip(at(5e-4), at(1e-3), strict=True)]


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_forward_mode_is_the_derivative(name: str, engine: str) -> None:
    args = arguments(name)
    along = tangents(args)
    values, got = torch.func.jvp(lambda *args: run(name, engine, args), tuple(args), tuple(along))
    for value, expected in zip(values, defined(name, engine, args), strict=True):
        torch.testing.assert_close(value, expected)
    for tangent, expected in zip(got, difference(name, engine, args, along), strict=True):
        torch.testing.assert_close(tangent, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_dual_numbers_carry_their_tangents(name: str, engine: str) -> None:
    args = arguments(name)
    along = tangents(args)
    # One dual number, the input, beside parameters that want a gradient: the most frequent use.
    for tensor in args[1:]:
        tensor.requires_grad_()
    with forward_ad.dual_level():
        outputs = run(name, engine, [forward_ad.make_dual(args[0], along[0]), *args[1:]])
        got = [forward_ad.unpack_dual(y).tangent for y in outputs]
    still = [along[0], *(torch.zeros_like(v) for v in along[1:])]
    for tangent, expected in zip(got, difference(name, engine, args, still), strict=True):
        torch.testing.assert_close(tangent.detach(), expected.detach(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_functional_gradients_are_the_same(name: str, engine: str) -> None:
    args = arguments(name)
    weights = [torch.randn_like(y) for y in defined(name, engine, args)]

    def loss(*args: Tensor) -> Tensor:
        return sum(((y * w).sum() for y, w in zip(run(name, engine, args), weights, strict=True)), torch.zeros(()))

    got = torch.func.grad(loss, argnums=tuple(range(len(args))))(*args)
    leaves = [arg.requires_grad_() for arg in args]
    total: Any = sum((y * w).sum() for y, w in zip(defined(name, engine, leaves), weights, strict=True))
    expected = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_vmap_is_a_loop(name: str, engine: str) -> None:
    members = [arguments(name) for _ in range(3)]
    batched = [torch.stack(tensors) for tensors in zip(*members, strict=True)]
    got = torch.vmap(lambda *args: run(name, engine, args))(*batched)
    for i, member in enumerate(members):
        for a, b in zip(got, defined(name, engine, member), strict=True):
            torch.testing.assert_close(a[i], b)
    # One axis in the middle, and parameters that all share.
    moved = batched[0].movedim(0, 2)
    got = torch.vmap(lambda u: run(name, engine, [u, *members[0][1:]]), in_dims=2)(moved)
    for i, member in enumerate(members):
        for a, b in zip(got, defined(name, engine, [member[0], *members[0][1:]]), strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_each_example(name: str) -> None:
    args = arguments(name, batch=1)
    several = torch.randn(3, *args[0].shape, dtype=torch.float64)

    def loss(log_decay: Tensor, u: Tensor) -> Tensor:
        return run(name, "auto", [u, log_decay, *args[2:]])[0].square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(args[1], several)
    for i, u in enumerate(several):
        leaf = args[1].clone().requires_grad_()
        outputs = defined(name, "auto", [u, leaf, *args[2:]])[0]
        torch.testing.assert_close(got[i], torch.autograd.grad(outputs.square().sum(), leaf)[0])


def pulled_back(name: str, engine: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Arguments that want a gradient, outputs of an ordinary forward pass, and outputs of the definition."""
    args = [arg.requires_grad_() for arg in arguments(name)]
    leaves = args[: -1 if engine in STATELESS else None]
    return leaves, list(run(name, engine, args)), list(defined(name, engine, args))


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_a_backward_pass_carries_tangents(name: str, engine: str) -> None:
    leaves, outputs, expected = pulled_back(name, engine)
    grads, along = ([torch.randn_like(y) for y in outputs] for _ in range(2))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(g, v) for g, v in zip(grads, along, strict=True)]
        got = [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(outputs, leaves, duals)]
    # The backward pass is linear in what comes into it.
    for tangent, exact in zip(got, torch.autograd.grad(expected, leaves, along), strict=True):
        assert not tangent.requires_grad
        torch.testing.assert_close(tangent, exact)


@pytest.mark.parametrize(
    ("name", "engine"),
    [case for case in CASES if case.values[1] != "fft"],  # of which PyTorch cannot map over a view, and says so
)
def test_a_backward_pass_is_mapped_over(name: str, engine: str) -> None:
    leaves, outputs, expected = pulled_back(name, engine)
    several = [torch.randn(3, *y.shape, dtype=y.dtype) for y in outputs]

    def back(*grads: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    batched = torch.autograd.grad(outputs, leaves, several, retain_graph=True, is_grads_batched=True)
    for got in (torch.vmap(back)(*several), batched):
        for i in range(3):
            exact = torch.autograd.grad(expected, leaves, [grad[i] for grad in several], retain_graph=True)
            for a, b in zip(got, exact, strict=True):
                torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_second_derivatives(name: str, engine: str) -> None:
    args = [arg.requires_grad_() for arg in arguments(name, length=5)]
    weights = [torch.randn_like(y) for y in defined(name, engine, args)]
    # The first backward pass depends on these too.
    grads = [weight.clone().requires_grad_() for weight in weights]
    leaves = args[: -1 if engine in STATELESS else None]
    along = [torch.randn_like(leaf) for leaf in leaves]

    def second(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad([y.sin() for y in outputs], leaves, grads, create_graph=True)
        product: Any = sum((a * v).sum() for a, v in zip(first, along, strict=True))
        return torch.autograd.grad(product, [*leaves, *grads])

    for a, b in zip(second(run(name, engine, args)), second(defined(name, engine, args)), strict=True):
        torch.testing.assert_close(a, b)


def test_third_derivatives_and_arguments_that_depend_on_each_other() -> None:
    """Inputs made of one tensor: a partial derivative that followed the path between them would count it twice."""
    for name, engine in ENGINES:
        if engine == "torch":  # a checkpoint forgets its graph after the first pass
            continue
        args = arguments(name, length=4)
        x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

        def derivatives(outputs: Any, x: Tensor = x) -> list[Tensor]:
            value, found = outputs[0].sin().sum(), []
            for _ in range(3):
                (value,) = torch.autograd.grad(value, x, create_graph=True)
                found.append(value)
            return found

        mixed = [args[0] * x, args[1] * (1 + 0.1 * x), *args[2:-1], args[-1] * x]
        for a, b in zip(derivatives(run(name, engine, mixed)), derivatives(defined(name, engine, mixed)), strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, case=(name, engine): f"{case}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_hessian(name: str) -> None:
    """Forward over reverse, over a batch of directions."""
    args = arguments(name, length=4, batch=1)

    def loss(decay: Tensor, scan: Any) -> Tensor:
        return scan(name, "auto", [args[0], decay, *args[2:]])[0].sin().sum()

    got = torch.func.hessian(loss)(args[1], run)
    torch.testing.assert_close(got, torch.autograd.functional.hessian(lambda d: loss(d, defined), args[1]))


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_calls_after_a_transform_use_the_kernels(name: str) -> None:
    """The choice of the slow form ends with the transform."""
    from compressm.scans.transforms import transformed

    args = arguments(name)
    torch.func.jvp(lambda u: run(name, "auto", [u, *args[1:]])[0], (args[0],), (args[0],))
    assert not transformed()
