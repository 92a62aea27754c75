"""Operations against hand counts and PyTorch's own, memory against what is known to be kept."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm import Compressor
from compressm.layers import LRU, SequenceClassifier
from compressm.layers.activations import causal_conv
from compressm.scans import delta_scan, gla_scan, lti_scan, native
from compressm.scans.selective import selective_scan
from compressm.training import step_cost as formulas
from compressm.training.step_cost import StepCost, step_cost

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


def test_a_linear_layer_is_three_matrix_products_less_one() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(11, 5)
    cost = step_cost(layer, lambda layer: layer(x).square().sum())
    assert cost.flops == 2 * (2 * 11 * 5 * 7)  # forward, and the weight's gradient: the input needs none
    # x for the weight's gradient and the output for the square's; not the weight.
    assert cost.kept_bytes == 4 * (11 * 5 + 11 * 7)


class Scan(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(16, n))

    def forward(self, u: Tensor) -> Tensor:
        n = self.A.shape[1]
        return selective_scan(u, torch.ones_like(u), self.A, u.new_ones(2, 20, n), u.new_ones(2, 20, n))


@needs_compiler
def test_selective_scans_count_in_proportion_to_their_states() -> None:
    u = torch.randn(2, 20, 16)  # as many channels as the kernel takes at a time
    small, large = (step_cost(Scan(n), lambda model: model(u).sum()) for n in (4, 12))
    assert small.flops == (7 + 20) * u.numel() * 4
    assert large.flops == 3 * small.flops


@needs_compiler
def test_compiled_convolutions_are_counted() -> None:
    batch, length, h = 3, 20, 4

    class Convolution(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            tensors = (-torch.rand(n), torch.rand(n), *(torch.rand(n, h) for _ in range(2)))
            self.system = nn.ParameterList([*tensors, *(torch.rand(h, n) for _ in range(2))])

        def forward(self, u: Tensor) -> Tensor:
            return lti_scan(u, *self.system, engine="fft")

    u = torch.randn(batch, length, h)
    small, large = (step_cost(Convolution(n), lambda model: model(u).sum()).flops for n in (8, 16))
    impulse = large - small  # in proportion to n, and the rest does not depend on it
    assert small - impulse == pytest.approx(
        24 * batch * length * h * h + 5 * length * math.log2(length) * (5 * batch * h + 2 * h * h), abs=4
    )


def test_a_real_fourier_transform() -> None:
    class Transform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, u: Tensor) -> Tensor:
            return torch.fft.rfft(self.scale * u, dim=1).abs()

    u = torch.randn(4, 64)
    forward = 2.5 * 4 * 64 * math.log2(64)
    assert step_cost(Transform(), lambda model: model(u).sum()).flops >= forward


def test_nothing_changes() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, 4, 8, dropout=0.5)  # batch norm has running statistics
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    u = torch.randn(2, 12, 1, generator=torch.Generator().manual_seed(0))
    first = step_cost(model, lambda model: model.train()(u).sum())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert step_cost(model, lambda model: model.train()(u).sum()) == first


def test_fewer_states_cost_less_and_savings_say_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LRU(4, 32))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    compressor = Compressor(model, optimizer, 20, states=4, cuts=1, window=0.5)
    u = torch.randn(8, 40, 4)
    before = compressor.measure(lambda model: F.mse_loss(model(u), u))
    for _ in range(20):
        F.mse_loss(model(u), u).backward()
        optimizer.step()
        optimizer.zero_grad()
        if compressor.step():
            after = compressor.measure(lambda model: F.mse_loss(model(u), u))
    assert after.flops < before.flops
    saved = compressor.savings()
    assert saved is not None
    assert saved.flops == 10 * before.flops + 10 * after.flops
    assert saved.flops_if_big == 20 * before.flops
    assert f"{100 * (1 - saved.flops / saved.flops_if_big):.3g}% of the operations were spared" in str(saved)


def test_what_a_compressor_observes_is_no_part_of_a_step() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, 8, 32, layer="mamba")
    u = torch.randn(4, 40, 1)

    def cost() -> StepCost:
        return step_cost(model, lambda model: model.train()(u).sum())

    before = cost()
    compressor = Compressor(model, torch.optim.Adam(model.parameters()), 20, states=4)
    assert cost() == before
    assert not compressor.state_dict()["moments"]  # the copy has observed nothing for it
    model.train()(u)
    assert compressor.state_dict()["moments"]


def test_formulas_are_those_of_the_algorithms() -> None:
    batch, length, n, p, q = 3, 20, 5, 2, 7
    u, complex_states = (batch, length, p), (batch, length, 2, n)
    # B u and Re(C x) are real products of twice as many entries; lam x + v is 8 operations for a complex number.
    ends = batch * length * (2 * 2 * n * p + 2 * 2 * n * q)
    assert formulas._lti(u, None, None, (n, p), None, (q, n)) == ends + batch * length * 8 * n
    assert formulas._chain(complex_states) == 8 * batch * length * n
    assert formulas._chain_backward(complex_states) == 16 * batch * length * n
    # Transforms of all inputs, outputs and impulse responses, and a complex product at every frequency.
    transform = 5 * length * math.log2(length)
    expected = transform * (batch * p + batch * q + p * q) + 8 * batch * length * p * q
    assert formulas._convolution(u, (length, q, p)) == pytest.approx(expected, abs=1)
    assert formulas._real_transform((4, 64, 3), (1,)) == 2.5 * 4 * 64 * 3 * math.log2(64)
    assert formulas._real_transform((4, 8), (0, 1)) == 2.5 * 32 * math.log2(32)
    assert formulas._real_transform((4, 1), (1,)) == 10  # a transform of length one is a copy
    assert formulas._real_inverse_transform((4, 33), (1,), out_shape=(4, 64)) == 2.5 * 4 * 64 * math.log2(64)


def test_products_of_compiled_kernels_are_two_operations_each() -> None:
    rows, width, out = 6, 5, 7
    products = formulas._KERNELS
    assert products["linear_forward"]((rows, width, out)) == 2 * rows * width * out
    for needs_input, count in ((None, 1), (object(), 2)):  # the gradient of the input is a second product
        given = (rows, width, out, None, None, None, needs_input)
        assert products["linear_backward"](given) == count * 2 * rows * width * out
    # The impulse response of 20 steps, 4 of them 5 times, is a product over real and imaginary parts of the states.
    length, p, q, n, fine = 20, 3, 2, 6, 5
    assert products["impulse_forward"]((length, p, q, n, fine)) == 2 * (4 * q) * (2 * n) * (fine * p)
    assert products["impulse_backward"]((length, p, q, n, fine)) == 2 * products["impulse_forward"](
        (length, p, q, n, fine)
    )
    # The tail of a block has two products of square matrices side by side.
    assert products["tail_forward"]((rows, width)) == 2 * rows * width * 2 * width
    assert products["tail_backward"]((rows, width)) == 3 * products["tail_forward"]((rows, width))


@needs_compiler
@pytest.mark.parametrize("gated_keys", [True, False], ids=["gla", "delta"])
def test_matrix_states_are_counted_chunk_by_chunk(gated_keys: bool) -> None:
    batch, length, heads, p, n = 2, 48, 3, 8, 16
    x, k, q = (torch.randn(batch, length, heads, width, requires_grad=True) for width in (p, n, n))
    decay = -torch.rand(batch, length, heads, *([n] if gated_keys else []))

    def loss(_: nn.Module) -> Tensor:
        y = gla_scan(x, decay, k, q) if gated_keys else delta_scan(x, decay, torch.rand_like(decay), k, q)
        return y.sum()

    states, triangles = 2 * p * n, 17  # a chunk has 16 steps, and a triangle of m rows (m + 1) / 2 entries per row
    # Forward and backward: products with states, and the triangle's with values and keys; see kernels/gla.h, delta.h.
    per_step = (
        (7 * states + triangles * (3 * p + 5.5 * n)) if gated_keys else (10 * states + triangles * (6 * p + 8 * n))
    )
    assert step_cost(nn.Identity(), loss).flops == batch * length * heads * per_step


@needs_compiler
def test_short_convolutions_are_counted() -> None:
    conv, u = nn.Conv1d(6, 6, 4, groups=6, padding=3), torch.randn(2, 20, 6, requires_grad=True)
    cost = step_cost(conv, lambda conv: causal_conv(conv, u).sum())
    assert cost.flops == 4 * (2 * u.numel() * 4)  # forward, and backward again with two gradients


def test_no_kernel_is_forgotten() -> None:
    """Every kernel has a count, belongs to an operator that has one, or does nothing but element-wise work."""
    sources = [path.read_text(encoding="utf-8") for path in Path(formulas.__file__).parents[1].rglob("*.py")]
    called = {name for text in sources for name in re.findall(r'native\.call\(\s*"(\w+)"', text)}
    operators = {name for text in sources for name in re.findall(r'custom_op\(\s*"compressm::(\w+)"', text)}
    counted = {str(one).split(".")[-1] for one in formulas._formulas() if "compressm" in str(one)}
    matrix_states = {f"{kind}_scan{end}" for kind in ("gla", "delta") for end in ("", "_backward")}  # by their kernels
    assert operators == counted | matrix_states
    inside = {  # of these operators
        f"{kind}_{direction}" for kind in ("chain", "ssd", "selective", "lti") for direction in ("forward", "backward")
    } | {"impulse_to_transfer", "transfer_to_impulse", "convolve", "convolve_backward"}
    norms = {f"{kind}_{direction}" for kind in ("batch_norm", "norm") for direction in ("forward", "backward")}
    element_wise = norms | {"gelu", "glu", "gate_forward", "gate_backward"}
    assert called == inside | element_wise | set(formulas._KERNELS)
