"""The compiled engine of `ssd_scan` against its definition in float64: shapes, views, decays, threads, NaN."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from compressm.scans import native, ssd_scan

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
DECAYS = [1 - 1e-7, 1 - 1e-4, 0.9, 0.1, 1e-7]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-13}


@dataclass(frozen=True)
class Case:
    """Arguments of the scan by name, rounded to their dtype; None for an absent one."""

    arguments: Mapping[str, Tensor | None]
    weights: tuple[Tensor, Tensor]
    text: str


def draw(seed: int, length: int, dtype: torch.dtype) -> Case:
    """Random shapes, decays and optional arguments. x, B and C are parts of one tensor in half of the cases."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    batch, groups, per_group = chance.randint(1, 3), chance.randint(1, 2), chance.randint(1, 3)
    p, n = (chance.choice([1, 3, 8, 17, 32, 64]) for _ in "pn")
    heads, width = groups * per_group, groups * n
    if chance.random() < 0.1:
        n, width = 200, 200 * groups
    x, B, C = normal(batch, length, heads * p + 2 * width).split([heads * p, width, width], -1)
    shaped = [x.unflatten(-1, (heads, p)), B.unflatten(-1, (groups, n)), C.unflatten(-1, (groups, n))]
    if chance.random() < 0.5:
        shaped = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in shaped]
    decays = torch.tensor(chance.choice([DECAYS, DECAYS[:1], DECAYS[-1:], DECAYS[:3]]), dtype=torch.float64)
    log_decay = decays.log()[torch.randint(len(decays), (batch, length, heads), generator=generator)]
    optional = {"delta": normal(batch, length, heads), "D": normal(heads), "initial_state": normal(batch, heads, p, n)}
    given = {name: tensor if chance.random() < 0.5 else None for name, tensor in optional.items()}
    wide = torch.promote_types(dtype, torch.float32)
    state = given["initial_state"]
    return Case(
        {"x": shaped[0], "log_decay": log_decay.to(wide), "B": shaped[1], "C": shaped[2], **given,
         "initial_state": None if state is None else state.to(wide)},
        (normal(batch, length, heads, p), normal(batch, heads, p, n).to(wide)),
        f"{seed=} {batch=} {length=} {groups=} {per_group=} {p=} {n=} {[k for k, v in given.items() if v is not None]}",
    )  # fmt: skip


def results(case: Case, engine: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs, last state and all gradients; in ``dtype``, or in each argument's own."""
    leaves = {
        name: None if value is None else (value.detach() if dtype is None else value.to(dtype)).requires_grad_()
        for name, value in case.arguments.items()
    }
    x, others = leaves["x"], {name: leaf for name, leaf in leaves.items() if name != "x"}
    y, state = ssd_scan(x, **others, return_state=True, engine=engine)  # pyright: ignore
    weights = [weight.to(out.dtype) for weight, out in zip(case.weights, (y, state), strict=True)]
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad([y, state], list(present.values()), weights)
    return {"y": y.detach(), "state": state.detach(), **dict(zip(present, gradients, strict=True))}


def worst_error(case: Case, dtype: torch.dtype) -> tuple[float, str]:
    """The largest relative error (of norms) among outputs and gradients, and where it is."""
    truth, got = results(case, "loop", torch.float64), results(case, "native")
    errors = []
    for name, exact in truth.items():
        scale = exact.norm() + 1e-30
        if name == "log_decay" and dtype == torch.bfloat16:  # a sum of products of rounded outputs' gradients
            scale = scale + 1e-2 * truth["x"].norm()
        errors.append((float((got[name].double() - exact).norm() / scale), f"{name} of {case.text}"))
    return max(errors)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_outputs_and_gradients_are_those_of_a_float64_loop(length: int, dtype: torch.dtype) -> None:
    for seed in range(5):
        error, where = worst_error(draw(1000 * length + seed, length, dtype), dtype)
        assert error < TOLERANCE[dtype], where


@pytest.mark.exhaustive
def test_five_hundred_cases() -> None:
    for seed in range(500):
        dtype = torch.bfloat16 if seed % 4 == 3 else torch.float32
        error, where = worst_error(draw(seed, random.Random(seed).choice([1, 7, 64, 64, 1000]), dtype), dtype)
        assert error < TOLERANCE[dtype], where


@pytest.mark.slow
def test_a_long_sequence() -> None:
    generator = torch.Generator().manual_seed(0)
    x, B, C = torch.randn(3, 1, 30_001, 1, 4, generator=generator)
    log_decay = torch.tensor(DECAYS).log()[torch.randint(len(DECAYS), x.shape[:3], generator=generator)]
    arguments = {"x": x, "log_decay": log_decay, "B": B, "C": C}
    case = Case(arguments, (torch.randn(x.shape, generator=generator), torch.randn(1, 1, 4, 4)), "30,001 steps")
    error, where = worst_error(case, torch.float32)
    assert error < 1e-5, where


@pytest.mark.parametrize("seed", range(3))
def test_one_and_two_threads_give_the_same_bits(seed: int) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(draw(seed, 100, torch.float32), "native"))
    finally:
        torch.set_num_threads(before)
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["x", "log_decay", "B", "C", "delta", "initial_state"])
def test_what_is_not_finite_propagates(name: str, value: float) -> None:
    torch.manual_seed(0)
    arguments = {
        "x": torch.randn(2, 70, 2, 3), "log_decay": -torch.rand(2, 70, 2), "B": torch.randn(2, 70, 1, 4),
        "C": torch.randn(2, 70, 1, 4), "delta": torch.rand(2, 70, 2), "initial_state": torch.randn(2, 2, 3, 4),
    }  # fmt: skip
    spoilt = arguments[name]
    if name == "initial_state":
        spoilt[0] = value
    else:
        spoilt[0, 40] = value
    case = Case(arguments, (torch.randn(2, 70, 2, 3), torch.randn(2, 2, 3, 4)), name)
    got, truth = results(case, "native"), results(case, "loop")
    assert not truth["y"][0, -1].isfinite().all() or name == "C"
    for result, exact in truth.items():
        assert not got[result][~exact.isfinite()].isfinite().any(), result
        assert got[result][1].isfinite().all(), result


def test_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    case = draw(3, 20, torch.float32)
    names = [name for name, value in case.arguments.items() if value is not None]

    def scan(*given: Tensor) -> Any:
        x, *others = given
        return ssd_scan(x, **dict(zip(names[1:], others, strict=True)), return_state=True)  # pyright: ignore

    values: Any = [case.arguments[name].detach().requires_grad_() for name in names]  # pyright: ignore
    got = torch.compile(scan, backend="aot_eager", fullgraph=True)(*values)
    expected = results(case, "native")
    torch.testing.assert_close(got[0], expected["y"])
    for name, gradient in zip(names, torch.autograd.grad(got, values, list(case.weights)), strict=True):
        torch.testing.assert_close(gradient, expected[name])
