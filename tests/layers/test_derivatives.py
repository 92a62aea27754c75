"""Forward mode, `torch.func`, vmap and second derivatives of every layer, against differences in double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from compressm.errors import CompressmError, DifferentiationError
from compressm.layers import LanguageModel, SequenceClassifier
from compressm.layers.activations import causal_conv, gated, gelu_dropout, glu_residual, step_sizes
from compressm.layers.narrow import batch_norm, gated_residual, linear
from layer_cases import LAYERS, WIDTH

LENGTH = 9


def case(name: str) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A layer in float64, an input, and a direction for every parameter and the input."""
    layer = LAYERS[name]().double()
    u = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    along = {key: 0.3 * torch.randn_like(value) for key, value in layer.named_parameters()}
    return layer, u, {**along, "u": torch.randn_like(u)}


def moved(layer: nn.Module, along: dict[str, Tensor], step: float) -> nn.Module:
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for key, value in other.named_parameters():
            value.add_(along[key], alpha=step)
    return other


def extrapolated(at: Callable[[float], Tensor]) -> Tensor:
    """The derivative of a function of one number at 0, by central differences."""
    coarse, fine = ((at(step) - at(-step)) / (2 * step) for step in (2e-4, 1e-4))
    return (4 * fine - coarse) / 3


@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode_is_the_derivative(name: str) -> None:
    layer, u, along = case(name)
    with torch.no_grad():
        expected = extrapolated(lambda step: moved(layer, along, step)(u + step * along["u"]))
    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    call = lambda parameters, u: functional_call(layer, parameters, (u,))  # noqa: E731
    _, tangent = jvp(call, (parameters, u), ({key: along[key] for key in parameters}, along["u"]))
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-7)

    # Dual numbers at the input, with parameters that want a gradient and without.
    for wanted in (True, False):
        layer.requires_grad_(wanted)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(u, along["u"]))).tangent
        with torch.no_grad():
            expected = extrapolated(lambda step: layer(u + step * along["u"]))
        torch.testing.assert_close(dual.detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_reverse_mode_agree(name: str) -> None:
    """``w . (J v) = (J^T w) . v`` with the ordinary backward pass."""
    layer, u, along = case(name)
    y = layer(u.requires_grad_())
    w = torch.randn_like(y)
    leaves = [*layer.parameters(), u]
    gradients = torch.autograd.grad(y, leaves, w, allow_unused=True, materialize_grads=True)
    backward = sum((g * v).sum() for g, v in zip(gradients, along.values(), strict=True))
    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    call = lambda parameters, u: functional_call(layer, parameters, (u,))  # noqa: E731
    _, tangent = jvp(call, (parameters, u.detach()), ({key: along[key] for key in parameters}, along["u"]))
    torch.testing.assert_close((tangent * w).sum(), torch.as_tensor(backward))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_each_sequence(name: str) -> None:
    layer, u, _ = case(name)
    parameters = {key: value.detach() for key, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sequence: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sequence[None],)).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, u)
    for i, sequence in enumerate(u):
        total = layer(sequence[None]).square().sum()
        expected = torch.autograd.grad(total, list(layer.parameters()), allow_unused=True, materialize_grads=True)
        for key, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(got[key][i], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", LAYERS)
def test_an_ensemble_is_a_loop(name: str) -> None:
    members = [LAYERS[name]().double() for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    u = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    got = vmap(lambda p, b: functional_call(members[0], (p, b), (u,)))(parameters, buffers)
    for i, member in enumerate(members):
        torch.testing.assert_close(got[i], member(u))


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives(name: str) -> None:
    """The derivative of the ordinary gradient along a direction, by a second backward pass and by differences."""
    layer, u, along = case(name)

    def first(layer: nn.Module, u: Tensor, again: bool = False) -> list[Tensor]:
        leaves = [*layer.parameters(), u.requires_grad_()]
        found = torch.autograd.grad(layer(u).sin().sum(), leaves, create_graph=again, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]

    product = torch.stack([(g * v).sum() for g, v in zip(first(layer, u, True), along.values(), strict=True)]).sum()
    got = torch.autograd.grad(product, [*layer.parameters(), u], allow_unused=True, materialize_grads=True)

    def at(step: float) -> Tensor:
        found = first(moved(layer, along, step), (u + step * along["u"]).detach())
        return torch.cat([g.flatten() for g in found])

    torch.testing.assert_close(torch.cat([g.flatten() for g in got]), extrapolated(at), rtol=1e-5, atol=1e-6)


# The element-wise parts, which have compiled passes of their own.
def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def module(kind: type[nn.Module], *arguments: Any, **options: Any) -> nn.Module:
    return kind(*arguments, **options).double()


PARTS: dict[str, Callable[[], tuple[Callable[..., Any], list[Tensor]]]] = {
    "gelu": lambda: (lambda x: gelu_dropout(x, 0.0, True), [double(2, 5, 8)]),
    "glu": lambda: (lambda u, v: glu_residual(u, v, 0.0, True), [double(2, 5, 8), double(2, 5, 16)]),
    "gate": lambda: (gated, [double(2, 5, 8), double(2, 5, 8), double(8), double(2, 5, 8)]),
    "conv": lambda: (causal_conv, [module(nn.Conv1d, 8, 8, 3, groups=8), double(2, 5, 8)]),
    "steps": lambda: (step_sizes, [module(nn.Linear, 2, 8), double(2, 5, 2)]),
    "linear": lambda: (linear, [module(nn.Linear, 3, 8), double(2, 5, 3)]),
    "tail": lambda: (
        lambda u, x, glu: gated_residual(u, x, glu, 0.0, True),
        [double(2, 5, 8), double(2, 5, 8), module(nn.Linear, 8, 16)],
    ),
    "norm": lambda: (
        lambda norm, x: sum(batch_norm(norm, x)),
        [module(nn.BatchNorm1d, 8, track_running_stats=True), double(2, 5, 8)],
    ),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_block(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, and in PyTorch's own operations, which know every derivative."""
    function, arguments = PARTS[part]()
    leaves = [x.requires_grad_() for x in arguments if isinstance(x, Tensor)]
    leaves += [p for m in arguments if isinstance(m, nn.Module) for p in m.parameters()]
    w = torch.randn_like(function(*arguments))
    along = [torch.randn_like(leaf) for leaf in leaves]

    def second() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*arguments).sin(), leaves, w.requires_grad_(), create_graph=True)
        product = torch.stack([(g * v).sum() for g, v in zip(first, along, strict=True)]).sum()
        return torch.autograd.grad(product, [*leaves, w], allow_unused=True, materialize_grads=True)

    got = second()
    with forward_ad.dual_level():
        duals = [x if isinstance(x, nn.Module) else forward_ad.make_dual(x, torch.ones_like(x)) for x in arguments]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
    monkeypatch.setattr("compressm.scans.native.available", lambda unit: False)
    for a, b in zip(got, second(), strict=True):
        torch.testing.assert_close(a, b)
    with forward_ad.dual_level():
        duals = [x if isinstance(x, nn.Module) else forward_ad.make_dual(x, torch.ones_like(x)) for x in arguments]
        torch.testing.assert_close(tangent, forward_ad.unpack_dual(function(*duals)).tangent)


@pytest.mark.parametrize("part", ["gelu", "glu", "tail"])
def test_second_derivatives_of_dropout_are_refused(part: str) -> None:
    x, u = double(2, 5, 8).requires_grad_(), double(2, 5, 8)
    glu: nn.Module = module(nn.Linear, 8, 16)
    y = {
        "gelu": lambda: gelu_dropout(x, 0.1, True),
        "glu": lambda: glu_residual(u, torch.cat([x, x], -1), 0.1, True),
        "tail": lambda: gated_residual(u, x, glu, 0.1, True),
    }[part]()
    with pytest.raises(DifferentiationError, match=r"dropout \(p=0.1\).*model.eval\(\)") as raised:
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert isinstance(raised.value, CompressmError)
    torch.autograd.grad(gelu_dropout(x, 0.1, True).sum(), x)  # once is allowed


@pytest.mark.parametrize("layer", ["lru", "mamba"])
def test_models_in_forward_mode(layer: str) -> None:
    model = SequenceClassifier(3, 2, WIDTH, 4, n_layers=2, dropout=0.0, layer=layer).double().eval()
    u, along = double(2, LENGTH, 3), double(2, LENGTH, 3)
    with torch.no_grad():
        expected = extrapolated(lambda step: model(u + step * along))
    torch.testing.assert_close(jvp(model, (u,), (along,))[1].detach(), expected, rtol=1e-6, atol=1e-7)


def test_a_language_model_for_each_example() -> None:
    model = LanguageModel(7, WIDTH, 4, layer="mamba2", head_dim=3).double()
    tokens = torch.randint(7, (3, LENGTH))
    got = vmap(lambda one: functional_call(model, dict(model.named_parameters()), (one[None],)))(tokens)
    torch.testing.assert_close(got[:, 0], model(tokens))
